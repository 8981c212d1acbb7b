"""y[row] += left[id] · (right[id] · x[row]) on a GPU: many single-edit models evaluated in one forward.

Use it when rows of one batch see different edits; rows of the same edit share its factors through the L2 cache. When
all rows see the same edit, apply that edit to the weight instead.

Two kernels: inner products, split over the columns when there are few rows, then the update. One kernel per row was
ruled out: with fewer rows than multiprocessors most of the GPU would wait. A batched GEMM was ruled out as well: it
copies the factors once per row. Sums are taken in fp32 (fp64 for fp64 rows), split sums added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


@triton.jit
def _inner_product_kernel(
    x,  # (n, width)
    right,  # (m, width)
    ids,  # (n,)
    partial,  # (n, splits), contiguous
    edits,  # m
    width,
    per_split,
    x_row,
    x_column,
    right_row,
    right_column,
    ids_step,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """partial[row, split] = the split's share of right[id] · x[row]; left unwritten for ids of no edit."""
    row = tl.program_id(0).to(tl.int64)
    edit = tl.load(ids + row * ids_step).to(tl.int64)
    if (edit < 0) | (edit >= edits):
        return
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, width)
    total = tl.zeros((BLOCK,), WIDE)
    for first in range(start, stop, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < stop
        columns = columns.to(tl.int64)
        a = tl.load(x + row * x_row + columns * x_column, mask=inside, other=0.0)
        b = tl.load(right + edit * right_row + columns * right_column, mask=inside, other=0.0)
        total += a.to(WIDE) * b.to(WIDE)
    tl.store(partial + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def _low_rank_apply_kernel(
    y,  # (n, d)
    left,  # (m, d)
    ids,  # (n,)
    partial,  # (n, splits), contiguous
    edits,  # m
    d,
    splits,
    y_row,
    y_column,
    left_row,
    left_column,
    ids_step,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """y[row] += left[id] · (sum of the row's partial inner products); NaN for an id out of range."""
    row = tl.program_id(0).to(tl.int64)
    edit = tl.load(ids + row * ids_step).to(tl.int64)
    if edit < 0:
        return
    split = tl.arange(0, SPLITS)
    # A vector, because the interpreter takes no number for a part of a mask.
    known = tl.full((BLOCK,), 0, tl.int64) + edit < edits
    scale = tl.sum(tl.load(partial + row * splits + split, mask=split < splits, other=0.0), 0)
    scale = tl.where(known, scale, float("nan"))
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    a = tl.load(left + edit * left_row + columns * left_column, mask=inside & known, other=0.0).to(scale.dtype)
    pointers = y + row * y_row + columns * y_column
    value = tl.load(pointers, mask=inside, other=0.0).to(scale.dtype) + a * scale
    tl.store(pointers, value.to(y.dtype.element_ty), mask=inside)


def low_rank_apply_triton_(
    y: Tensor,  # (n, d) bf16 | fp16 | fp32 | fp64
    x: Tensor,  # (n, width)
    left: Tensor,  # (m, d)
    right: Tensor,  # (m, width)
    ids: Tensor,  # (n,) int64, negative for no edit
) -> Tensor:
    """y[row] += left[id] · (right[id] · x[row]) in place, summed in fp32 (fp64 for fp64 outputs)."""
    n, d = y.shape
    width = x.shape[1]
    if not n or not d or not width:
        return y
    block = configs.LOW_RANK_BLOCK
    splits = min(triton.cdiv(configs.LOW_RANK_PROGRAMS, n), triton.cdiv(width, block))
    per_split = triton.cdiv(triton.cdiv(width, splits), block) * block
    splits = triton.cdiv(width, per_split)
    double = y.dtype == torch.float64
    partial = torch.empty((n, splits), dtype=torch.float64 if double else torch.float32, device=y.device)
    _inner_product_kernel[(n, splits)](
        x,
        right,
        ids,
        partial,
        left.shape[0],
        width,
        per_split,
        *x.stride(),
        *right.stride(),
        ids.stride(0),
        BLOCK=block,
        WIDE=tl.float64 if double else tl.float32,
        enable_fp_fusion=True,
    )
    _low_rank_apply_kernel[(n, triton.cdiv(d, block))](
        y,
        left,
        ids,
        partial,
        left.shape[0],
        d,
        splits,
        *y.stride(),
        *left.stride(),
        ids.stride(0),
        SPLITS=triton.next_power_of_2(splits),
        BLOCK=block,
        enable_fp_fusion=True,
    )
    return y
