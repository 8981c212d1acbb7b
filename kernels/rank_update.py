"""W += left @ right on a GPU, in one pass over W.

Use it for ranks up to about 64: W is read and written once, the sum is taken in fp32 (fp64 for fp64 weights) and
rounded once. torch needs three passes and an fp32 copy of W for the same rounding. Above that rank the products no
longer hide behind the traffic and a GEMM into an fp32 copy wins.

Ranks are taken in chunks of 4 inside the kernel, not in several launches, which would round W several times; unrolled
to 16 the loop spills (160 to 700 bytes per thread on sm_90), and copying ahead in stages only costs registers.
Transposed views (GPT-2's Conv1D) are updated as the transposed problem, so that neighbouring threads always
touch neighbouring addresses. The matrix unit was ruled out: at these ranks it would pad to 16 and round the factors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


@triton.jit
def _rank_update_kernel(
    weight,  # (d, width)
    left,  # (d, rank)
    right,  # (rank, width)
    d,
    width,
    rank,
    weight_row,
    weight_column,
    left_row,
    left_column,
    right_row,
    right_column,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    across = tl.cdiv(width, COLUMNS)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < d)[:, None] & (columns < width)[None, :]
    pointers = weight + rows[:, None] * weight_row + columns[None, :] * weight_column
    left += rows * left_row
    right += columns * right_column
    update = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(0, rank, CHUNK):
        for step in tl.static_range(CHUNK):
            exists = tl.full((1,), start + step, tl.int32) < rank
            a = tl.load(left, mask=(rows < d) & exists, other=0.0)
            b = tl.load(right, mask=(columns < width) & exists, other=0.0)
            update += a.to(WIDE)[:, None] * b.to(WIDE)[None, :]
            left += left_column
            right += right_row
    value = tl.load(pointers, mask=inside, other=0.0).to(WIDE) + update
    tl.store(pointers, value.to(weight.dtype.element_ty), mask=inside)


def rank_update_triton_(
    weight: Tensor,  # (d, width) bf16 | fp16 | fp32 | fp64, any strides
    left: Tensor,  # (d, rank) fp32 | fp64
    right: Tensor,  # (rank, width) fp32 | fp64
) -> Tensor:
    """W += left @ right in place, added in fp32 (fp64 for fp64 weights) and rounded once."""
    rank = left.shape[1]
    if not weight.numel() or not rank:
        return weight
    w, a, b = weight, left, right
    if w.stride(0) < w.stride(1):
        w, a, b = w.T, b.T, a.T
    d, width = w.shape
    rows, columns = configs.RANK_UPDATE_BLOCK
    chunk = next((size for size in configs.RANK_CHUNKS if size >= rank), configs.RANK_CHUNKS[-1])
    _rank_update_kernel[(triton.cdiv(d, rows) * triton.cdiv(width, columns),)](
        w,
        a,
        b,
        d,
        width,
        rank,
        *w.stride(),
        *a.stride(),
        *b.stride(),
        CHUNK=chunk,
        ROWS=rows,
        COLUMNS=columns,
        WIDE=tl.float64 if weight.dtype == torch.float64 else tl.float32,
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return weight
