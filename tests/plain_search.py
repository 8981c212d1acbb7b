"""The search for δ as a plain loop on the host: each edit's rules in Python, its optimiser that of torch."""

import math
from dataclasses import dataclass, replace

import torch

from rome_fast.models.runner import frozen_weights
from rome_fast.search.objective import Member, Objective, Shape
from rome_fast.search.values import Value, draft_rows


@dataclass
class Edit:
    delta: torch.Tensor
    adam: torch.optim.Adam
    v0_norm: float
    decay: float
    losses: list[float]
    held: int = 0
    drafted: int = 0
    led: float = 0.0
    over: bool = False


def fresh(delta, learning_rate):
    """Adam on one δ, at its beginning."""
    return torch.optim.Adam([delta], learning_rate)


def plain_search(runner, chunk, layer, settings):
    """The values of a chunk's edits, all of which are evaluated until the last of them is done."""
    wide = torch.promote_types(runner.dtype, torch.float32)
    edits = []
    for base in chunk.base_values.to(wide):
        delta, norm = torch.zeros_like(base), float(base.norm())
        edits.append(Edit(delta, fresh(delta, settings.learning_rate), norm, settings.weight_decay / norm**2, []))
    members, start = [], 0
    for number, rows in enumerate(chunk.rows):
        members.append(Member(number, rows, chunk.states, range(start, start + len(rows))))
        start += len(rows)
    most = settings.steps + (settings.extra_steps if settings.stop == "argmax" else 0)
    chosen = [draft_rows(rows, settings) for rows in chunk.rows]
    with frozen_weights(runner.model):
        if chosen[0]:
            drafts = [member.some(some) for member, some in zip(members, chosen, strict=True)]
            before = run(runner, drafts, layer, edits, settings, most - 1, settings.margin)
            for edit in edits:
                edit.drafted, edit.held, edit.over = len(edit.losses), 0, False
            members = [replace(member, before=known) for member, known in zip(members, before, strict=True)]
        run(runner, members, layer, edits, settings, most, 0 if chosen[0] else settings.margin)
    return [
        Value(e.delta if math.isfinite(e.losses[-1]) else 0 * e.delta, tuple(e.losses), e.drafted, e.led, finite)
        for e in edits
        for finite in [math.isfinite(e.losses[-1])]
    ]


def run(runner, members, layer, edits, settings, most, margin):
    objective = Objective(runner, layer, members, Shape.of(members), settings.kl_factor)
    while not all(edit.over for edit in edits):
        losses, led, gradient = objective.evaluate(torch.stack([edit.delta for edit in edits]))
        gradients = gradient()
        for edit, loss, share, g in zip(edits, losses, led.tolist(), gradients, strict=True):
            if edit.over:
                continue
            # In the dtype of the loss, as the rules that compare two of them see it.
            loss = float(loss + torch.tensor(edit.decay, dtype=loss.dtype) * edit.delta.norm())
            edit.losses.append(loss)
            edit.led, edit.held = share, edit.held + 1 if share == 1 else 0
            met = edit.held > margin if settings.stop == "argmax" else loss < settings.stop_loss
            if met or not math.isfinite(loss) or len(edit.losses) >= most:
                edit.over = True
                continue
            if settings.stop == "argmax" and len(edit.losses) == 6 and loss >= edit.losses[0]:
                edit.decay, edit.adam = 0.0, fresh(edit.delta, settings.learning_rate)
            norm = float(edit.delta.norm())
            edit.delta.grad = g + (edit.decay / norm * edit.delta if norm else 0)
            edit.adam.step()
            longest = settings.clamp * edit.v0_norm
            if float(edit.delta.norm()) > longest:
                edit.delta *= longest / edit.delta.norm()
    return objective.before.clone()
