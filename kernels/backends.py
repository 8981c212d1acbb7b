"""Which implementation an op runs on: Triton on a GPU it can compile for, the plain-torch reference otherwise.

`ROME_FAST_KERNELS=reference` or `=triton` forces one. Triton is imported only once it is chosen; a machine without it
works.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

VARIABLE = "ROME_FAST_KERNELS"
TRITON_OPS = ("second_moment_", "prefixed_solve", "rank_update_", "low_rank_apply_")


class Choice(NamedTuple):
    """The backend of an op and the reason for it."""

    backend: str  # "triton" or "reference"
    why: str


def interpreting() -> bool:
    """Whether triton runs its kernels in the interpreter (TRITON_INTERPRET=1 when it was imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _no_triton() -> str | None:
    """Why triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton.tools.tensor_descriptor  # noqa: F401  (missing before triton 3.4)
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _obstacle(device: torch.device) -> str | None:
    """Why triton cannot run on tensors of this device, or None."""
    if device.type != "cuda":
        if device.type == "cpu" and _no_triton() is None and interpreting():
            return None
        return f"the tensors are on {device.type}"
    if torch.version.cuda is None:
        return "the tile tables are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, less than 8.0"
    return _no_triton()


def choose(device: torch.device, unsupported: str | None = None) -> Choice:
    """The backend for tensors on `device`; `unsupported` says why triton cannot take these arguments.

    Raises ValueError for an unknown value of ROME_FAST_KERNELS, RuntimeError when it asks for the impossible.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"{VARIABLE}: got {forced!r}, wanted 'reference' or 'triton'; correct or unset it")
    if forced == "reference":
        return Choice("reference", f"{VARIABLE}=reference")
    if not forced and device.type != "cuda":
        return Choice("reference", f"the tensors are on {device.type}")
    obstacle = unsupported or _obstacle(device)
    if not forced:
        return Choice("reference", obstacle) if obstacle else Choice("triton", "the tensors are on an NVIDIA GPU")
    if obstacle:
        raise RuntimeError(
            f"{VARIABLE}=triton: {obstacle}; unset {VARIABLE}, move the tensors to a GPU, or on a CPU set "
            "TRITON_INTERPRET=1 to run the kernels in the interpreter"
        )
    return Choice("triton", f"{VARIABLE}=triton")


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever the tensors are; within this block that is `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def explain(device: str | torch.device | None = None) -> dict[str, Choice]:
    """Every op with its backend on `device` (the GPU where there is one) and the reason."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = choose(torch.device(device))
    return {
        **dict.fromkeys(TRITON_OPS, choice),
        "mirror_lower_": Choice("reference", "once per statistic; plain torch is fast enough"),
        "solve_residual": Choice("reference", "two products that the library does best"),
    }
