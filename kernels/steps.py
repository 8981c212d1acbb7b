"""What a step of the search does besides the model, on a GPU: losses, stop rule and optimiser, a launch each.

Written in torch they are some hundred and fifty kernels, each of which takes the host longer to launch than the GPU to
run. Every program has one row, which it reads several times while the cache holds it: of the logits, or of the state of
one edit.
"""

import triton
import triton.language as tl
from torch import Tensor, empty_like

from . import configs


@triton.jit(do_not_specialize=["targets"])
def _target_losses_kernel(
    before,  # (rows - targets, size), contiguous as are all
    unknown,  # (rows - targets,) bool
    logits,  # (rows, size)
    label,  # (targets,) int64
    share,  # (targets,)
    values,  # (rows,)
    right,  # (targets,)
    gradient,  # (rows, size), or None
    targets,
    size,
    kl_factor,
    scale,
    BLOCK: tl.constexpr,
):
    """Loss of one row, and the gradient of its logits."""
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * size
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), size, tl.int32)
    for start in range(0, size, BLOCK):
        at = start + columns
        x = tl.load(own + at, mask=at < size, other=float("-inf"))
        place = tl.where(x > largest, at, place)
        largest = tl.where(x > largest, x, largest)
    top = tl.max(largest, 0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + columns
        sums += tl.exp(tl.load(own + at, mask=at < size, other=float("-inf")) - top)
    total = top + tl.log(tl.sum(sums, 0))
    if row < targets:
        wanted = tl.load(label + row)
        part = tl.load(share + row)
        # Of several that are largest, the first one.
        best = tl.min(tl.where(largest == top, place, size), 0)
        tl.store(values + row, (total - tl.load(own + wanted)) * part)
        tl.store(right + row, tl.where((best == wanted) | (part == 0), 1.0, 0.0))
        if gradient is not None:
            for start in range(0, size, BLOCK):
                at = start + columns
                x = tl.load(own + at, mask=at < size, other=float("-inf"))
                g = tl.exp(x - total) - tl.where(at == wanted, 1.0, 0.0)
                tl.store(gradient + row * size + at, g * (part * scale), mask=at < size)
    else:
        slot = row - targets
        fresh = tl.load(unknown + slot).to(tl.int32) != 0
        # How many log-probabilities are to be written, and how many to be read.
        new = tl.where(fresh, size, 0)
        kept = tl.where(fresh, 0, size)
        known = before + slot * size
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            at = start + columns
            after = tl.load(own + at, mask=at < size, other=0.0) - total
            old = tl.load(known + at, mask=at < kept, other=0.0)
            tl.store(known + at, after, mask=at < new)
            sums += tl.where(at < kept, tl.exp(after) * (after - old), 0.0)
        # Of logits that are no numbers it is none, also where nothing is compared with them yet.
        divergence = tl.sum(sums, 0) + (total - total)
        tl.store(values + row, divergence * kl_factor)
        tl.store(unknown + slot, False)
        if gradient is not None:
            for start in range(0, size, BLOCK):
                at = start + columns
                after = tl.load(own + at, mask=at < size, other=0.0) - total
                old = tl.load(known + at, mask=at < kept, other=0.0)
                g = tl.exp(after) * (tl.where(at < kept, after - old, 0.0) - divergence)
                tl.store(gradient + row * size + at, g * (kl_factor * scale), mask=at < size)


@triton.jit
def _norm(x, d, BLOCK: tl.constexpr):
    """‖x‖ of d numbers."""
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        part = tl.load(x + start + columns, mask=start + columns < d, other=0.0)
        squares += part * part
    return tl.sqrt_rn(tl.sum(squares, 0))


@triton.jit(do_not_specialize=["room", "most", "margin", "moved_by"])
def _stop_rule_kernel(
    ended,  # (slots,) bool
    decay,  # (edits,), as are those down to `judged`
    steps,  # (edits, 1) fp64
    losses,  # (edits, room)
    led,
    evaluations,  # int64
    held,  # int64
    done,  # bool
    judged,  # bool
    delta,  # (edits, d), contiguous as are all
    edits,  # (slots,) int64
    loss,  # (slots,)
    share,  # (slots,)
    room,
    most,
    margin,
    moved_by,
    d,
    STOP_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One slot."""
    slot = tl.program_id(0)
    edit = tl.load(edits + slot)
    norm = _norm(delta + edit * d, d, BLOCK)
    over = tl.load(done + edit).to(tl.int32) != 0
    turn = tl.load(done + edit).to(tl.int32) + tl.load(judged + edit).to(tl.int32) == 0
    own_decay = tl.load(decay + edit)
    value = tl.load(loss + slot) + own_decay * norm
    count = tl.load(evaluations + edit)
    leads = tl.load(share + slot)
    in_a_row = tl.load(held + edit)
    tl.debug_barrier()  # every thread has read what one of them will change
    tl.store(losses + edit * room + count, value, mask=turn)
    count += turn.to(tl.int64)
    in_a_row = tl.where(turn, tl.where(leads == 1, in_a_row + 1, 0), in_a_row)
    going = in_a_row <= margin if STOP_LOSS is None else value.to(tl.float64) >= STOP_LOSS
    going = going & (tl.abs(value) < float("inf")) & (count < most)
    over = over | (turn & (going == 0))
    tl.store(ended + slot, over)
    tl.store(evaluations + edit, count)
    tl.store(held + edit, in_a_row)
    tl.store(done + edit, over)
    tl.store(led + edit, leads, mask=turn)
    tl.store(judged + edit, True)
    if STOP_LOSS is None:
        stays = turn & going & (count == moved_by)
        stays = stays & (value >= tl.load(losses + edit * room, mask=stays, other=0.0))
        tl.store(decay + edit, 0.0, mask=stays)
        tl.store(steps + edit, 0.0, mask=stays)


@triton.jit
def _clamped_adam_kernel(
    delta,  # (edits, d), contiguous as are all
    first,  # (edits, d)
    second,  # (edits, d)
    steps,  # (edits, 1) fp64
    judged,  # (edits,) bool
    done,  # (edits,) bool
    decay,  # (edits,)
    norms,  # (edits,)
    edits,  # (slots,) int64
    gradient,  # (slots, d)
    learning_rate,
    clamp,
    d,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One slot."""
    slot = tl.program_id(0).to(tl.int64)
    edit = tl.load(edits + slot)
    columns = tl.arange(0, BLOCK)
    over = tl.load(done + edit).to(tl.int32)
    was_judged = tl.load(judged + edit).to(tl.int32)
    turn = was_judged > over
    own = delta + edit * d
    pull = tl.load(decay + edit) / tl.maximum(_norm(own, d, BLOCK), TINY)
    count = tl.load(steps + edit)
    begun = tl.where(turn & (count > 0), d, 0)
    count += 1
    # log 0.9 and log 0.999: in fp32, 1 - 0.999 would be wrong by 5e-5 of itself.
    rate = (learning_rate / (1 - tl.exp(count * -0.10536051565782628))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(count * -0.0010005003335835344)).to(tl.float32)
    stop = tl.where(turn, d, 0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, stop, BLOCK):
        at = start + columns
        inside = at < d
        x = tl.load(own + at, mask=inside, other=0.0)
        g = tl.load(gradient + slot * d + at, mask=inside, other=0.0) + pull * x
        # Otherwise its moments are those of nothing, whatever is there.
        one = tl.load(first + edit * d + at, mask=at < begun, other=0.0)
        two = tl.load(second + edit * d + at, mask=at < begun, other=0.0)
        one += 0.1 * (g - one)
        two = 0.999 * two + 0.001 * g * g
        x -= rate * one / (tl.sqrt_rn(two) / root + 1e-8)
        tl.store(own + at, x, mask=inside)
        tl.store(first + edit * d + at, one, mask=inside)
        tl.store(second + edit * d + at, two, mask=inside)
        squares += x * x
    limit = clamp * tl.load(norms + edit) / tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), TINY)
    tl.debug_barrier()
    for start in range(0, tl.where(limit < 1, stop, 0), BLOCK):
        at = start + columns
        x = tl.load(own + at, mask=at < d, other=0.0)
        tl.store(own + at, x * limit, mask=at < d)
    tl.store(steps + edit, count, mask=turn)
    tl.store(judged + edit, (was_judged & over) != 0)


def target_losses_triton_(
    before: Tensor,
    unknown: Tensor,
    logits: Tensor,
    label: Tensor,
    share: Tensor,
    kl_factor: float,
    scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.target_losses_ref_`."""
    rows, size = logits.shape
    logits = logits.contiguous()
    values, right = logits.new_empty(rows), empty_like(share)
    gradient = empty_like(logits) if wanted else logits.new_empty(0)
    if rows:
        _target_losses_kernel[(rows,)](
            before,
            unknown,
            logits,
            label,
            share,
            values,
            right,
            gradient if wanted else None,
            len(label),
            size,
            kl_factor,
            scale,
            BLOCK=min(configs.LOGITS_BLOCK, triton.next_power_of_2(size)),
            num_warps=8,
            enable_fp_fusion=True,
        )
    return values, right, gradient


def stop_rule_triton_(
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
    """See `reference.stop_rule_ref_`."""
    d = delta.shape[1]
    _stop_rule_kernel[(len(edits),)](
        ended,
        decay,
        steps,
        losses,
        led,
        evaluations,
        held,
        done,
        judged,
        delta,
        edits,
        loss,
        share,
        losses.shape[1],
        most,
        margin,
        moved_by,
        d,
        STOP_LOSS=stop_loss,
        **_row_options(d),
    )


def clamped_adam_triton_(
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
    """See `reference.clamped_adam_ref_`."""
    d = delta.shape[1]
    _clamped_adam_kernel[(len(edits),)](
        delta,
        first,
        second,
        steps,
        judged,
        done,
        decay,
        norms,
        edits,
        gradient.contiguous(),
        learning_rate,
        clamp,
        d,
        TINY=tiny,
        **_row_options(d),
    )


def _row_options(d: int) -> dict[str, int]:
    return {
        "BLOCK": min(configs.STATE_BLOCK, triton.next_power_of_2(d)),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }
