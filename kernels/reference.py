"""Every op in plain torch: the definition, the oracle of faster backends and the fallback.

Arguments are taken as valid; the checks live in `ops.py`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_CHAIN_ROWS = 8192
_GATHERED_BYTES = 1 << 21


def second_moment_ref_(total: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """total += XᵀX over the rows of X where mask is true; at least the lower triangle is brought up to date.

    Products of at most `_CHAIN_ROWS` rows are taken in fp32 (fp64 for fp64 rows) and added to `total` in the dtype of
    `total`: a product of a few thousand rows loses little in fp32, a sum over millions of them needs fp64.
    """
    rows = x if mask is None else x[mask]
    wide = torch.promote_types(rows.dtype, torch.float32)
    for part in rows.split(_CHAIN_ROWS):
        part = part.to(wide)
        # Not addmm_, which would go on summing in `total`: that has twice the error where `total` is fp32.
        total.add_(part.T @ part)
    return total


def mirror_lower_ref_(total: Tensor) -> Tensor:
    """Copy the lower triangle of a square matrix onto its upper one."""
    lower = total.tril(-1)
    return total.tril_().add_(lower.T)


def solve_dtype(keys: Tensor, factor: Tensor | None, inverse: Tensor | None) -> torch.dtype:
    """What a solve computes in: the dtype of the matrix given, of the keys for C = I."""
    matrix = factor if factor is not None else inverse
    return keys.dtype if matrix is None else matrix.dtype


def prefixed_solve_ref(
    keys: Tensor, groups: Tensor, count: int, factor: Tensor | None, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k̄_g = mean of the keys of group g,  U = K̄ C⁻¹ with C = L Lᵀ,  G = U K̄ᵀ (its diagonal: u_g · k̄_g)."""
    dtype = solve_dtype(keys, factor, inverse)
    mean = torch.zeros(count, keys.shape[1], dtype=dtype, device=keys.device)
    mean.index_add_(0, groups, keys.to(dtype))
    mean /= torch.bincount(groups, minlength=count).to(dtype).unsqueeze(1)
    return mean, *solve_mean_ref(mean, factor, inverse)


def solve_mean_ref(mean: Tensor, factor: Tensor | None, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """U and G of `prefixed_solve_ref` for given means; with both matrices, one step of refinement of K̄ C⁻¹."""
    if inverse is not None:
        solved = mean @ inverse
        if factor is not None:
            solved += (mean - solved @ factor @ factor.T) @ inverse
        return solved, solved @ mean.T
    if factor is None:
        return mean.clone(), mean @ mean.T
    # Two triangular solves beat cholesky_solve for many right-hand sides.
    half = torch.linalg.solve_triangular(factor, mean.T, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True).T, half.T @ half


def solve_residual_ref(mean: Tensor, solved: Tensor, factor: Tensor) -> Tensor:
    """‖u C − k̄‖ / ‖k̄‖ for every row."""
    rest = solved @ factor @ factor.T - mean
    return torch.linalg.vector_norm(rest, dim=1) / torch.linalg.vector_norm(mean, dim=1)


def rank_update_ref_(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W += left @ right, added in fp32 (fp64 for fp64 weights) and rounded to the dtype of W once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == wide:
        # One pass; addcmul_ is the quicker of the two (12 and 14 ms for 4096 x 11008 in fp32 on a Zen 3 core).
        add = weight.addcmul_ if left.shape[1] == 1 else weight.addmm_
        return add(left.to(wide), right.to(wide))
    return weight.copy_(weight.to(wide) + left.to(wide) @ right.to(wide))


def low_rank_apply_ref_(y: Tensor, x: Tensor, left: Tensor, right: Tensor, ids: Tensor) -> Tensor:
    """y[row] += left[ids[row]] · (right[ids[row]] · x[row]); rows whose id is negative are left alone."""
    rows = (ids >= 0).nonzero().squeeze(1)
    chosen = ids[rows]
    wide = torch.promote_types(y.dtype, torch.float32)
    scale = (right[chosen].to(wide) * x[rows].to(wide)).sum(-1, keepdim=True)
    y[rows] = (y[rows].to(wide) + left[chosen].to(wide) * scale).to(y.dtype)
    return y


class SuffixCall(NamedTuple):
    """The arguments of `suffix_attention`, in the order of the operator's schema."""

    query: Tensor  # (rows, heads, time, head_size)
    key: Tensor  # (rows, kv_heads, time, head_size), as is the next
    value: Tensor
    context_keys: Tensor  # (contexts, kv_heads, longest, head_size), as is the next
    context_values: Tensor
    context_index: Tensor  # (rows,) int64
    context_seen: Tensor  # (rows,) int64
    middle_keys: Tensor | None  # (rows, kv_heads, middle, head_size), as is the next
    middle_values: Tensor | None
    middle_seen: Tensor | None  # (rows,) int64
    scale: float
    soft_cap: float | None
    window: int | None
    slopes: Tensor | None  # (heads,)


class _Attended(NamedTuple):
    """What both passes of `suffix_attention` make of their arguments, in fp32 (fp64 for fp64 queries).

    The queries of the heads that share a key head are one matrix, so that keys are not repeated for each of them.
    """

    query: Tensor  # (rows, kv_heads, group · time, head_size), scaled
    keys: Tensor  # (rows, kv_heads, longest + middle + time, head_size); zero where nothing is seen
    values: Tensor
    weights: Tensor  # (rows, heads, time, longest + middle + time): softmax of the scores
    slope: Tensor | None  # like them: derivative of the soft cap


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(rows, heads, time, size) as (rows, kv_heads, group · time, size)."""
    rows, heads, time, size = x.shape
    return x.reshape(rows, kv_heads, heads // kv_heads * time, size)


def _attended(call: SuffixCall) -> _Attended:
    rows, heads, time, _ = call.query.shape
    kv_heads = call.key.shape[1]
    wide = torch.promote_types(call.query.dtype, torch.float32)
    device = call.query.device

    def upto(size: int) -> Tensor:
        return torch.arange(size, device=device).expand(rows, -1)

    seen = call.context_seen.unsqueeze(1)
    own = seen if call.middle_seen is None else seen + call.middle_seen.unsqueeze(1)
    position = [upto(call.context_keys.shape[2])]
    there = [position[0] < seen]
    if call.middle_keys is not None:
        position.append(seen + upto(call.middle_keys.shape[2]))
        there.append(position[1] < own)
    at = own + upto(time)
    # (rows, 1, time, all): of a key, that of its query, and whether the one sees the other.
    of_key, of_query = torch.cat([*position, at], 1)[:, None, None, :], at[:, None, :, None]
    exists = torch.cat([*there, torch.ones_like(at, dtype=torch.bool)], 1)
    sees = exists[:, None, None, :] & (of_key <= of_query)
    if call.window is not None:
        sees &= of_key > of_query - call.window

    row, absent = (~exists).nonzero(as_tuple=True)

    def joined(context: Tensor, middle: Tensor | None, suffix: Tensor) -> Tensor:
        parts = [context[call.context_index], *([] if middle is None else [middle]), suffix]
        together = torch.cat(parts, 2).to(wide)
        # A weight of zero would not take away a NaN. (masked_fill_ takes longer than all of the above.)
        together.transpose(1, 2)[row, absent] = 0
        return together

    query = _grouped(call.query, kv_heads).to(wide) * call.scale
    keys = joined(call.context_keys, call.middle_keys, call.key)
    scores = (query @ keys.mT).view(rows, heads, time, keys.shape[2])
    slope = None
    if call.soft_cap is not None:
        scores = torch.tanh(scores / call.soft_cap)
        slope = 1 - scores**2
        scores = scores * call.soft_cap
    if call.slopes is not None:
        scores += call.slopes.to(wide)[:, None, None] * (of_key - of_query)
    scores.masked_fill_(~sees, -torch.inf)
    values = joined(call.context_values, call.middle_values, call.value)
    return _Attended(query, keys, values, scores.softmax(3), slope)


def _in_range(call: SuffixCall) -> tuple[SuffixCall, Tensor]:
    """The call with nothing seen by rows whose index or numbers are out of range; (rows, 1, 1, 1) which these are."""
    index, seen, own = call.context_index, call.context_seen, call.middle_seen
    contexts, _, longest, _ = call.context_keys.shape
    right = (index >= 0) & (index < contexts) & (seen >= 0) & (seen <= longest)
    if own is not None and call.middle_keys is not None:
        right &= (own >= 0) & (own <= call.middle_keys.shape[2])
        own = own * right
    call = call._replace(context_index=index * right, context_seen=seen * right, middle_seen=own)
    return call, ~right[:, None, None, None]


def _parts(call: SuffixCall) -> Iterator[tuple[slice, SuffixCall]]:
    """The call in parts of its rows, so that a CPU finds the keys that it has gathered in its cache."""
    rows, kv_heads, time, head_size = call.key.shape
    step = max(rows, 1)
    if call.query.device.type == "cpu":
        middle = 0 if call.middle_keys is None else call.middle_keys.shape[2]
        row_bytes = kv_heads * (call.context_keys.shape[2] + middle + time) * head_size * 4
        step = max(1, _GATHERED_BYTES // max(1, row_bytes))
    whole = call._asdict()
    of_rows = ("query", "key", "value", "context_index", "context_seen", "middle_keys", "middle_values", "middle_seen")
    for start in range(0, rows, step):
        part = slice(start, start + step)
        mine = {name: whole[name][part] for name in of_rows if whole[name] is not None}
        yield part, call._replace(**mine)


def suffix_attention_ref(call: SuffixCall) -> Tensor:
    """softmax(scores) · values, laid out in memory like the query.

    A row whose index or numbers are out of range is NaN: where these are not looked at before, it must not pass.

    Ruled out on a CPU: sdpa of the joined keys, whose backward pass takes several times as long in bf16, and whose
    both passes take no less in fp32; one product of all rows of a context with its keys where they lie, since to sort
    the queries for it and back takes as long as gathering the keys.
    """
    call, wrong = _in_range(call)
    output = torch.empty_like(call.query)
    for rows, part in _parts(call):
        of = _attended(part)
        output[rows] = (_grouped(of.weights, of.keys.shape[1]) @ of.values).view(part.query.shape)
    return output.masked_fill_(wrong, torch.nan)


def suffix_attention_backward_ref(gradient: Tensor, call: SuffixCall) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the suffix's query, key and value, for that of the output; keys are gathered and scored anew."""
    call, wrong = _in_range(call)
    of_query, of_key, of_value = (torch.empty_like(x) for x in call[:3])
    kv_heads, time = call.key.shape[1:3]
    for rows, part in _parts(call):
        of = _attended(part)
        outer = _grouped(gradient[rows], kv_heads).to(of.query.dtype)
        of_weights = (outer @ of.values.mT).view(of.weights.shape)
        of_scores = of.weights * (of_weights - (of.weights * of_weights).sum(3, keepdim=True))
        if of.slope is not None:
            of_scores *= of.slope
        of_scores, weights = _grouped(of_scores, kv_heads), _grouped(of.weights, kv_heads)
        past = of.keys.shape[2] - time
        of_query[rows] = (of_scores @ of.keys).mul_(call.scale).view(part.query.shape)
        of_key[rows] = of_scores[..., past:].mT @ of.query
        of_value[rows] = weights[..., past:].mT @ outer
    for result in (of_query, of_key, of_value):
        result.masked_fill_(wrong, torch.nan)
    return of_query, of_key, of_value


def add_rms_norm_ref(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + update, empty for none, and weight · h / √(mean(h²) + eps), rounded where transformers' layers round."""
    hidden = x if update is None else x + update
    wide = _wide(hidden)
    normed = (wide * _inverse_rms(wide, eps)).to(x.dtype).mul_(weight)
    return x.new_empty(0) if update is None else hidden, normed


def add_rms_norm_backward_ref(
    gradient: Tensor, residual: Tensor | None, hidden: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Gradient of h: residual + r g − r³ h mean(g h), with g = gradient · weight and r = 1/√(mean(h²) + eps)."""
    result = _norm_gradient(_wide(gradient) * _wide(weight), _wide(hidden), eps)
    if residual is not None:
        result += residual
    return result.to(hidden.dtype)


def _norm_gradient(gradient: Tensor, x: Tensor, eps: float) -> Tensor:
    """Of x, for that of x / √(mean(x²) + eps); both in a wide dtype."""
    scale = _inverse_rms(x, eps)
    unit = x * scale
    inner = torch.linalg.vecdot(gradient, unit).unsqueeze(-1) / x.shape[-1]
    return (gradient - unit.mul_(inner)).mul_(scale)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + eps)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate_heads_ref(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y = cos · x + sin · (−x₂, x₁), x₁ and x₂ the halves of what is rotated of a head, which is normed before."""

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            _, x = add_rms_norm_ref(x, None, weight, eps)
        return _turn(x, cos, sin)

    return rotated(query, query_weight), rotated(key, key_weight)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (rows, time, heads, size) rotated; backward, with the halves of `sin` exchanged and negated."""
    rotated = cos.shape[-1]
    half = rotated // 2
    wide = _wide(x)
    cos, sin = _wide(cos).unsqueeze(-2), _wide(sin).unsqueeze(-2)
    one, two = wide[..., :half], wide[..., half:rotated]
    result = x.new_empty(x.shape)
    result[..., :half] = (one * cos[..., :half]).addcmul_(two, sin[..., :half], value=-1)
    result[..., half:rotated] = (two * cos[..., half:]).addcmul_(one, sin[..., half:])
    result[..., rotated:] = x[..., rotated:]
    return result


def rotate_heads_backward_ref(
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
    """Gradients of query and key, which are looked at only where there are weights."""
    half = cos.shape[-1] // 2
    back = torch.cat([-sin[..., half:], -sin[..., :half]], -1)

    def gradient(outer: Tensor, x: Tensor | None, weight: Tensor | None) -> Tensor:
        if x is None or weight is None:
            return _turn(outer, cos, back)
        return _norm_gradient(_turn(_wide(outer), cos, back) * _wide(weight), _wide(x), eps).to(x.dtype)

    return gradient(of_query, query, query_weight), gradient(of_key, key, key_weight)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}
_ACTIVATION_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward, threshold=0),
}


def gated_activation_ref(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, the activation rounded to their dtype in between as layers of transformers do."""
    return ACTIVATIONS[activation](gate).mul_(up)


def gated_activation_backward_ref(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """gradient · up · act′(gate) and gradient · act(gate)."""
    of_gate = _ACTIVATION_GRADIENTS[activation](_wide(gradient) * up, _wide(gate))
    return of_gate.to(gate.dtype), ACTIVATIONS[activation](gate).mul_(gradient)


def target_losses_ref_(
    before: Tensor,
    unknown: Tensor,
    logits: Tensor,
    label: Tensor,
    share: Tensor,
    kl_factor: float,
    scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of rows of logits (n, size): −share · log p(label), and behind these kl_factor · KL(p ‖ before).

    The rows behind have log-probabilities `before` (n − targets, size) that they are compared with; where these are
    `unknown` they become those of now. Returns the loss of every row, for every target whether it is the most probable
    token or of share 0 (1 or 0), and, if `wanted`, the gradient of scale · sum of the losses at the logits.
    """
    count, label = len(label), label.unsqueeze(1)
    # Unlike log_softmax, logsumexp adds in pairs, which over a vocabulary is several times as exact.
    total = logits.logsumexp(1, keepdim=True)
    nll = (total[:count] - logits[:count].gather(1, label)).squeeze(1) * share
    right = (logits[:count].argmax(1) == label.squeeze(1)) | (share == 0)
    after = logits[count:] - total[count:]
    before.copy_(torch.where(unknown.unsqueeze(1), after, before))
    unknown.zero_()
    gain, weights = after - before, after.exp()
    divergence = (weights * gain).sum(1)
    gradient = logits.new_empty(0)
    if wanted:
        gradient = torch.empty_like(logits)
        weighed = share.unsqueeze(1) * scale
        torch.sub(logits[:count], total[:count], out=gradient[:count]).exp_().mul_(weighed)
        gradient[:count].scatter_add_(1, label, -weighed)
        torch.mul(weights, gain - divergence.unsqueeze(1), out=gradient[count:]).mul_(kl_factor * scale)
    return torch.cat([nll, divergence * kl_factor]), right.to(share.dtype), gradient


def stop_rule_ref_(
    ended: Tensor,
    decay: Tensor,
    steps: Tensor,
    losses: Tensor,
    led: Tensor,
    evaluations: Tensor,
    held: Tensor,
    done: Tensor,
    judged: Tensor,
    delta: Tensor,
    edits: Tensor,
    loss: Tensor,
    share: Tensor,
    stop_loss: float | None,
    most: int,
    margin: int,
    moved_by: int,
) -> None:
    """Whether each of some edits (slots,) has `ended`, by its loss without decay and the share of rows that lead.

    The others are rows of all edits, see `rome_fast.search.optimiser.State`. An edit that is done, or judged and not
    moved since, stays as it is. Without `stop_loss` the target has to lead in every row `margin` times after the first.
    """
    over, own_decay, count, in_a_row = done[edits], decay[edits], evaluations[edits], held[edits]
    loss = loss + own_decay * delta[edits].norm(dim=1)
    turn = ~(over | judged[edits])
    # Of an edit whose turn it is not, behind what is its history.
    losses[edits, torch.where(turn, count, losses.shape[1] - 1)] = loss
    count = count + turn
    in_a_row = torch.where(turn, (in_a_row + 1) * (share == 1), in_a_row)
    going = in_a_row <= margin if stop_loss is None else loss.double() >= stop_loss
    going = going & (loss.abs() < torch.inf) & (count < most)
    over = over | (turn & ~going)
    evaluations[edits], held[edits], done[edits] = count, in_a_row, over
    led[edits] = torch.where(turn, share, led[edits])
    judged.index_fill_(0, edits, True)
    ended.copy_(over)
    if stop_loss is None:
        moves = ~(turn & going & (count == moved_by) & (loss >= losses[edits, 0]))
        decay[edits] = own_decay * moves
        steps[edits] = steps[edits] * moves.unsqueeze(1)


def clamped_adam_ref_(
    delta: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    judged: Tensor,
    done: Tensor,
    decay: Tensor,
    norms: Tensor,
    edits: Tensor,
    gradient: Tensor,
    learning_rate: float,
    clamp: float,
    tiny: float,
) -> None:
    """One step of Adam (Kingma & Ba 2015) of some edits (slots,) that are judged and not done, within clamp · norm.

    `gradient` (slots, d) is that of the loss without decay · ‖δ‖, whose own has no value at zero; autograd, which the
    released code uses, takes it as zero, and so does `tiny` in the place of the norm.
    """
    was_judged, over = judged[edits], done[edits]
    old, count = delta[edits], steps[edits]
    pull = decay[edits] / old.norm(dim=1).clamp_min(tiny)
    gradient = torch.addcmul(gradient, pull.unsqueeze(1), old)
    begun = (count > 0).to(old.dtype)  # otherwise its moments are those of nothing, whatever is there
    one, two = first[edits], second[edits]
    new_one = (one * begun).lerp(gradient, 0.1)
    new_two = (two * (0.999 * begun)).addcmul(gradient, gradient, value=0.001)
    later = count + 1
    scale = new_two.sqrt() / (1 - 0.999**later).sqrt().to(old.dtype) + 1e-8
    moved = old - (learning_rate / (1 - 0.9**later)).to(old.dtype) * new_one / scale
    limits = clamp * norms[edits] / moved.norm(dim=1).clamp_min(tiny)
    moved = moved * limits.clamp_max(1).unsqueeze(1)
    turn = (was_judged & ~over).unsqueeze(1)
    delta[edits] = torch.where(turn, moved, old)
    first[edits] = torch.where(turn, new_one, one)
    second[edits] = torch.where(turn, new_two, two)
    steps[edits] = torch.where(turn, later, count)
    judged[edits] = was_judged & over
