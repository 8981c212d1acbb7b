"""Mean keys, C⁻¹ applied to them, and uᵀk̄ on a GPU.

The mean over ragged groups is one launch for all edits; a single edit has no groups to sort and leaves it to torch.
What follows depends on what is known of C:
  a factor: two triangular solves of the library for all edits at once;
  an inverse and several edits: one GEMM of the library;
  an inverse and a single edit: one pass over the inverse, whose kernel also takes uᵀk̄. Use this one when edits come
  singly; it is pure bandwidth, where a triangular solve with one right-hand side is bound by latency.
A factor beside the inverse buys one refinement step, u += C⁻¹(k̄ − L Lᵀu), for three more passes over the matrices.

Taking the mean inside the pass over the inverse was ruled out by counting: a program that owns r rows of the inverse
would read all n keys again, n / r times the bytes of the inverse, and r has to be small (8) to occupy the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference


@triton.jit
def _mean_kernel(
    keys,  # (n, d)
    order,  # (n,) int64: rows sorted by group
    bounds,  # (count + 1,) int64: where each group starts in `order`
    mean,  # (count, d), contiguous
    d,
    key_row,
    key_column,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """mean[g] = sum over the rows of group g / their number."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tl.load(bounds + group)
    stop = tl.load(bounds + group + 1)
    total = tl.zeros((BLOCK,), WIDE)
    for place in range(start, stop):
        row = tl.load(order + place)
        total += tl.load(keys + row * key_row + columns * key_column, mask=inside, other=0.0).to(WIDE)
    number = (stop - start).to(WIDE)
    # Plain division of fp32 is approximate, two units in the last place.
    result = tl.div_rn(total, tl.zeros_like(total) + number) if total.dtype == tl.float32 else total / number
    tl.store(mean + group * d + columns, result.to(mean.dtype.element_ty), mask=inside)


@triton.jit
def _inverse_kernel(
    inverse,  # (d, d)
    mean,  # (d,)
    solved,  # (d,)
    partial,  # (programs,): each program's share of solved · mean
    d,
    inverse_row,
    inverse_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """solved = inverse @ mean, and its inner product with mean."""
    wide: tl.constexpr = inverse.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), wide)
    for first in range(0, d, COLUMNS):
        columns = (first + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (rows < d)[:, None] & (columns < d)[None, :]
        pointers = inverse + rows[:, None] * inverse_row + columns[None, :] * inverse_column
        k = tl.load(mean + columns, mask=columns < d, other=0.0)
        total += tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first") * k[None, :]
    u = tl.sum(total, 1)
    tl.store(solved + rows, u, mask=rows < d)
    k = tl.load(mean + rows, mask=rows < d, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(u * k, 0))


def group_mean_triton(keys: Tensor, groups: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Mean key of each group, (count, d) in `dtype`, summed in fp32 or fp64 in the order of the rows."""
    if count == 1:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return keys.mean(0, keepdim=True, dtype=wide).to(dtype)
    d = keys.shape[1]
    mean = torch.empty((count, d), dtype=dtype, device=keys.device)
    # Not by bincount, which waits for the GPU. Ids out of range fall outside all bounds.
    ordered, order = torch.sort(groups, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=keys.device))
    block = configs.MEAN_BLOCK
    _mean_kernel[(count, triton.cdiv(d, block))](
        keys,
        order,
        bounds,
        mean,
        d,
        *keys.stride(),
        BLOCK=block,
        WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
        enable_fp_fusion=True,
    )
    return mean


def apply_inverse_triton(inverse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """C⁻¹k̄ (d,) and the shares of k̄ᵀC⁻¹k̄ that sum to it, for k̄ (d,) contiguous and of the inverse's dtype."""
    # C⁻¹ is symmetric, so rows may stand for columns where those are the contiguous ones.
    if inverse.stride(0) < inverse.stride(1):
        inverse = inverse.T
    d = mean.shape[0]
    rows, columns = configs.INVERSE_BLOCK
    solved = torch.empty_like(mean)
    partial = torch.empty(triton.cdiv(d, rows), dtype=mean.dtype, device=mean.device)
    _inverse_kernel[(triton.cdiv(d, rows),)](
        inverse,
        mean,
        solved,
        partial,
        d,
        *inverse.stride(),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return solved, partial


def prefixed_solve_triton(
    keys: Tensor,  # (n, d)
    groups: Tensor,  # (n,) int64
    count: int,
    factor: Tensor | None,  # (d, d) fp32 | fp64
    inverse: Tensor | None,  # (d, d) fp32 | fp64
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key per edit, C⁻¹ applied to it, and all inner products between the two."""
    mean = group_mean_triton(keys, groups, count, reference.solve_dtype(keys, factor, inverse))
    if inverse is None or count > 1 or not mean.numel():
        return mean, *reference.solve_mean_ref(mean, factor, inverse)
    solved, shares = apply_inverse_triton(inverse, mean[0])
    if factor is None:
        return mean, solved.unsqueeze(0), shares.sum().view(1, 1)
    rest = mean[0] - factor @ (factor.T @ solved)
    solved = solved + apply_inverse_triton(inverse, rest)[0]
    return mean, solved.unsqueeze(0), (solved @ mean[0]).view(1, 1)
