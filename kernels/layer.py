"""What lies between the products of a decoder layer, forward and backward, on a GPU: norms, rotation, activation.

Each is one launch where layers as written take two to thirteen. All are bound by bandwidth: a number is read once,
computed with in fp32 and rounded where the layer as written rounds what it goes on with. Backward passes take the
gradient of activations only, and add that of the residual stream in the same launch.

Ruled out: keeping 1/rms for the backward pass, which has the row at hand to compute it from; the gated activation in
the product in front of it, which would take a matrix product of our own where the library's is the best there is.
"""

import triton
import triton.language as tl
from torch import Tensor, empty_like

from . import configs


@triton.jit
def _rms_norm_kernel(
    x,  # (rows, d), contiguous as are all
    update,  # (rows, d) or None
    weight,  # (d,)
    hidden,  # (rows, d), or None without an update
    normed,  # (rows, d)
    d,
    eps,
    BLOCK: tl.constexpr,
):
    """hidden = x + update, normed = weight · hidden / rms(hidden), of one row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    at = tl.program_id(0).to(tl.int64) * d + columns
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if update is not None:
        h += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        h = h.to(hidden.dtype.element_ty)
        tl.store(hidden + at, h, mask=inside)
        h = h.to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    unit = (h * tl.rsqrt(tl.sum(h * h, 0) / d + eps)).to(normed.dtype.element_ty)
    tl.store(normed + at, (w * unit.to(tl.float32)).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    gradient,  # (rows, d): of what is normed, contiguous as are all
    residual,  # (rows, d): of hidden, from elsewhere, or None
    hidden,  # (rows, d)
    weight,  # (d,)
    result,  # (rows, d)
    d,
    eps,
    BLOCK: tl.constexpr,
):
    """Gradient of hidden, of one row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    at = tl.program_id(0).to(tl.int64) * d + columns
    h = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / d + eps)
    unit = h * scale
    g = scale * (g - unit * (tl.sum(g * unit, 0) / d))
    if residual is not None:
        g += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, g.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    states,  # query and key: (n, heads, size), contiguous as are all; backward the gradients of what came out
    inputs,  # backward, with weights: query and key as they went in
    weights,  # of query and key: (size,); both None for no norm
    results,  # of query and key
    cos,  # (n, rotated)
    sin,  # (n, rotated)
    heads,  # of query and key
    size,
    rotated,
    eps,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Norm and rotation, or their gradient, of some heads of the query or the key at one position."""
    position = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles = tl.cdiv(heads[0], HEADS)
    columns = tl.arange(0, WIDTH)
    turned = columns < rotated
    inside = columns < size
    first = columns < rotated // 2
    # The other one of the pair that is rotated together; what is not rotated is its own.
    other = tl.where(first, columns + rotated // 2, tl.where(turned, columns - rotated // 2, columns))
    of_cos = cos + position * rotated
    of_sin = sin + position * rotated
    c = tl.load(of_cos + columns, mask=turned, other=1.0).to(tl.float32)
    if BACKWARD:
        s = tl.load(of_sin + other, mask=turned, other=0.0).to(tl.float32)
        s = tl.where(first, s, -s)
    else:
        s = tl.load(of_sin + columns, mask=turned, other=0.0).to(tl.float32)
        s = tl.where(first, -s, s)
    for part in tl.static_range(2):
        begins = part * tiles
        ends = tiles
        if part == 1:
            ends = tiles + tl.cdiv(heads[1], HEADS)
        if (tile >= begins) & (tile < ends):
            head = (tile - begins) * HEADS + tl.arange(0, HEADS)
            exists = (head < heads[part])[:, None] & inside[None, :]
            row = (position * heads[part] + head)[:, None] * size
            one = tl.load(states[part] + row + columns[None, :], mask=exists, other=0.0).to(tl.float32)
            two = tl.load(states[part] + row + other[None, :], mask=exists, other=0.0).to(tl.float32)
            dtype = results[part].dtype.element_ty
            if weights[part] is None:
                turn = one * c[None, :] + two * s[None, :]
            else:
                w = tl.load(weights[part] + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
                if BACKWARD:
                    x = tl.load(inputs[part] + row + columns[None, :], mask=exists, other=0.0).to(tl.float32)
                    scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
                    unit = x * scale
                    turn = (one * c[None, :] + two * s[None, :]) * w
                    turn = scale * (turn - unit * (tl.sum(turn * unit, 1) / size)[:, None])
                else:
                    scale = tl.rsqrt(tl.sum(one * one, 1) / size + eps)[:, None]
                    of_other = tl.load(weights[part] + other, mask=inside, other=0.0).to(tl.float32)[None, :]
                    one = (w * (one * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
                    two = (of_other * (two * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
                    turn = one * c[None, :] + two * s[None, :]
            tl.store(results[part] + row + columns[None, :], turn.to(dtype), mask=exists)


@triton.jit
def _tanh(x):
    """Where exp overflows, or is zero, this is right."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and act′(x)."""
    if ACTIVATION == "silu":
        share = 1 / (1 + tl.exp(-x))
        slope = share * (1 + x * (1 - share))
        value = x * share
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        value = x * share
    elif ACTIVATION == "gelu_tanh":
        bent = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        share = 0.5 * (1 + bent)
        slope = share + 0.5 * x * (1 - bent * bent) * 0.7978845608028654 * (1 + 0.134145 * x * x)
        value = x * share
    else:
        tl.static_assert(ACTIVATION == "relu")
        slope = tl.where(x > 0, 1.0, 0.0)
        value = tl.where(x <= 0, 0.0, x)  # NaN stays
    return value, slope


@triton.jit
def _gated_activation_kernel(gate, up, result, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """act(gate) · up, of contiguous tensors of `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value, _ = _activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    dtype = result.dtype.element_ty
    value = value.to(dtype).to(tl.float32) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, value.to(dtype), mask=inside)


@triton.jit
def _gated_activation_backward_kernel(
    gradient, gate, up, of_gate, of_up, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients of gate and up, of contiguous tensors of `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value, slope = _activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    outer = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_gate + at, (outer * factor * slope).to(of_gate.dtype.element_ty), mask=inside)
    tl.store(of_up + at, (outer * value).to(of_up.dtype.element_ty), mask=inside)


def add_rms_norm_triton(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, empty without an update, and what is normed."""
    x = x.contiguous()
    hidden, normed = x.new_empty(0) if update is None else empty_like(x), empty_like(x)
    d = x.shape[-1]
    if x.numel():
        _rms_norm_kernel[(x.numel() // d,)](
            x,
            None if update is None else update.contiguous(),
            weight.contiguous(),
            None if update is None else hidden,
            normed,
            d,
            eps,
            **_row_options(d),
        )
    return hidden, normed


def add_rms_norm_backward_triton(
    gradient: Tensor, residual: Tensor | None, hidden: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Gradient of hidden, and so of x and of update."""
    hidden = hidden.contiguous()
    result = empty_like(hidden)
    d = hidden.shape[-1]
    if hidden.numel():
        _rms_norm_backward_kernel[(hidden.numel() // d,)](
            gradient.contiguous(),
            None if residual is None else residual.contiguous(),
            hidden,
            weight.contiguous(),
            result,
            d,
            eps,
            **_row_options(d),
        )
    return result


def rotate_heads_triton(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Query and key, normed where there are weights and rotated; both contiguous."""
    return _rotated(query, key, (None, None), cos, sin, (query_weight, key_weight), eps, backward=False)


def rotate_heads_backward_triton(
    of_query: Tensor,
    of_key: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, which are looked at only with weights; both contiguous."""
    return _rotated(of_query, of_key, (query, key), cos, sin, (query_weight, key_weight), eps, backward=True)


def _rotated(
    query: Tensor,
    key: Tensor,
    inputs: tuple[Tensor | None, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    states = query.contiguous(), key.contiguous()
    results = empty_like(states[0]), empty_like(states[1])
    rows, time, heads, size = query.shape
    rotated = cos.shape[-1]
    if not query.numel():
        return results
    width = triton.next_power_of_2(size)
    block = max(1, configs.ROTATED_BLOCK // width)
    tiles = triton.cdiv(heads, block) + triton.cdiv(key.shape[2], block)
    _rotate_kernel[(rows * time, tiles)](
        states,
        tuple(None if x is None else x.contiguous() for x in inputs),
        tuple(None if x is None else x.contiguous() for x in weights),
        results,
        cos.expand(rows, time, rotated).contiguous(),
        sin.expand(rows, time, rotated).contiguous(),
        (heads, key.shape[2]),
        size,
        rotated,
        eps,
        BACKWARD=backward,
        HEADS=block,
        WIDTH=width,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return results


def gated_activation_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up."""
    gate = gate.contiguous()
    result = empty_like(gate)
    if gate.numel():
        _gated_activation_kernel[(triton.cdiv(gate.numel(), configs.GATED_BLOCK),)](
            gate, up.contiguous(), result, gate.numel(), ACTIVATION=activation, **_block_options()
        )
    return result


def gated_activation_backward_triton(
    gradient: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    gate = gate.contiguous()
    of_gate, of_up = empty_like(gate), empty_like(gate)
    if gate.numel():
        _gated_activation_backward_kernel[(triton.cdiv(gate.numel(), configs.GATED_BLOCK),)](
            gradient.contiguous(),
            gate,
            up.contiguous(),
            of_gate,
            of_up,
            gate.numel(),
            ACTIVATION=activation,
            **_block_options(),
        )
    return of_gate, of_up


def _block_options() -> dict[str, int]:
    return {"BLOCK": configs.GATED_BLOCK, "num_warps": 4, "enable_fp_fusion": True}


def _row_options(d: int) -> dict[str, int]:
    """A row is one tile, of at most 32 numbers a thread."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 256)), "enable_fp_fusion": True}
