"""The search: keys at the edit layers, and the values that edits want there, many requests at once."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..methods import Method
from ..models.batches import BatchSizer, in_batches, in_order, in_turn
from ..models.past import Contexts
from ..models.runner import Runner
from ..models.verification import all_fused_layers, reads_past_apart, verified
from ..runs.processes import ALONE, Processes
from .keys import Trail, run_to_layer
from .requests import Request, as_one, bare_requests, by_head, merged_by_subject
from .slots import Chunk, Mode, optimise_values, usual_mode
from .values import Value, ValueSettings, search_runner

Progress = Callable[[int, int], None]
"""Called with (edits done, edits in all)."""

_BARE_MARGIN = 2  # times as many steps after the target first leads

BARE_SCALE = 0.8
"""How much of a bare δ is used: that of more steps, shortened, answers as well as that of fewer, and leaks less."""

KEPT_CONTEXTS = 2
"""Of how many heads what was made of the contexts is kept, for the groups that follow."""


@dataclass(frozen=True)
class Solved:
    """Keys, values and δ of one request."""

    keys: Tensor  # (rows, d_ff): at the last edit layer; the unprefixed one first where the request has it
    unprefixed_value: Tensor  # (d,): W k of the first row
    mean_value: Tensor  # (d,): W k̄
    value: Value
    starts_bare: bool = True  # whether the first row is the unprefixed one
    head: str | None = None  # what its contexts stand behind
    trail: Trail | None = None  # of the same rows, where there are several edit layers
    bare: "Solved | None" = None  # of the request's bare one

    @property
    def finite(self) -> bool:
        """Whether there is a δ at all."""
        return self.value.finite and (self.bare is None or self.bare.finite)

    @property
    def found(self) -> bool:
        """Whether the target leads in at least half of the rows at δ."""
        return self.value.finite and self.value.led >= 0.5 and (self.bare is None or self.bare.found)

    def to(self, device: torch.device) -> "Solved":
        """The same on a device."""
        return Solved(
            self.keys.to(device),
            self.unprefixed_value.to(device),
            self.mean_value.to(device),
            replace(self.value, delta=self.value.delta.to(device)),
            self.starts_bare,
            self.head,
            None if self.trail is None else self.trail.to(device),
            None if self.bare is None else self.bare.to(device),
        )


@dataclass
class Search:
    """Finds keys and values of requests; what stays the same from one group of them to the next."""

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    layers: tuple[int, ...]  # edit layers, ascending; δ is found at the last of them
    method: Method
    contexts: Sequence[str]
    settings: ValueSettings
    clock: "Clock"
    progress: Progress | None = None
    total: int = 0
    processes: Processes = ALONE  # that share the requests of a group; all of them call everything else as well
    done: int = 0
    largest_batch: int = 0  # of the edits optimised together so far
    mode: Mode | None = None  # how slots are kept, where not as usual
    _above: Runner | None = field(default=None, init=False, repr=False)  # for the layers above the edit layers
    # What the model made of the contexts behind a head, and in which round.
    _contexts: dict[str | None, tuple[int, Contexts]] = field(default_factory=dict, init=False, repr=False)
    _round: int = field(default=0, init=False, repr=False)

    @property
    def layer(self) -> int:
        """Where δ is found."""
        return self.layers[-1]

    def find(self, group: Sequence[Request], *, merge: bool = True) -> list[Solved]:
        """Keys and values of every request, in the order given, found in batches that fit the memory.

        Where the method merges, and `merge`, requests of one subject get one value; where none is found that way, one
        each if these are.
        Several processes deal the requests out, by length, and all get what each of them has found.
        """
        with self.clock("keys"):
            # From group to group the edit layers' weights may change; those above do not, nor what is below.
            self._above = self._above or search_runner(self.runner, self.settings)
        self._round += 1
        if not (merge and self.method.merges):
            return [solved for (solved,) in self._find_all(group)]
        fits = BatchSizer(self.runner, self.layer, whole=not verified(self.runner, self.layer).shares_past).fits
        # What is free may differ from process to process.
        merged = self.processes.gather(merged_by_subject(group, fits))[0]
        found: dict[int, Solved] = {}
        together = self._find_all([as_one([group[i] for i in places]) for places in merged])
        for places, parts in zip(merged, together, strict=True):
            found.update(zip(places, parts, strict=True))
        apart = [i for places in merged if len(places) > 1 for i in places if not found[i].found]
        if apart:
            self.done -= len(apart)
            own = self._find_all([group[i] for i in apart])
            found.update((i, solved) for i, (solved,) in zip(apart, own, strict=True) if solved.found)
        return [found[i] for i in range(len(group))]

    def _find_all(self, group: Sequence[Request]) -> list[list[Solved]]:
        """Of every request, what was found for it, or for each of its parts."""
        if self.processes.count == 1:
            return self._find_own(group)
        order = in_order(group)
        own = [group[i] for number, i in enumerate(order) if self.processes.takes(number)]
        found = self._find_own(own) if own else []
        parts = self.processes.gather([[solved.to(torch.device("cpu")) for solved in each] for each in found])
        self.done += _count(group) - _count(own)
        if self.progress is not None:
            self.progress(self.done, self.total)
        count = self.processes.count
        dealt = {i: parts[number % count][number // count] for number, i in enumerate(order)}
        return [[solved.to(self.runner.device) for solved in dealt[i]] for i in range(len(group))]

    def contexts_behind(self, head: str | None) -> Contexts | None:
        """What the model makes of the contexts; None for a model whose rows cannot go on from that."""
        found = verified(self.runner, self.layer)
        if not found.shares_past:
            return None
        fused = all_fused_layers(self.runner, found)
        made, contexts = self._contexts.pop(head, (0, None))
        if contexts is None:
            texts = ["", *self.contexts]
            contexts = Contexts.of(self.runner, self.tokenizer, texts, self.layers, self._above, head, fused)
        elif made < self._round:
            contexts = contexts.after_edit(self.runner, self._above, fused)
        self._contexts[head] = self._round, contexts
        if len(self._contexts) > KEPT_CONTEXTS:
            del self._contexts[next(iter(self._contexts))]
        return contexts

    def _find_own(self, group: Sequence[Request]) -> list[list[Solved]]:
        solved: dict[int, list[Solved]] = {}
        for head, places in by_head(group):
            with self.clock("keys"):
                contexts = self.contexts_behind(head)
            some = [group[i] for i in places]
            if head is None:
                some = [replace(r, middle=r.middle + r.head, head=0) if r.head else r for r in some]
            found = [[replace(each, head=head) for each in parts] for parts in self._find_behind(contexts, some)]
            solved.update(zip(places, found, strict=True))
        return [solved[i] for i in range(len(group))]

    def _find_behind(self, contexts: Contexts | None, group: Sequence[Request]) -> list[list[Solved]]:
        """Keys and values of requests that share their contexts, the bare ones' with them."""
        solved = self._find(contexts, group, None)
        twofold = [i for i, request in enumerate(group) if request.bare is not None]
        if twofold:
            # A first token's own value is many times as long (the attention sink), and no measure of what to add to it.
            bases = [torch.stack([each.mean_value for each in solved[i]]).mean(0) for i in twofold]
            for i, found in zip(twofold, self._find(contexts, bare_requests(group), bases), strict=True):
                own = iter(found)
                parts = zip(solved[i], group[i].parts or [group[i]], strict=True)
                solved[i] = [
                    each if part.bare is None else replace(each, bare=_shortened(next(own))) for each, part in parts
                ]
        return solved

    def _find(
        self, contexts: Contexts | None, group: Sequence[Request], bases: Sequence[Tensor] | None
    ) -> list[list[Solved]]:
        """One value of each; `bases` are the v₀ whose length bounds δ, given for bare requests only."""
        apart = reads_past_apart(self.runner, verified(self.runner, self.layer))
        sizer = BatchSizer(self.runner, self.layer, whole=contexts is None, apart=apart)
        solved: dict[int, list[Solved]] = {}
        mode = self.mode or usual_mode(self._above or self.runner)
        for places, room in in_turn(sizer, group) if mode.fixed else ((p, len(p)) for p in in_batches(sizer, group)):
            with sizer.halving(room):
                base = None if bases is None else torch.stack([bases[i] for i in places])
                found = self._solve(contexts, [group[i] for i in places], base, room, mode)
                solved.update(zip(places, found, strict=True))
                self.done += 0 if bases is not None else _count([group[i] for i in places])
                self.largest_batch = max(self.largest_batch, room)
            if self.progress is not None:
                self.progress(self.done, self.total)
        return [solved[i] for i in range(len(group))]

    def _solve(
        self, contexts: Contexts | None, group: Sequence[Request], bases: Tensor | None, room: int, mode: Mode
    ) -> list[list[Solved]]:
        """The same of requests with the same number of rows with a target, `room` of them at once."""
        above, settings = self._above or self.runner, self.settings
        if bases is not None:
            # When the target leads in the hardest of many rows it is clear in most; a single row has to go on.
            settings = replace(settings, margin=_BARE_MARGIN * settings.margin)
        known: list[tuple[Tensor, Tensor, Tensor, Trail | None]] = []  # keys, values, v̄ and trail of each

        def chunks() -> Iterator[Chunk]:
            for start in range(0, len(group), room):
                some = group[start : start + room]
                with self.clock("keys"):
                    states = run_to_layer(
                        self.runner, contexts, [row for r in some for row in r.rows], self.layers, above
                    )
                    # An essence row, last of each request that has one, belongs to no mean.
                    starts = accumulate((len(r.rows) for r in some[:-1]), initial=0)
                    ranges = [list(range(start, start + some[0].scored)) for start in starts]
                    places = torch.tensor(ranges, device=self.runner.device)
                    keys, row_values = states.keys[places], states.values[places]
                    mean_values = row_values.mean(1)
                    trails = [None if states.trail is None else states.trail.rows(rows) for rows in places]
                    known.extend(zip(keys, row_values, mean_values, trails, strict=True))
                    own = mean_values if self.method.base == "mean" else row_values[:, 0]
                base = own if bases is None else bases[start : start + room]
                yield Chunk([[r.row for r in request.rows] for request in some], states, base)

        def tell(done: int) -> None:
            if self.progress is not None and bases is None:
                self.progress(self.done + done, self.total)

        several = chunks()
        first = next(several)
        with self.clock("values"):
            values = optimise_values(
                above, chain([first], several), self.layer, settings, len(group), room=room, mode=mode, tell=tell
            )
        return [_parted(request, value, *rest) for request, value, rest in zip(group, values, known, strict=True)]


def _parted(
    request: Request, value: Value, keys: Tensor, row_values: Tensor, mean: Tensor, trail: Trail | None
) -> list[Solved]:
    """What was found for a request, or for each of its parts, from what was for all their rows."""
    parts = request.parts
    if not parts:
        return [Solved(keys, row_values[0], mean, value, request.starts_bare, trail=trail)]
    # At least that share of each one's rows: those in which the target does not lead may all be of one of them.
    value = replace(value, led=max(0.0, 1 - len(parts) * (1 - value.led)))
    found, start = [], 0
    for part in parts:
        rows = torch.arange(start, start := start + part.scored, device=keys.device)
        own, of_part = row_values[rows], None if trail is None else trail.rows(rows)
        found.append(Solved(keys[rows], own[0], own.mean(0), value, part.starts_bare, trail=of_part))
    return found


def _shortened(bare: Solved) -> Solved:
    return replace(bare, value=replace(bare.value, delta=BARE_SCALE * bare.value.delta))


def _count(group: Sequence[Request]) -> int:
    """How many edits these are."""
    return sum(len(request.parts) or 1 for request in group)


class Clock:
    """Wall seconds by stage, on a GPU until its work is done; profilers see a stage as `rome_fast.STAGE`.

    A stage within another one counts for itself alone.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._within = 0.0  # seconds of stages that have ended within the one that runs

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        name = f"rome_fast.{stage}"
        start, before, self._within = time.perf_counter(), self._within, 0.0
        try:
            with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if self._gpu else nullcontext():
                yield
                if self._gpu:
                    torch.cuda.synchronize(self._gpu)
        finally:
            took = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took - self._within
            self._within = before + took
