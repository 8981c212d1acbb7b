"""Values that were found with an update in the model, as they are to be added without it.

With the update in it, a row's last edit layer puts out h + s, and the target is led to by δ on top of that. The model
without it puts out h, and has to be led to the same place: by s + δ, with the mean of s over the rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..models.runner import Runner
from ..search.search import Search, Solved
from ..updates.delta import Delta, LowRank
from .walk import Walk


def rebased(runner: Runner, search: Search, solved: Sequence[Solved], update: Delta) -> list[Solved]:
    """What a search found with `update` in the model, for the model without it, as the runner has it by now."""
    name = runner.weight_name(search.layer)
    added = update.updates.get(name)
    if solved and solved[0].trail is None:
        return [_shifted(each, added) for each in solved]
    moved = list(solved)
    weight = runner.weight(search.layer)
    for head in dict.fromkeys(each.head for each in solved):
        places = [i for i, each in enumerate(solved) if each.head == head]
        bare = [i for i in places if solved[i].bare is not None]
        some = [solved[i] for i in places] + [b for i in bare if (b := solved[i].bare) is not None]
        now = _walked(runner, search, head, some, weight, added)
        for i, each in zip(places, now, strict=False):
            moved[i] = each
        for i, each in zip(bare, now[len(places) :], strict=True):
            moved[i] = replace(moved[i], bare=each)
    return moved


def _shifted(solved: Solved, added: LowRank | None) -> Solved:
    """Of a single layer, which is entered by the same rows with its update and without."""
    if added is None:
        return solved
    rows = _added_at(solved.keys, added)
    return replace(
        solved,
        unprefixed_value=_plus(solved.unprefixed_value, -rows[0]),
        mean_value=_plus(solved.mean_value, -rows.mean(0)),
        value=replace(solved.value, delta=_plus(solved.value.delta, rows.mean(0))),
        bare=None if solved.bare is None else _shifted(solved.bare, added),
    )


def _walked(
    runner: Runner, search: Search, head: str | None, solved: Sequence[Solved], weight: Tensor, added: LowRank | None
) -> list[Solved]:
    """Of several layers, whose rows enter the first of them as before."""
    trails = [each.trail for each in solved if each.trail is not None]
    walk, start = Walk(runner, search.contexts_behind(head), trails), trails[0].first
    put_out: list[dict[int, Tensor]] = [{} for _ in trails]
    for layer in search.layers:
        walk.through(start, layer + 1, keep=layer == search.layer)
        start = layer + 1
        for own, out in zip(put_out, walk.put_out(), strict=True):
            own[layer] = out
    found = []
    for each, trail, own, keys in zip(solved, trails, put_out, walk.keys(), strict=True):
        wide = torch.promote_types(keys.dtype, torch.float32)
        was, now = each.keys.to(wide), keys.to(wide)
        rows = (now - was) @ weight.to(wide).T
        if added is not None:
            rows -= _added_at(was, added)
        shift = (trail.put_out[search.layer].to(wide) - own[search.layer].to(wide)).mean(0)
        found.append(
            replace(
                each,
                keys=keys,
                unprefixed_value=_plus(each.unprefixed_value, rows[0]),
                mean_value=_plus(each.mean_value, rows.mean(0)),
                value=replace(each.value, delta=_plus(each.value.delta, shift)),
                trail=replace(trail, put_out=own),
            )
        )
    return found


def _added_at(keys: Tensor, update: LowRank) -> Tensor:
    """(rows, d) what an update adds to the values at keys (rows, d_ff)."""
    left, right = update.left.to(keys.device), update.right.to(keys.device)
    return keys.to(left.dtype) @ right.T @ left.T


def _plus(tensor: Tensor, added: Tensor) -> Tensor:
    return (tensor.to(added.dtype) + added).to(tensor.dtype)
