"""The tensor operations of model editing: validated here, computed by a backend.

Each op has a plain-torch definition in `reference.py`; that definition is the oracle for every faster backend.
This package imports nothing from `rome_fast` and nothing heavy beyond torch.
"""

from .ops import low_rank_apply_, mirror_lower_, prefixed_solve, rank_update_, second_moment_

__all__ = ["low_rank_apply_", "mirror_lower_", "prefixed_solve", "rank_update_", "second_moment_"]
