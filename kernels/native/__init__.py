"""Second moments and rank updates on a CPU: the C++ kernels of this folder, called through ctypes.

Chosen by themselves for rows in fp32, bf16 and fp16, and for weights in bf16 and fp16; `benchmarks/native_kernels.py`
measures both against torch.
  second_moment_: lower triangle only, half the products of a GEMM; 16-bit rows are widened while they are packed. Sums
    run in fp32 over at most 1,024 rows, in chains of at most 128, and are then added in the dtype of `total`:
    |error| ≤ 137 · 2⁻²⁴ · Σ|x_i x_j| for an fp64 total, however many rows there are. An fp32 total rounds once more per
    1,024 rows and per call, so take an fp64 total for a corpus. The result does not depend on the number of threads.
  rank_update_: one pass over the weight up to rank 128, where torch needs three and two fp32 copies of the weight.

Ruled out: the rank update of fp32 weights, because addcmul_ and addmm_ of torch are single passes already (a kernel of
one vector per row had 0.4 to 0.8 times their speed on one thread of an AMD EPYC, Zen 3, AVX2). Not tried: fp64 rows and
the other ops. AVX-512 is tested, its speed was not measured. Its bf16 products are left out: they want the rows
interleaved in pairs, a second layout that could not be tested.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "librome_fast_native.so"
VERSION = 1  # ROME_FAST_NATIVE_VERSION in native.h
OPS = {"second_moment_": "fp32, bf16 and fp16 rows", "rank_update_": "bf16 and fp16 weights, up to rank 128"}
"""The ops with a kernel here, and what it takes."""
MAX_RANK = 128
"""Largest rank of an update that is faster here (3 times at 128, 1.2 at 512, where a GEMM is all that counts)."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "the native kernels are not built; reinstall with cmake and a C++17 compiler at hand"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.rome_fast_native_version()
    except (OSError, AttributeError) as error:
        return f"the native kernels cannot be loaded ({error})"
    if version != VERSION:
        return f"the native kernels are of version {version}, not {VERSION}; reinstall"
    library.rome_fast_instruction_set.restype = ctypes.c_char_p
    library.rome_fast_select.argtypes = [ctypes.c_char_p]
    library.rome_fast_second_moment.argtypes = [
        *(_POINTER, _INT, _LONG),
        *(_POINTER, _INT, _LONG, _POINTER, _LONG, _LONG),
        _INT,
    ]
    library.rome_fast_rank_update.argtypes = [
        *(_POINTER, _INT, _LONG),
        *(_POINTER, _POINTER, _LONG, _LONG, _LONG),
        _INT,
    ]
    return library


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def obstacle() -> str | None:
    """Why no native kernel can run in this process, or None."""
    library = _load()
    return library if isinstance(library, str) else None


def instruction_set() -> str:
    """What the kernels use of this CPU: "avx512", "avx2" or "generic"; the best it has, until another is selected."""
    return str(_library().rome_fast_instruction_set().decode())


def doubt(op: str) -> str | None:
    """Why the kernel of an op may be slower than torch on this CPU, or None."""
    if op == "second_moment_" and instruction_set() == "generic":
        return "the native kernel is not known to be faster on a CPU without AVX2"
    return None


def select(name: str) -> None:
    """Use another instruction set, for tests and benchmarks; ValueError for one that this CPU lacks."""
    if _library().rome_fast_select(name.encode()):
        raise ValueError(f"name: got {name!r}, wanted one of 'generic', 'avx2', 'avx512' that this CPU has")


def _recorded(*tensors: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "autograd has to record the call"
    return None


def _row_major(value: Tensor) -> bool:
    return value.stride(1) == 1 or value.shape[1] <= 1


def _separate_rows(value: Tensor) -> bool:
    return value.shape[0] <= 1 or value.stride(0) >= value.shape[1]


def second_moment_obstacle(total: Tensor, x: Tensor) -> str | None:
    """Why the native kernel cannot take these arguments of `second_moment_`, or None."""
    if x.dtype not in _KINDS:
        return "there is no native kernel for fp64 rows"
    if not (_row_major(total) and _separate_rows(total) and _row_major(x)):
        return "the columns of total or x are not adjacent in memory"
    return _recorded(total, x)


def second_moment_native_(
    total: Tensor,  # (d, d) fp32 | fp64, rows contiguous
    x: Tensor,  # (n, d) fp32 | bf16 | fp16, rows contiguous
    mask: Tensor | None,  # (n,) bool
) -> Tensor:
    """total += XᵀX over the unmasked rows, lower triangle only, on as many threads as torch uses.

    Raises MemoryError when there is no room for a packed copy of 1,024 rows; `total` is then unchanged.
    """
    mask = None if mask is None else mask.contiguous()
    failed = _library().rome_fast_second_moment(
        total.data_ptr(),
        total.dtype == torch.float64,
        total.stride(0),
        x.data_ptr(),
        _KINDS[x.dtype],
        x.stride(0),
        None if mask is None else mask.data_ptr(),
        *x.shape,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"second_moment_: no memory for {min(len(x), 1024)} packed rows of {x.shape[1]} columns")
    return _written(total)


def rank_update_obstacle(weight: Tensor, left: Tensor, right: Tensor) -> str | None:
    """Why the native kernel cannot take these arguments of `rank_update_`, or None."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return "torch is faster on fp32 weights, and there is no native kernel for fp64 ones"
    if left.shape[1] > MAX_RANK:
        return f"a GEMM is as fast beyond rank {MAX_RANK}"
    if not any(_row_major(w) and _separate_rows(w) for w in (weight, weight.T)):
        return "neither the rows nor the columns of weight are contiguous"
    return _recorded(weight, left, right)


def rank_update_native_(
    weight: Tensor,  # (d, width) bf16 | fp16, rows or columns contiguous
    left: Tensor,  # (d, rank) fp32 | fp64
    right: Tensor,  # (rank, width) fp32 | fp64
) -> Tensor:
    """W += left @ right in place, summed in fp32 and rounded once, on as many threads as torch uses.

    Raises MemoryError when there is no room for 32,768 numbers per thread; the weight is then unchanged.
    """
    w, a, b = weight, left, right
    if not (_row_major(w) and _separate_rows(w)):
        w, a, b = w.T, b.T, a.T
    a, b = a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous()
    failed = _library().rome_fast_rank_update(
        w.data_ptr(),
        _KINDS[w.dtype],
        w.stride(0),
        a.data_ptr(),
        b.data_ptr(),
        *w.shape,
        a.shape[1],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"rank_update_: no memory for strips of {a.shape[1]} rows of the right factor")
    return _written(weight)


def _written(target: Tensor) -> Tensor:
    """Tell autograd that torch did not see this write."""
    if not target.is_inference():
        torch.autograd.graph.increment_version(target)
    return target
