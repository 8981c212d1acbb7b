"""total += XᵀX on a GPU, lower triangle only: half the work of a GEMM.

Use it for many tokens per call (16 bit: from about 16k on): the total is read and written once per launch, and at
d = 16384 in fp64 that alone is 4 GiB of traffic. Below d ≈ 2048 there are fewer tiles than multiprocessors, so the
tokens are split as well; every split writes a partial sum and a second kernel adds these up in a fixed order. The
result is the same to the bit on every run: no atomics.

bf16 and fp16 rows go to the matrix unit as they are; their products are exact in fp32. fp32 rows are first split into
bf16 pieces, x = a + b (+ c), because the matrix unit takes a transposed operand in 16 bit only:
  3 pieces, 6 products (aa, ab, ba, ac, bb, ca): as accurate as fp32, the default;
  2 pieces, 3 products (aa, ab, ba): twice as fast, but 10 to 30 times the error of an fp32 GEMM (3e-6 relative).
The split is a pass of its own: done while tiles are loaded, it would be repeated for every tile that reads them. Each
product is then a sweep of the 16-bit kernel. Taking all products of a tile in one step would save loads, but triton 3.6
gives every product an accumulator of its own on sm_100, and six of them do not fit.
Masked rows are zeroed in that pass too (one extra read and write of X in 16 bit), and rows that do not start at
multiples of 16 bytes are copied to ones that do.

Error: at most `CHAIN_TOKENS` tokens are summed in one fp32 accumulator, so where the matrix unit rounds its sums
|error| ≤ CHAIN_TOKENS · 2⁻²⁴ · Σ|x_i x_j|; partial sums are added in the dtype of `total`. An fp32 total rounds once
per call, so its error grows with the number of calls: use an fp64 total for a corpus. A second fp32 buffer for
compensated sums was ruled out; it takes the same memory as fp64 and is no more accurate.

Adding the tile to the total inside the matrix kernel was ruled out: the 64-bit addresses of an fp64 total spill
(1 KiB of stack per thread on sm_90), and the split needs the second kernel anyway. On sm_80 tensor descriptors are
lowered to loads that are not pipelined, hence plain pointers there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .backends import interpreting


@triton.jit
def _keep_bf16(x):
    """fp32 x rounded to a value that bf16 holds exactly; on the bits, so that no cast can round it differently."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _prepare_kernel(
    x,  # (n, d)
    mask,  # (n,) uint8
    out,  # (PIECES, padded_n, padded_d) 16 bit, contiguous
    n,
    d,
    padded_n,
    padded_d,
    stride_n,
    stride_d,
    PIECES: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the pieces of x, masked rows and padding as zeros."""
    blocks = tl.cdiv(padded_d, COLUMNS)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    keep = rows < n
    if MASKED:
        keep &= tl.load(mask + rows, mask=keep, other=0) != 0
    inside = keep[:, None] & (columns < d)[None, :]
    rest = tl.load(x + rows[:, None] * stride_n + columns[None, :] * stride_d, mask=inside, other=0.0)
    target = out + rows[:, None] * padded_d + columns[None, :]
    wanted = (rows < padded_n)[:, None] & (columns < padded_d)[None, :]
    if PIECES == 1:
        tl.store(target, rest, mask=wanted)
    else:
        for piece in tl.static_range(PIECES):
            part = _keep_bf16(rest)
            start = piece * padded_n.to(tl.int64) * padded_d
            tl.store(target + start, part.to(tl.bfloat16), mask=wanted)
            rest -= part


@triton.jit
def _tile_corner(program, SUPER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of a tile: SUPER x SUPER groups of the lower triangle in row order, tiles within."""
    down: tl.constexpr = SUPER // ROWS
    across: tl.constexpr = SUPER // COLUMNS
    group = program // (down * across)
    inside = program % (down * across)
    band = ((tl.sqrt(8.0 * group.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root of fp32 may be off by one either way.
    band = tl.where(band * (band + 1) // 2 > group, band - 1, band)
    band = tl.where((band + 1) * (band + 2) // 2 <= group, band + 1, band)
    first_row = band * SUPER + inside % down * ROWS
    first_column = (group - band * (band + 1) // 2) * SUPER + inside // down * COLUMNS
    return first_row, first_column


@triton.jit
def _load(
    x,
    first_row,
    first_column,
    stop,
    d,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A block of rows before `stop`, zeros elsewhere; a descriptor knows its own end."""
    if DESCRIPTORS:
        block = x.load([first_row, first_column])
        if TRANSPOSED:
            block = block.T
    else:
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        # Pointers are transposed, not the block: on sm_80 a block that is transposed after loading is not copied
        # asynchronously and takes registers for every stage.
        if TRANSPOSED:
            inside = (columns < d)[:, None] & (rows < stop)[None, :]
            pointers = x + rows.to(tl.int64)[None, :] * stride + columns[:, None]
        else:
            inside = (rows < stop)[:, None] & (columns < d)[None, :]
            pointers = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        block = tl.load(pointers, mask=inside, other=0.0)
    return block


@triton.jit
def _second_moment_kernel(
    left,  # (pieces · padded_n, d) 16 bit, d a multiple of 16: a pointer, or a descriptor with blocks of TOKENS x ROWS
    right,  # the same with blocks of TOKENS x COLUMNS
    partial,  # (splits, programs, ROWS, COLUMNS) fp32, contiguous
    n,
    d,
    pieces,
    padded_n,  # rows from one piece to the next
    stride,
    tokens_per_split,  # a multiple of TOKENS
    SUPER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """partial[split, tile] = sum over the split's tokens of the outer products that fall into the tile."""
    row, column = _tile_corner(tl.program_id(0), SUPER, ROWS, COLUMNS)
    if row + ROWS <= column or row >= d:
        return
    start = tl.program_id(1) * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, n)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Small products first: pieces a, b, c give ac bb ca, then ab ba, then aa.
    for done in range(pieces):
        order = pieces - 1 - done
        for piece in range(order + 1):
            left_start = piece * padded_n
            right_start = (order - piece) * padded_n
            for token in range(start, stop, TOKENS):
                a = _load(left, left_start + token, row, left_start + stop, d, stride, TOKENS, ROWS, DESCRIPTORS, True)
                b = _load(
                    right,
                    right_start + token,
                    column,
                    right_start + stop,
                    d,
                    stride,
                    TOKENS,
                    COLUMNS,
                    DESCRIPTORS,
                    False,
                )
                if UPCAST:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                total = tl.dot(a, b, total, out_dtype=tl.float32)
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(partial + tile * (ROWS * COLUMNS) + within, total)


@triton.jit
def _add_kernel(
    total,  # (d, d) fp32 | fp64
    partial,  # (splits, programs, ROWS, COLUMNS) fp32
    d,
    splits,
    programs,
    stride_row,
    stride_column,
    SUPER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """total += the partial sums, in order, on and below the diagonal."""
    row, column = _tile_corner(tl.program_id(0), SUPER, ROWS, COLUMNS)
    if row + ROWS <= column or row >= d:
        return
    across: tl.constexpr = COLUMNS // BLOCK_COLUMNS
    down = tl.program_id(1) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    right = tl.program_id(1) % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows = (row + down).to(tl.int64)[:, None]
    columns = (column + right).to(tl.int64)[None, :]
    wanted = (rows < d) & (columns <= rows)
    pointers = total + rows * stride_row + columns * stride_column
    within = tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS) + down[:, None] * COLUMNS + right[None, :]
    step = programs.to(tl.int64) * (ROWS * COLUMNS)
    value = tl.load(partial + within, mask=wanted, other=0.0).to(total.dtype.element_ty)
    for split in range(1, splits):
        value += tl.load(partial + split * step + within, mask=wanted, other=0.0).to(total.dtype.element_ty)
    tl.store(pointers, tl.load(pointers, mask=wanted, other=0.0) + value, mask=wanted)


def second_moment_triton_(
    total: Tensor,  # (d, d) fp32 | fp64
    x: Tensor,  # (n, d) bf16 | fp16 | fp32
    mask: Tensor | None,  # (n,) bool
    *,
    products: int = 6,  # of fp32 rows: 6 or 3
    architecture: int | None = None,  # key of configs.SECOND_MOMENT; None: that of the device
) -> Tensor:
    """total += XᵀX over the unmasked rows, in place, on and below the diagonal."""
    n, d = x.shape
    if not n or not d:
        return total
    pieces = 1 if x.dtype != torch.float32 else {3: 2, 6: 3}[products]
    architecture = configs.architecture(x.device) if architecture is None else architecture
    tile = configs.SECOND_MOMENT[architecture]
    groups = triton.cdiv(d, configs.SUPER_TILE)
    programs = groups * (groups + 1) // 2 * (configs.SUPER_TILE // tile.rows) * (configs.SUPER_TILE // tile.columns)
    splits_per_launch = max(1, configs.WORKSPACE_BYTES // (programs * tile.rows * tile.columns * 4))
    tokens = min(
        splits_per_launch * configs.CHAIN_TOKENS,
        max(configs.CHAIN_TOKENS, configs.WORKSPACE_BYTES // (2 * pieces * d)),
    )
    for start in range(0, n, tokens):
        part = None if mask is None else mask[start : start + tokens]
        _launch(total, x[start : start + tokens], part, pieces, tile, programs, splits_per_launch, architecture)
    return total


def _launch(
    total: Tensor,
    x: Tensor,
    mask: Tensor | None,
    pieces: int,
    tile: configs.Tile,
    programs: int,
    most_splits: int,
    architecture: int,
) -> None:
    """One chunk of tokens: prepare if needed, multiply, add."""
    n, d = x.shape
    padded_n = triton.cdiv(n, tile.tokens) * tile.tokens
    if pieces > 1 or mask is not None or not _readable(x):
        x = _prepare(x, mask, pieces, padded_n)
    live = triton.cdiv(d, tile.rows) * triton.cdiv(d, tile.columns) / 2
    fill = min(triton.cdiv(2 * configs.PROCESSORS[architecture], int(live) or 1), triton.cdiv(n, configs.SPLIT_TOKENS))
    splits = min(most_splits, max(fill, triton.cdiv(n, configs.CHAIN_TOKENS)))
    per_split = triton.cdiv(triton.cdiv(n, splits), tile.tokens) * tile.tokens
    splits = triton.cdiv(n, per_split)
    partial = torch.empty((splits, programs, tile.rows, tile.columns), dtype=torch.float32, device=x.device)
    left: Any = x
    right: Any = x
    if tile.descriptors:
        shape, strides = list(x.shape), [x.stride(0), 1]
        left = TensorDescriptor(x, shape, strides, [tile.tokens, tile.rows])
        right = TensorDescriptor(x, shape, strides, [tile.tokens, tile.columns])
    _second_moment_kernel[(programs, splits)](
        left,
        right,
        partial,
        n,
        x.shape[1],
        pieces,
        padded_n,
        x.stride(0),
        per_split,
        SUPER=configs.SUPER_TILE,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        TOKENS=tile.tokens,
        DESCRIPTORS=tile.descriptors,
        # The interpreter multiplies bf16 as if it were integers.
        UPCAST=interpreting(),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    rows, columns = min(configs.ADD_BLOCK[0], tile.rows), min(configs.ADD_BLOCK[1], tile.columns)
    _add_kernel[(programs, (tile.rows // rows) * (tile.columns // columns))](
        total,
        partial,
        d,
        splits,
        programs,
        total.stride(0),
        total.stride(1),
        SUPER=configs.SUPER_TILE,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK_ROWS=rows,
        BLOCK_COLUMNS=columns,
        enable_fp_fusion=True,
    )


def _readable(x: Tensor) -> bool:
    """Whether the tiles of x can be loaded where they lie, in 16-byte pieces."""
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return False
    return x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0


def _prepare(x: Tensor, mask: Tensor | None, pieces: int, padded_n: int) -> Tensor:
    """The pieces of x below one another, (pieces · padded_n, d rounded up to 16); what is added is zero."""
    n, d = x.shape
    padded_d = triton.cdiv(d, 16) * 16
    dtype = x.dtype if pieces == 1 else torch.bfloat16
    out = torch.empty((pieces * padded_n, padded_d), dtype=dtype, device=x.device)
    rows, columns = configs.PREPARE_BLOCK
    _prepare_kernel[(triton.cdiv(padded_n, rows) * triton.cdiv(padded_d, columns),)](
        x,
        out if mask is None else mask.contiguous().view(torch.uint8),
        out,
        n,
        d,
        padded_n,
        padded_d,
        x.stride(0),
        x.stride(1),
        PIECES=pieces,
        MASKED=mask is not None,
        ROWS=rows,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )
    return out
