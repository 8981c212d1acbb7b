"""Which implementation an op runs on: Triton on a GPU it can compile for, a native kernel on a CPU where the op has one
and it is built, the plain-torch reference otherwise.

`ROME_FAST_KERNELS=reference`, `=native` or `=triton` forces one. Triton is imported and the native library loaded only
once an op could use it; a machine without them works. Where the library was measured to be faster than Triton at a size
(`faster.py`), it is taken, unless one is forced.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from . import configs, native
from .faster import library_is_faster

VARIABLE = "ROME_FAST_KERNELS"
BACKENDS = ("reference", "native", "triton")
TRITON_OPS = (
    *("second_moment_", "prefixed_solve", "rank_update_", "low_rank_apply_", "suffix_attention"),
    *("add_rms_norm", "rotate_heads", "gated_activation"),
)


class Choice(NamedTuple):
    """The backend of an op and the reason for it."""

    backend: str  # one of BACKENDS, or "library", which cannot be forced
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


def _triton_obstacle(device: torch.device) -> str | None:
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


def _native_obstacle(op: str, device: torch.device) -> str | None:
    """Why the native kernel of an op cannot run on tensors of this device, or None."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if op not in native.OPS:
        return "there is no native kernel of this op"
    return native.obstacle()


def choose(
    op: str,
    device: torch.device,
    *,
    no_triton: str | None = None,
    no_native: str | None = None,
    size: int | None = None,
) -> Choice:
    """The backend of an op on `device`; `no_triton` and `no_native` say why these cannot take the arguments, if so.

    `size` is given where the arguments are such that the library could do what the op promises: where it was measured
    to be faster at that, it is taken, unless triton is forced.

    Raises ValueError for an unknown value of ROME_FAST_KERNELS, RuntimeError when it asks for the impossible; an op
    that has no native kernel at all runs on the reference where `native` is forced.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *BACKENDS):
        raise ValueError(f"{VARIABLE}: got {forced!r}, wanted one of {', '.join(BACKENDS)}; correct or unset it")
    if forced == "reference":
        return Choice("reference", f"{VARIABLE}=reference")
    backend = forced or ("triton" if device.type == "cuda" else "native")
    if backend == "triton":
        obstacle = no_triton or _triton_obstacle(device)
    else:
        obstacle = _native_obstacle(op, device) or no_native or (None if forced else native.doubt(op))
    if not obstacle and backend == "triton" and not forced and size is not None:
        architecture = configs.architecture(device)
        if library_is_faster(op, size, architecture):
            return Choice("library", f"as measured at a size like {size}, on compute capability {architecture / 10}")
    if not obstacle:
        return Choice(backend, f"{VARIABLE}={forced}" if forced else _why(backend, op))
    if not forced or (backend == "native" and op not in native.OPS):
        return Choice("reference", obstacle)
    raise RuntimeError(f"{VARIABLE}={forced}: {obstacle}; unset {VARIABLE}, {_REMEDIES[backend]}")


def _why(backend: str, op: str) -> str:
    if backend == "triton":
        return "the tensors are on an NVIDIA GPU"
    return f"{native.OPS[op]}, on a CPU with {native.instruction_set()} instructions"


_REMEDIES = {
    "native": "or pass what the kernel takes",
    "triton": "move the tensors to a GPU, or on a CPU set TRITON_INTERPRET=1 to run the kernels in the interpreter",
}


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, wherever the tensors are; within this block that is `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def explain(device: str | torch.device | None = None) -> dict[str, Choice]:
    """Every op with its backend on `device` (the GPU where there is one) and the reason."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        **{op: choose(op, torch.device(device)) for op in TRITON_OPS},
        "mirror_lower_": Choice("reference", "once per statistic; plain torch is fast enough"),
        "solve_residual": Choice("reference", "two products that the library does best"),
    }
