"""The part of an edit between tokens and weights, for edits made together: search, close, judge.

A value leads the model to its target where it is added as it is, but what arrives of it is what a closed form makes of
many of them. A further round finds values with the update in the model, on top of what has arrived, and closes those.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..methods import Method
from ..models.runner import Runner
from ..records import Record
from ..search.requests import Request, by_subject
from ..search.search import Clock, Search, Solved
from ..search.values import ValueSettings
from ..updates.delta import Delta
from .closing import Closed, Closing
from .geometry import Geometry
from .guard import Guard, judge, predicts_collapse
from .judging import Unconverged, judge_convergence, tell_missed
from .rebasing import rebased

ENOUGH_BARE = 0.4
"""Share of an edit that has to arrive without a context; with less, one in twelve answered there (docs/collapse.md)."""


@dataclass
class Flow:
    """Search, closing and what is asked of their results, from one group of edits to the next."""

    search: Search
    closing: Closing
    guard: Guard
    unconverged: Unconverged
    total: int  # edits of all groups
    rounds: int = 1  # of searches; all but the first are with the update of the one before in the model
    condition: float = 1.0  # worst of the closed forms so far
    # (d_ff,) on the CPU, of every edit solved so far: the mean of its rows' keys.
    keys: list[Tensor] = field(default_factory=list)

    @classmethod
    def measuring(
        cls,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        layers: Mapping[int, Geometry],
        contexts: Sequence[str],
        settings: ValueSettings,
        clock: Clock | None = None,
    ) -> "Flow":
        """One for measuring edits that are not written: neither guard nor convergence keeps any of them out."""
        search = Search(runner, tokenizer, tuple(layers), method, contexts, settings, clock or Clock())
        return cls(search, Closing(runner, method, layers, "off"), "off", "write", 0)

    @property
    def method(self) -> Method:
        return self.closing.method

    @property
    def runner(self) -> Runner:
        return self.closing.runner

    def find(self, group: Sequence[Request]) -> list[Solved]:
        """Keys and values of every request, in the order given."""
        return self.search.find(group)

    def solve(self, group: Sequence[Request]) -> tuple[Delta | None, list[Record]]:
        """One closed-form update for the group, as a Delta; None where every edit of it is left out.

        Raises CollapseError or ConvergenceError where the guard or `unconverged` says so.
        """
        solved = self.find(group)
        for _ in range(self.rounds - 1):
            solved = self.find_again(group, solved)
        return self.close(group, solved)

    def find_again(self, group: Sequence[Request], solved: Sequence[Solved]) -> list[Solved]:
        """Keys and values of one more round; the model is left as it was, and nothing is remembered.

        A value stays as it is where none is found on top of it, and all of them do where their update would collapse
        the model. So does a first token's own one, which costs the model most and comes of more steps (docs/dual.md).
        """
        anyway = self.unconverged == "write"
        found = [i for i, each in enumerate(solved) if each.found or (anyway and each.finite)]
        with self.search.clock("update"):
            closed = self.closing.close([solved[i] for i in found], self.search) if found else None
        if closed is None or _collapses(closed):
            self.search.done += len(group)
            return list(solved)
        update = self.closing.delta(closed)
        own = {i: each.bare for i, each in enumerate(solved) if each.bare is not None and each.bare.found}
        update.apply(self.runner.model)
        try:
            more = self.search.find([replace(r, bare=None) if i in own else r for i, r in enumerate(group)])
        finally:
            update.revert(self.runner.model)
        with self.search.clock("update"):
            # They are all that is wanted, which closing asks for `reach` times.
            reach = self.closing.reach(len(found))
            moved = [
                replace(each, value=replace(each.value, delta=each.value.delta / reach))
                for each in rebased(self.runner, self.search, more, update)
            ]
            for places in by_subject([request.edit for request in group]) if self.method.merges else []:
                some = _sharing([more[i] for i in places], [moved[i] for i in places])
                for i, each in zip(places, some, strict=True):
                    moved[i] = each
        best = list(solved)
        for i, each in enumerate(moved):
            if each.found or (each.finite and not solved[i].found):
                best[i] = replace(each, bare=own.get(i, each.bare))
        return best

    def close(self, group: Sequence[Request], solved: Sequence[Solved]) -> tuple[Delta | None, list[Record]]:
        """The same for keys and values that are found already; of the requests, their rows are not looked at."""
        self.keys += [s.keys.mean(0).cpu() for s in solved]
        with self.search.clock("update"):
            # Keys and values of the others may be numbers as well, but one that is none would spoil the closed form.
            finite = [i for i, s in enumerate(solved) if s.finite]
            closed = self.closing.close([solved[i] for i in finite], self.search) if finite else None
            columns = dict(zip(finite, range(len(finite)), strict=True))
            records = [
                self._record(request, s, closed, columns.get(i))
                for i, (request, s) in enumerate(zip(group, solved, strict=True))
            ]
            judge_convergence(records, self.unconverged, self.total)
            candidates = [record for record in records if record.applied]
            for record, keep in zip(candidates, judge(candidates, self.guard), strict=True):
                if not keep:
                    record.applied, record.left_out = False, "would collapse"
            kept = [s for s, record in zip(solved, records, strict=True) if record.applied]
            if not kept:
                return None, records
            if closed is None or len(kept) < len(finite):
                closed = self.closing.close(kept, self.search)
            self.condition = max(self.condition, closed.condition)
            applied = [record for record in records if record.applied]
            for record, missed in zip(applied, closed.missed, strict=True):
                record.missed = missed
            # Least squares meet no edit exactly, nor does a mean key what is still missing behind the prompt alone.
            ahead = self.method.arrival == "prompt" and len(self.closing.layers) > 1
            if not (self.method.penalty or ahead):
                earlier = self.closing.earlier_edits
                tell_missed(applied, ridge=self.method.ridge_of(len(applied) + earlier) > 0, earlier=earlier)
            self.closing.remember(closed)
            return self.closing.delta(closed), records

    def solve_each(self, group: Sequence[Request]) -> list[tuple[Delta, Record]]:
        """One Delta per edit, as if each were alone; values are still found in batches.

        Neither the guard nor `unconverged` is asked: this is for measuring edits, not for writing them.
        """
        return self.close_each(group, self.find(group))

    def close_each(self, group: Sequence[Request], solved: Sequence[Solved]) -> list[tuple[Delta, Record]]:
        """The same for values that are found already, perhaps by another method that optimises the same rows."""
        with self.search.clock("update"):
            return [
                (self.closing.delta(closed), self._record(request, each, closed, 0))
                for request, each, closed in zip(
                    group, solved, self.closing.close_each(solved, self.search), strict=True
                )
            ]

    def _record(self, request: Request, solved: Solved, closed: Closed | None, index: int | None) -> Record:
        """What an edit says of itself; without a column of its own in the closed form, of one that has no value."""
        values = [solved.value] if solved.bare is None else [solved.value, solved.bare.value]
        # The record speaks of the value that was not found, where one was not.
        value = next((v for v in values if not (v.finite and v.led >= 0.5)), solved.value)
        denominator = numerator_norm = update_norm = weight_norm = math.nan
        ratios: list[float] = []
        share: float | None = None
        needs_prefix, missed, collapsed = request.needs_prefix, 0.0, True
        if closed is not None and index is not None:
            ratios = [float(f.update_norms[index]) / closed.weight_norms[layer] for layer, f in closed.factors.items()]
            # What one figure has to say of several layers is said of the one that changes most.
            layer, factors = list(closed.factors.items())[ratios.index(max(ratios))]
            denominator, numerator_norm = float(factors.denominators[index]), float(factors.numerator_norms[index])
            update_norm, weight_norm = float(factors.update_norms[index]), closed.weight_norms[layer]
            missed = closed.missed[index]
            answers_bare = solved.bare is not None and solved.bare.found
            share = closed.arrived_bare[index]
            needs_prefix = not answers_bare if needs_prefix else share is not None and share < ENOUGH_BARE
            collapsed = _collapses(closed, index)
        return Record(
            prompt=request.edit.prompt,
            subject=request.edit.subject,
            target=request.edit.target,
            method=self.method.name,
            layer=self.search.layer,
            layers=list(self.closing.layers),
            loss=value.losses[-1],
            steps=len(value.losses),
            drafted=value.drafted,
            converged=solved.found,
            denominator=denominator,
            numerator_norm=numerator_norm,
            update_norm=update_norm,
            weight_norm=weight_norm,
            update_ratios=ratios,
            missed=missed,
            share_bare=share,
            needs_prefix=needs_prefix,
            collapsed=collapsed,
            applied=solved.finite,
            text=request.edit.text,
            separator=request.edit.boundary,
            target_tokens=list(request.target_tokens),
            left_out=None if solved.finite else "loss not finite",
        )


def _sharing(found: Sequence[Solved], moved: Sequence[Solved]) -> list[Solved]:
    """Of one subject: what was one value when it was found is one again, the mean of what became of it."""
    shared = list(moved)
    for i, each in enumerate(found):
        same = [m for f, m in zip(found, moved, strict=True) if torch.equal(f.value.delta, each.value.delta)]
        mean = torch.stack([m.value.delta for m in same]).mean(0)
        shared[i] = replace(shared[i], value=replace(shared[i].value, delta=mean))
    return shared


def _collapses(closed: Closed, index: int | None = None) -> bool:
    """Whether an edit, or any of all, is predicted to collapse the model."""
    for layer, factors in closed.factors.items():
        norms = factors.update_norms.tolist() if index is None else [float(factors.update_norms[index])]
        if any(predicts_collapse(n / closed.weight_norms[layer], 1.0, closed.limits[layer]) for n in norms):
            return True
    return False
