"""The tensor operations of model editing: validated here, computed by a backend.

Each op has a plain-torch definition in `reference.py`; that definition is the oracle for every faster backend.
On NVIDIA GPUs with triton installed that is Triton, on CPUs C++ for what it does faster than torch, elsewhere the
reference; `explain()` says which and why.
This package imports nothing from `rome_fast` and nothing heavy beyond torch.
"""

from .backends import Choice, explain
from .ops import (
    add_rms_norm,
    gated_activation,
    low_rank_apply_,
    mirror_lower_,
    prefixed_solve,
    rank_update_,
    rotate_heads,
    second_moment_,
    solve_residual,
    suffix_attention,
)

__all__ = [
    "Choice",
    "add_rms_norm",
    "explain",
    "gated_activation",
    "low_rank_apply_",
    "mirror_lower_",
    "prefixed_solve",
    "rank_update_",
    "rotate_heads",
    "second_moment_",
    "solve_residual",
    "suffix_attention",
]
