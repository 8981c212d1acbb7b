"""Rows of many edits on their way through the edit layers, while these are being edited.

What enters a layer is kept until its update is known, which is then added to what the layer has put out: one pass over
the layers for all edits, and no weight is changed. That is exact where what a down-projection puts out arrives in its
layer's output as it is (`Verified.adds_unchanged`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.past import ContextPast, Contexts, Recorder, attention_mask
from ..models.runner import Runner, causal_mask
from ..search.keys import Trail
from ..updates.delta import LowRank

# Positions that go through a layer at a time.
_POSITIONS = {"cuda": 65_536, "cpu": 4096}


@dataclass
class _Part:
    """Rows of some edits that go through a layer together."""

    edits: list[int]  # whose they are
    counts: list[int]  # how many rows each of them has
    hidden: Tensor  # (rows, time, d)
    positions: Tensor | None  # (rows, time)
    context: Tensor  # (rows,)
    mask: Tensor | None
    at: Tensor  # (rows,)
    keys: Tensor | None = None  # (rows, time, d_ff) of the layer passed last

    @classmethod
    def of(cls, runner: Runner, contexts: Contexts | None, edits: list[int], trails: Sequence[Trail]) -> "_Part":
        time = max(trail.entering.shape[1] for trail in trails)

        def padded(tensor: Tensor) -> Tensor:
            more = tensor.new_zeros(len(tensor), time - tensor.shape[1], *tensor.shape[2:])
            return torch.cat([tensor, more], 1)

        hidden = torch.cat([padded(trail.entering) for trail in trails])
        context, shared, at = (
            torch.cat([getattr(trail, name) for trail in trails]) for name in ("context", "shared", "at")
        )
        counts = [len(trail.at) for trail in trails]
        if contexts is None:
            return cls(edits, counts, hidden, None, context, None, at)
        # Those behind the end of a row are padding, which nothing attends to.
        positions = shared.unsqueeze(1) + torch.arange(time, device=runner.device)
        longest = contexts.entering.shape[1]
        seen = torch.arange(longest, device=runner.device) < shared.unsqueeze(1)
        return cls(edits, counts, hidden, positions, context, attention_mask(seen, time, runner.dtype), at)

    @property
    def _first(self) -> Tensor:
        """(edits,) place of the first row of each edit."""
        return torch.tensor([0, *self.counts[:-1]], device=self.at.device).cumsum(0)

    @property
    def first_rows_are_whole(self) -> bool:
        """Whether the first row of every edit holds all its tokens, and none of a context's stand for some."""
        return self.positions is None or not bool(self.positions[self._first, 0].any())

    def first_rows(self, *, alone: bool) -> "_Part":
        """The first row of each edit; `alone` says that they need no context, see `first_rows_are_whole`."""
        first, ones = self._first, [1] * len(self.counts)
        context, at = self.context[first], self.at[first]
        if alone or self.positions is None or self.mask is None:
            return _Part(self.edits, ones, self.hidden[first, : int(at.max()) + 1], None, context, None, at)
        return _Part(self.edits, ones, self.hidden[first], self.positions[first], context, self.mask[first], at)

    @property
    def subjects(self) -> tuple[Tensor, Tensor]:
        """Index of the subjects' last tokens."""
        return torch.arange(len(self.at), device=self.at.device), self.at


class Walk:
    """Some edits' rows, which see the same contexts and take the same updates."""

    def __init__(self, runner: Runner, contexts: Contexts | None, trails: Sequence[Trail]) -> None:
        if {trail.first for trail in trails} != {trails[0].first if contexts is None else contexts.layer}:
            raise ValueError("contexts and rows enter different layers")
        self.runner, self.contexts, self.count = runner, contexts, len(trails)
        self._entering = None if contexts is None else contexts.entering  # the contexts' hidden states
        self._context_keys: Tensor | None = None
        self._parts = list(_parts(runner, contexts, trails))

    @torch.no_grad()
    def through(self, start: int, stop: int, *, keep: bool = False) -> None:
        """Run layers start .. stop - 1; with `keep`, hold on to the keys of the last of them, for `keys` and `add`."""
        for layer in range(start, stop):
            kept = keep and layer == stop - 1
            past = None
            if self.contexts is not None and self._entering is not None:
                recorder = Recorder()
                with self._keys_of(layer, kept) as keys:
                    self._entering = self._run_contexts(self._entering, layer, layer + 1, recorder)
                self._context_keys = keys[0] if kept else None
                past = replace(self.contexts, recorded=recorder)
            for part in self._parts:
                with self._keys_of(layer, kept) as keys:
                    part.hidden = self._run(part, layer, layer + 1, past)
                part.keys = keys[0] if kept else None

    def keys(self) -> list[Tensor]:
        """(rows, d_ff) of every edit: keys at the subject's last token, of the layer passed last."""
        return self._of_edits([part.keys[part.subjects] for part in self._parts if part.keys is not None])

    def put_out(self) -> list[Tensor]:
        """(rows, d) of every edit: output of the layer passed last, at the subject's last token."""
        return self._of_edits([part.hidden[part.subjects] for part in self._parts])

    @torch.no_grad()
    def add(self, update: LowRank) -> None:
        """Go on as if the layer passed last had this update in its weight."""
        if self._entering is not None and self._context_keys is not None:
            self._entering = _added(self._entering, self._context_keys, update)
            self._context_keys = None
        for part in self._parts:
            if part.keys is not None:
                part.hidden, part.keys = _added(part.hidden, part.keys, update), None

    def ahead(self, start: int, stop: int) -> list[Tensor]:
        """(1, d) of every edit: its first row behind layers start .. stop - 1 as these are now."""
        walk = copy(self)
        alone = all(part.first_rows_are_whole for part in self._parts)
        walk._parts = [part.first_rows(alone=alone) for part in self._parts]
        if alone:
            walk.contexts = walk._entering = None
        walk.through(start, stop)
        return walk.put_out()

    def _of_edits(self, found: Sequence[Tensor]) -> list[Tensor]:
        rows = {
            edit: own
            for part, tensor in zip(self._parts, found, strict=True)
            for edit, own in zip(part.edits, tensor.split(part.counts), strict=True)
        }
        return [rows[i] for i in range(self.count)]

    def _run(self, part: _Part, start: int, stop: int, contexts: Contexts | None) -> Tensor:
        past = None if contexts is None else ContextPast(contexts, part.context)
        return self.runner.run(part.hidden, start, stop, positions=part.positions, mask=part.mask, past=past)

    def _run_contexts(self, hidden: Tensor, start: int, stop: int, recorder: Recorder) -> Tensor:
        mask = causal_mask(len(hidden), hidden.shape[1], self.runner.dtype, self.runner.device)
        return self.runner.run(hidden, start, stop, mask=mask, past=recorder)

    @contextmanager
    def _keys_of(self, layer: int, kept: bool) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []
        if not kept:
            yield seen
            return

        def see(keys: Tensor, _values: Tensor) -> None:
            seen.append(keys)

        with self.runner.watching(layer, see):
            yield seen


def _parts(runner: Runner, contexts: Contexts | None, trails: Sequence[Trail]) -> Iterator[_Part]:
    """The rows in parts of edits of like length."""
    most = _POSITIONS.get(runner.device.type, _POSITIONS["cpu"])
    edits: list[int] = []
    rows = 0
    for i in sorted(range(len(trails)), key=lambda i: trails[i].entering.shape[1]):
        count, time = trails[i].entering.shape[:2]
        if edits and (rows + count) * time > most:
            yield _Part.of(runner, contexts, edits, [trails[j] for j in edits])
            edits, rows = [], 0
        edits.append(i)
        rows += count
    if edits:
        yield _Part.of(runner, contexts, edits, [trails[j] for j in edits])


def _added(hidden: Tensor, keys: Tensor, update: LowRank) -> Tensor:
    left, right = update.left.to(hidden.device), update.right.to(hidden.device)
    wide, rank = keys.to(left.dtype), left.shape[1]
    # Whichever takes fewer products.
    if rank * (left.shape[0] + right.shape[1]) > left.shape[0] * right.shape[1]:
        added = wide @ (left @ right).T
    else:
        added = wide @ right.T @ left.T
    return (hidden.to(left.dtype) + added).to(hidden.dtype)
