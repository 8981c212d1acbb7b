"""Attention of a few new positions per row over a past that rows share in part, forward and backward, on a GPU.

Use it where the queries are few and the keys in front of them are frozen: the contexts' keys are read where they lie,
once per row and key head, where gathering them, joining them to a row's own and repeating them for every head of a
group writes and reads them all again, in every layer of every step. For long suffixes use the library's attention.

A program takes the queries of all heads that share a key head as one tile, time and heads flattened, and walks over the
context, the middle and the suffix with a running maximum and sum (Milakov & Gimelshein, arXiv 1805.02867; Dao et al.,
arXiv 2205.14135). The backward pass recomputes the weights from the logarithm of that sum. It is one launch of two
kinds of programs: some take the gradient of a tile of queries, the others that of a tile of the suffix's keys and
values, so that each number is summed by one program, in one order, without atomics.

Ruled out by counting: a program per context for all its rows, which would read the contexts' keys once; those of all
contexts together stay in the L2 cache, and rows would have to be sorted, with a second pass to join both parts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .backends import interpreting
from .reference import SuffixCall


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a · b, summed in fp32, with `a` rounded to the dtype of `b`; the interpreter cannot multiply bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a.to(b.dtype), b, out_dtype=tl.float32, input_precision=PRECISION)


@triton.jit
def _place(counts, row, contexts, longest, middle):
    """Context of a row, how much of it and of the middle it sees, and whether these numbers are in range."""
    index = tl.load(counts[0] + row)
    seen = tl.load(counts[1] + row)
    right = (index >= 0) & (index < contexts) & (seen >= 0) & (seen <= longest)
    own = seen * 0
    if counts[2] is not None:
        own = tl.load(counts[2] + row)
        right = right & (own >= 0) & (own <= middle)
    return tl.where(right, index, 0), tl.where(right, seen, 0).to(tl.int32), tl.where(right, own, 0).to(tl.int32), right


@triton.jit
def _key_tile(pointer, strides, row, kv_head, numbers, exists, size, WIDTH: tl.constexpr):
    """(KEYS, WIDTH): keys or values of these numbers, zero where they do not exist."""
    columns = tl.arange(0, WIDTH)
    pointers = pointer + row * strides[0] + kv_head * strides[1] + numbers.to(tl.int64)[:, None] * strides[2]
    return tl.load(pointers + columns[None, :], mask=exists[:, None] & (columns < size)[None, :], other=0.0)


@triton.jit
def _query_pointers(pointer, strides, row, kv_head, numbers, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """(QUERIES, WIDTH): where these queries, or what belongs to them, are; a position's heads follow one another."""
    head = kv_head * GROUP + numbers % GROUP
    at = pointer + row * strides[0] + head * strides[1] + (numbers // GROUP).to(tl.int64) * strides[2]
    return at[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _query_slopes(slopes, kv_head, numbers, GROUP: tl.constexpr):
    """(QUERIES,): slope of each query's head, or zero."""
    found = tl.zeros(numbers.shape, tl.float32)
    if slopes is not None:
        found = tl.load(slopes + kv_head * GROUP + numbers % GROUP)
    return found


@triton.jit
def _scored(
    queries,  # (QUERIES, WIDTH)
    keys,  # (KEYS, WIDTH)
    at,  # (QUERIES,): position of each query
    of_key,  # (KEYS,): position of each key
    exists,  # (KEYS,)
    slopes,  # (QUERIES,)
    scale,
    soft_cap,
    window,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores (QUERIES, KEYS), -inf for what is not seen, and the derivative of the soft cap."""
    scores = _product(queries, tl.trans(keys), PRECISION, UPCAST) * scale
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if soft_cap is not None:
        # tanh; where exp overflows, or is zero, that is right.
        bent = 1 - 2 / (tl.exp(2 * scores / soft_cap) + 1)
        slope = 1 - bent * bent
        scores = bent * soft_cap
    scores += slopes[:, None] * (of_key[None, :] - at[:, None]).to(tl.float32)
    sees = exists[None, :] & (of_key[None, :] <= at[:, None])
    if window is not None:
        sees = sees & (of_key[None, :] > at[:, None] - window)
    return tl.where(sees, scores, float("-inf")), slope


# Sizes that change from batch to batch: nothing is compiled anew for one that happens to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["contexts", "longest", "middle", "time", "window"])
def _suffix_attention_kernel(
    query,  # (rows, heads, time, size), of contiguous heads as are keys, values and output
    keys,  # of the contexts (contexts, kv_heads, longest, size), the middles and the suffixes (rows, kv_heads, …, size)
    values,  # like them
    output,  # (rows, heads, time, size)
    total,  # (rows, heads, time) fp32, contiguous
    counts,  # context_index, context_seen, middle_seen: (rows,) int64 each, contiguous; the last may be None
    slopes,  # (heads,) fp32, contiguous, or None
    contexts,
    kv_heads,
    longest,
    middle,
    time,
    size,
    scale,
    soft_cap,  # or None
    window,  # or None
    query_strides,  # three, as of output; of keys and values three times three
    key_strides,
    value_strides,
    output_strides,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """output = softmax(scores) · values, total = log of the sum of exp(scores), of one tile of queries."""
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    index, seen, own, right = _place(counts, row, contexts, longest, middle)
    numbers = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    wanted = numbers < time * GROUP
    whole = wanted[:, None] & (tl.arange(0, WIDTH) < size)[None, :]
    q = tl.load(_query_pointers(query, query_strides, row, kv_head, numbers, GROUP, WIDTH), mask=whole, other=0.0)
    of_head = _query_slopes(slopes, kv_head, numbers, GROUP)
    at = seen + own + numbers // GROUP
    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    for part in tl.static_range(3):
        place, count, first = row, time, seen + own
        if part == 0:
            place, count, first = index, seen, seen * 0
        elif part == 1:
            count, first = own, seen
        for start in range(0, count, KEYS):
            other = start + tl.arange(0, KEYS)
            exists = other < count
            k = _key_tile(keys[part], key_strides[part], place, kv_head, other, exists, size, WIDTH)
            v = _key_tile(values[part], value_strides[part], place, kv_head, other, exists, size, WIDTH)
            scores, _ = _scored(q, k, at, first + other, exists, of_head, scale, soft_cap, window, PRECISION, UPCAST)
            larger = tl.maximum(best, tl.max(scores, 1))
            # A window may have hidden everything so far.
            base = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp(scores - base[:, None])
            shrink = tl.exp(best - base)
            weight = weight * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + _product(weights, v, PRECISION, UPCAST)
            best = larger
    # A query that is none may have seen nothing.
    weight = tl.where(wanted, weight, 1.0)
    result = tl.where(right, result / weight[:, None], float("nan"))
    pointers = _query_pointers(output, output_strides, row, kv_head, numbers, GROUP, WIDTH)
    tl.store(pointers, result.to(output.dtype.element_ty), mask=whole)
    heads = kv_heads * GROUP
    of_query = (row * heads + kv_head * GROUP + numbers % GROUP) * time + numbers // GROUP
    tl.store(total + of_query, tl.where(right, best + tl.log(weight), float("nan")), mask=wanted)


@triton.jit(do_not_specialize=["contexts", "longest", "middle", "time", "window"])
def _suffix_attention_backward_kernel(
    query,  # as are keys to window
    keys,
    values,
    output,
    gradient,  # (rows, heads, time, size), of contiguous heads: that of the output
    total,
    of_query,  # (rows, heads, time, size), of contiguous heads as are the next two
    of_key,  # (rows, kv_heads, time, size)
    of_value,
    counts,
    slopes,
    contexts,
    kv_heads,
    longest,
    middle,
    time,
    size,
    scale,
    soft_cap,
    window,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    gradient_strides,
    of_query_strides,
    of_key_strides,
    of_value_strides,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradients of one tile of queries, or of one tile of the suffix's keys and values."""
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    index, seen, own, right = _place(counts, row, contexts, longest, middle)
    inside = tl.arange(0, WIDTH) < size
    heads = kv_heads * GROUP
    tiles = tl.cdiv(time * GROUP, QUERIES)
    if tl.program_id(1) < tiles:
        numbers = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
        wanted = numbers < time * GROUP
        whole = wanted[:, None] & inside[None, :]
        q = tl.load(_query_pointers(query, query_strides, row, kv_head, numbers, GROUP, WIDTH), mask=whole, other=0.0)
        o = tl.load(_query_pointers(output, output_strides, row, kv_head, numbers, GROUP, WIDTH), mask=whole, other=0.0)
        pointers = _query_pointers(gradient, gradient_strides, row, kv_head, numbers, GROUP, WIDTH)
        outer = tl.load(pointers, mask=whole, other=0.0)
        inner = tl.sum(o.to(tl.float32) * outer.to(tl.float32), 1)
        place_of_total = (row * heads + kv_head * GROUP + numbers % GROUP) * time + numbers // GROUP
        logarithm = tl.load(total + place_of_total, mask=wanted, other=0.0)
        of_head = _query_slopes(slopes, kv_head, numbers, GROUP)
        at = seen + own + numbers // GROUP
        result = tl.zeros((QUERIES, WIDTH), tl.float32)
        for part in tl.static_range(3):
            place, count, first = row, time, seen + own
            if part == 0:
                place, count, first = index, seen, seen * 0
            elif part == 1:
                count, first = own, seen
            for start in range(0, count, KEYS):
                other = start + tl.arange(0, KEYS)
                exists = other < count
                k = _key_tile(keys[part], key_strides[part], place, kv_head, other, exists, size, WIDTH)
                v = _key_tile(values[part], value_strides[part], place, kv_head, other, exists, size, WIDTH)
                scores, slope = _scored(
                    q, k, at, first + other, exists, of_head, scale, soft_cap, window, PRECISION, UPCAST
                )
                weights = tl.exp(scores - logarithm[:, None])
                of_scores = weights * (_product(outer, tl.trans(v), PRECISION, UPCAST) - inner[:, None]) * slope
                result += _product(of_scores, k, PRECISION, UPCAST)
        result = tl.where(right, result * scale, float("nan"))
        pointers = _query_pointers(of_query, of_query_strides, row, kv_head, numbers, GROUP, WIDTH)
        tl.store(pointers, result.to(of_query.dtype.element_ty), mask=whole)
        return
    other = (tl.program_id(1) - tiles) * KEYS + tl.arange(0, KEYS)
    exists = other < time
    k = _key_tile(keys[2], key_strides[2], row, kv_head, other, exists, size, WIDTH)
    v = _key_tile(values[2], value_strides[2], row, kv_head, other, exists, size, WIDTH)
    key_result = tl.zeros((KEYS, WIDTH), tl.float32)
    value_result = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(0, time * GROUP, QUERIES):
        numbers = start + tl.arange(0, QUERIES)
        wanted = numbers < time * GROUP
        whole = wanted[:, None] & inside[None, :]
        pointers = _query_pointers(query, query_strides, row, kv_head, numbers, GROUP, WIDTH)
        q = tl.load(pointers, mask=whole, other=0.0)
        pointers = _query_pointers(output, output_strides, row, kv_head, numbers, GROUP, WIDTH)
        o = tl.load(pointers, mask=whole, other=0.0)
        pointers = _query_pointers(gradient, gradient_strides, row, kv_head, numbers, GROUP, WIDTH)
        outer = tl.load(pointers, mask=whole, other=0.0)
        inner = tl.sum(o.to(tl.float32) * outer.to(tl.float32), 1)
        place_of_total = (row * heads + kv_head * GROUP + numbers % GROUP) * time + numbers // GROUP
        # A query that is none weighs nothing: exp(-inf).
        logarithm = tl.load(total + place_of_total, mask=wanted, other=float("inf"))
        of_head = _query_slopes(slopes, kv_head, numbers, GROUP)
        at = numbers // GROUP
        scores, slope = _scored(q, k, at, other, exists, of_head, scale, soft_cap, window, PRECISION, UPCAST)
        weights = tl.exp(scores - logarithm[:, None])
        of_scores = weights * (_product(outer, tl.trans(v), PRECISION, UPCAST) - inner[:, None]) * slope
        value_result += _product(tl.trans(weights), outer, PRECISION, UPCAST)
        key_result += _product(tl.trans(of_scores), q, PRECISION, UPCAST)
    whole = exists[:, None] & inside[None, :]
    columns = tl.arange(0, WIDTH)[None, :]
    steps = other.to(tl.int64)[:, None]
    pointers = of_key + row * of_key_strides[0] + kv_head * of_key_strides[1] + steps * of_key_strides[2] + columns
    key_result = tl.where(right, key_result * scale, float("nan"))
    tl.store(pointers, key_result.to(of_key.dtype.element_ty), mask=whole)
    pointers = of_value + row * of_value_strides[0] + kv_head * of_value_strides[1]
    value_result = tl.where(right, value_result, float("nan"))
    pointers += steps * of_value_strides[2] + columns
    tl.store(pointers, value_result.to(of_value.dtype.element_ty), mask=whole)


def suffix_attention_triton(call: SuffixCall) -> tuple[Tensor, Tensor]:
    """softmax(scores) · values, laid out like the query, and the logarithm of the sum of exp(scores) in fp32."""
    output = torch.empty_like(call.query)
    total = torch.empty(call.query.shape[:3], dtype=torch.float32, device=call.query.device)
    if not total.numel():
        return output, total
    target = _in_heads(output)
    launch = _Launch(call)
    _suffix_attention_kernel[(launch.programs, launch.query_tiles)](
        launch.query,
        launch.keys,
        launch.values,
        target,
        total,
        *launch.numbers,
        *launch.strides,
        _strides(target),
        **launch.options,
    )
    if target is not output:
        output.copy_(target)
    return output, total


def suffix_attention_backward_triton(
    gradient: Tensor,  # (rows, heads, time, head_size), of the output, as is the next
    output: Tensor,
    total: Tensor,  # (rows, heads, time) fp32
    call: SuffixCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the suffix's query, key and value, each laid out like what it is the gradient of."""
    results = torch.empty_like(call.query), torch.empty_like(call.key), torch.empty_like(call.value)
    if not total.numel():
        return results
    targets = [_in_heads(x) for x in results]
    gradient, output = _in_heads(gradient), _in_heads(output)
    launch = _Launch(call)
    _suffix_attention_backward_kernel[(launch.programs, launch.query_tiles + launch.key_tiles)](
        launch.query,
        launch.keys,
        launch.values,
        output,
        gradient,
        total,
        *targets,
        *launch.numbers,
        *launch.strides,
        *(_strides(x) for x in (output, gradient, *targets)),
        **launch.options,
    )
    for result, target in zip(results, targets, strict=True):
        if target is not result:
            result.copy_(target)
    return results


def _in_heads(x: Tensor) -> Tensor:
    """The same with the elements of a head side by side, which they nearly always are."""
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


class _Launch:
    """What both kernels are launched with."""

    def __init__(self, call: SuffixCall) -> None:
        rows, heads, time, size = call.query.shape
        contexts, kv_heads, longest, _ = call.context_keys.shape
        group = heads // kv_heads
        width = max(16, triton.next_power_of_2(size))
        row_bytes = width * call.query.element_size()
        most = max(16, configs.SUFFIX_TILE_BYTES // row_bytes)
        queries = min(most, max(16, triton.next_power_of_2(time * group)))
        self.programs = rows * kv_heads
        self.query_tiles = triton.cdiv(time * group, queries)
        self.key_tiles = triton.cdiv(time, configs.SUFFIX_KEYS)
        self.query = _in_heads(call.query)
        # Without a middle its place is taken by the suffix, of which nothing is then read twice.
        middle_keys = call.key if call.middle_keys is None else call.middle_keys
        middle_values = call.value if call.middle_values is None else call.middle_values
        self.keys = tuple(_in_heads(x) for x in (call.context_keys, middle_keys, call.key))
        self.values = tuple(_in_heads(x) for x in (call.context_values, middle_values, call.value))
        middle_seen = None if call.middle_seen is None else call.middle_seen.contiguous()
        self.numbers = (
            (call.context_index.contiguous(), call.context_seen.contiguous(), middle_seen),
            None if call.slopes is None else call.slopes.float().contiguous(),
            contexts,
            kv_heads,
            longest,
            middle_keys.shape[2],
            time,
            size,
            call.scale,
            call.soft_cap,
            call.window,
        )
        self.strides = (_strides(self.query), tuple(map(_strides, self.keys)), tuple(map(_strides, self.values)))
        self.options: dict[str, Any] = {
            "GROUP": group,
            "QUERIES": queries,
            "KEYS": configs.SUFFIX_KEYS,
            "WIDTH": width,
            "PRECISION": "ieee",
            "UPCAST": interpreting(),
            "num_warps": 8 if row_bytes > configs.SUFFIX_HEAD_BYTES // 2 else 4,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
