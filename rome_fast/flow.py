"""The part of an edit between tokens and weights: keys, values, closed form, guard, for edits made together."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batches import BatchSizer, in_batches, in_order
from .delta import Delta, LowRank
from .edits import Edit
from .errors import ConvergenceError
from .guard import Guard, judge, largest_harmless, predicts_collapse
from .kernels import prefixed_solve
from .keys import ContextRow, run_to_layer
from .methods import Factors, RomeVariant, close, residual
from .past import Contexts
from .processes import ALONE, Processes
from .records import MUCH_MISSED, Record
from .rows import edit_rows, encode, essence_row, needs_prefix, token_texts
from .runner import Runner
from .values import Value, ValueSettings, optimise_values, scored_rows, search_runner
from .verification import verified

Progress = Callable[[int, int], None]
"""Called with (edits done, edits in all)."""

Unconverged = Literal["skip", "write", "raise"]


_BARE_MARGIN = 2  # times as many steps after the target first leads

BARE_SCALE = 0.8
"""How much of a bare δ is used: that of more steps, shortened, answers as well as that of fewer, and leaks less."""

ENOUGH_BARE = 0.4
"""Share of an edit that has to arrive without a context. Of those with less, none answered there (docs/collapse.md)."""


_MOST_HEADS = 4  # of chats, that have contexts of their own in a group
_MOST_KEPT = 2  # of what was made of contexts, for the groups that follow

_TOLD = 10  # edits that a warning names


class SharedKeyWarning(UserWarning):
    """Edits that have one key, as those of one subject behind the same words, or nearly, were met in part."""


class ConvergenceWarning(UserWarning):
    """An edit was left out because its value was not found."""


@dataclass(frozen=True)
class Request:
    """One edit, tokenised."""

    edit: Edit
    # The unprefixed one first where the method uses it. Last the essence row, which has no target, unless the
    # unprefixed one begins with it: what a model says at the end of the subject does not depend on what follows.
    rows: list[ContextRow]
    needs_prefix: bool  # the subject's last token is at position 0
    middle: int  # positions of its own before the subject's last token: those of the row without a context and head
    target_tokens: tuple[str, ...]  # each as text
    head: int = 0  # positions of what a chat template puts before a context
    # The row without a context as a request of its own, where the method gives it a key and a value of its own.
    bare: "Request | None" = None

    @property
    def scored(self) -> int:
        """How many of the rows have a target, and with it a part in k̄."""
        return scored_rows([r.row for r in self.rows])

    @property
    def suffix(self) -> int:
        """Positions from the subject's last token on, the same in every row but for odd tokenisations."""
        return max(len(r.row.inputs) - r.row.subject for r in self.rows)

    @property
    def before(self) -> int:
        """Positions before the subject's last token, in the longest row."""
        return max(r.row.subject for r in self.rows)


def tokenise(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, edit: Edit, contexts: Sequence[str], how: RomeVariant
) -> Request:
    """The rows a method needs for an edit; raises EditError for one that cannot be tokenised as it must."""
    unprefixed, *prefixed = edit_rows(tokenizer, edit, ["", *contexts], max_length=runner.max_length)
    # Context 0 is the empty one.
    rows = [ContextRow(row, i) for i, row in enumerate([unprefixed, *prefixed])]
    alone = needs_prefix(unprefixed)
    if how.rows == "prefixed" and alone:
        rows = rows[1:]
    essence = ContextRow(essence_row(tokenizer, edit), 0)

    def with_essence(rows: list[ContextRow]) -> list[ContextRow]:
        begins = rows[0].row.ids[: rows[0].row.subject + 1]
        return rows if begins == essence.row.ids else [*rows, essence]

    head = 0 if edit.head is None else len(encode(tokenizer, [edit.head], special=False)[0].ids)
    head = min(head, unprefixed.subject)
    tokens = token_texts(tokenizer, unprefixed.labels)
    request = Request(edit, with_essence(rows), alone, unprefixed.subject - head, tokens, head)
    if how.bare and alone:
        request = replace(request, bare=replace(request, rows=with_essence([ContextRow(unprefixed, 0)])))
    return request


def by_head(group: Sequence[Request]) -> list[tuple[str | None, list[int]]]:
    """Places of the requests that share what their contexts stand behind, with it: None for nothing.

    Of chats, those whose template and earlier messages are the same; where there are many kinds of them, the rarest
    count as plain prompts, which share little with the contexts, but batches with each other.
    """
    heads = Counter(request.edit.head for request in group if request.edit.head is not None)
    common = {head for head, _ in heads.most_common(_MOST_HEADS)}
    places: dict[str | None, list[int]] = {}
    for i, request in enumerate(group):
        places.setdefault(request.edit.head if request.edit.head in common else None, []).append(i)
    return list(places.items())


def bare_requests(group: Sequence[Request]) -> list[Request]:
    return [request.bare for request in group if request.bare is not None]


@dataclass(frozen=True)
class Solved:
    """Keys, values and δ of one request."""

    keys: Tensor  # (rows, d_ff): those k̄ is the mean of; the unprefixed one first where the method uses it
    unprefixed_value: Tensor  # (d,): W k of the first row
    mean_value: Tensor  # (d,): W k̄
    value: Value
    bare: "Solved | None" = None  # of the request's bare one

    def to(self, device: torch.device) -> "Solved":
        """The same on a device."""
        return Solved(
            self.keys.to(device),
            self.unprefixed_value.to(device),
            self.mean_value.to(device),
            replace(self.value, delta=self.value.delta.to(device)),
            None if self.bare is None else self.bare.to(device),
        )


@dataclass
class Flow:
    """Everything that stays the same from one group of edits to the next."""

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    layer: int
    how: RomeVariant
    contexts: Sequence[str]
    factor: Tensor | None  # of C; None for C = I
    settings: ValueSettings
    guard: Guard
    unconverged: Unconverged
    clock: "Clock"
    progress: Progress | None
    total: int
    limit: float | None = None  # ‖Δ‖ / ‖W‖ of one edit above which a collapse is predicted; None for the usual one
    done: int = 0
    first_token_factor: Tensor | None = None  # of C + λ C₁, for bare requests; None for `factor`
    condition: float = 1.0  # worst of the closed forms so far
    largest_batch: int = 0  # of the edits optimised together so far
    processes: Processes = ALONE  # that share the values of a group; all of them call everything else as well
    _above: Runner | None = field(default=None, init=False, repr=False)  # for the layers above the edit layer
    # What the model made of the contexts behind a head, and in which round of `_find_own`.
    _contexts: dict[str | None, tuple[int, Contexts]] = field(default_factory=dict, init=False, repr=False)
    _round: int = field(default=0, init=False, repr=False)

    def solve(self, group: Sequence[Request]) -> tuple[Delta | None, list[Record]]:
        """One closed-form update for the group, as a Delta; None where every edit of it is left out.

        Raises CollapseError or ConvergenceError where the guard or `unconverged` says so.
        """
        solved = self.find(group)
        with self.clock("update"):
            # Keys and values of the others may be numbers as well, but one that is none would spoil the closed form.
            finite = [i for i, s in enumerate(solved) if _is_finite(s)]
            weight_norm = self._weight_norm()
            factors = self.close([solved[i] for i in finite], weight_norm) if finite else None
            columns = dict(zip(finite, range(len(finite)), strict=True))
            records = [
                self._record(request, s, factors, columns.get(i), weight_norm)
                for i, (request, s) in enumerate(zip(group, solved, strict=True))
            ]
            self._judge_convergence(records)
            candidates = [record for record in records if record.applied]
            for record, keep in zip(candidates, judge(candidates, self.guard), strict=True):
                if not keep:
                    record.applied, record.left_out = False, "would collapse"
            kept = [s for s, record in zip(solved, records, strict=True) if record.applied]
            if not kept:
                return None, records
            if factors is None or len(kept) < len(finite):
                factors = self.close(kept, weight_norm)
            self.condition = max(self.condition, factors.condition)
            applied = [record for record in records if record.applied]
            for record, missed in zip(applied, factors.missed[: len(applied)].tolist(), strict=True):
                record.missed = missed
            _tell_missed(applied)
            return self.delta(factors), records

    def solve_each(self, group: Sequence[Request]) -> list[tuple[Delta, Record]]:
        """One Delta per edit, as if each were alone; keys and values are still found in batches.

        Neither the guard nor `unconverged` is asked: this is for measuring edits, not for writing them.
        """
        return self.close_each(group, self.find(group))

    def close_each(self, group: Sequence[Request], solved: Sequence[Solved]) -> list[tuple[Delta, Record]]:
        """The same for values that are found already, perhaps by another variant that optimises the same rows."""
        with self.clock("update"):
            # One solve for all: with a single right-hand side it is bound by latency.
            columns = self._columns(solved)
            alone = [close(*(t[places] for t in columns)) for places in _places(solved)]
            weight_norm = self._weight_norm()
            return [
                (self.delta(factors), self._record(request, each, factors, 0, weight_norm))
                for request, each, factors in zip(group, solved, alone, strict=True)
            ]

    def delta(self, factors: Factors) -> Delta:
        """The Delta of a closed form, in fp32 (fp64 for an fp64 model)."""
        wide = torch.promote_types(self.runner.dtype, torch.float32)
        update = LowRank(factors.left.to(wide).contiguous(), factors.right.to(wide).contiguous())
        return Delta({self.runner.weight_name(self.layer): update})

    def find(self, group: Sequence[Request]) -> list[Solved]:
        """Keys and values of every request, in the order given, found in batches that fit the memory.

        Several processes deal the requests out, by length, and all get what each of them has found.
        """
        if self.processes.count == 1:
            return self._find_own(group)
        order = in_order(group)
        own = [group[i] for number, i in enumerate(order) if self.processes.takes(number)]
        found = self._find_own(own) if own else []
        parts = self.processes.gather([solved.to(torch.device("cpu")) for solved in found])
        self.done += len(group) - len(own)
        if self.progress is not None:
            self.progress(self.done, self.total)
        count = self.processes.count
        dealt = {i: parts[number % count][number // count] for number, i in enumerate(order)}
        return [dealt[i].to(self.runner.device) for i in range(len(group))]

    def _find_own(self, group: Sequence[Request]) -> list[Solved]:
        with self.clock("keys"):
            # From group to group the edit layer's weight may change; those above it do not, nor what is below.
            above = self._above = self._above or search_runner(self.runner, self.settings)
        self._round += 1
        solved: dict[int, Solved] = {}
        for head, places in by_head(group):
            with self.clock("keys"):
                contexts = self._contexts_behind(head, above)
            some = [group[i] for i in places]
            if head is None:
                some = [replace(r, middle=r.middle + r.head, head=0) if r.head else r for r in some]
            solved.update(zip(places, self._find_behind(contexts, above, some), strict=True))
        return [solved[i] for i in range(len(group))]

    def _contexts_behind(self, head: str | None, above: Runner) -> Contexts | None:
        """What the model makes of the contexts; None for a model whose rows cannot go on from that."""
        if not verified(self.runner, self.layer).shares_past:
            return None
        made, contexts = self._contexts.pop(head, (0, None))
        if contexts is None:
            contexts = Contexts.of(self.runner, self.tokenizer, ["", *self.contexts], self.layer, above, head)
        elif made < self._round:
            contexts = contexts.after_edit(self.runner, above)
        self._contexts[head] = self._round, contexts
        if len(self._contexts) > _MOST_KEPT:
            del self._contexts[next(iter(self._contexts))]
        return contexts

    def _find_behind(self, contexts: Contexts | None, above: Runner, group: Sequence[Request]) -> list[Solved]:
        """Keys and values of requests that share their contexts, the bare ones' with them."""
        solved = self._find(contexts, above, group, None)
        twofold = [i for i, request in enumerate(group) if request.bare is not None]
        if twofold:
            # A first token's own value is many times as long (the attention sink), and no measure of what to add to it.
            bases = [solved[i].mean_value for i in twofold]
            for i, bare in zip(twofold, self._find(contexts, above, bare_requests(group), bases), strict=True):
                value = replace(bare.value, delta=BARE_SCALE * bare.value.delta)
                solved[i] = replace(solved[i], bare=replace(bare, value=value))
        return solved

    def _find(
        self, contexts: Contexts | None, above: Runner, group: Sequence[Request], bases: Sequence[Tensor] | None
    ) -> list[Solved]:
        """One key and value of each; `bases` are the v₀ whose length bounds δ, given for bare requests only.

        `above` runs the layers above the edit layer.
        """
        sizer = BatchSizer(self.runner, self.layer, whole=contexts is None)
        solved: dict[int, Solved] = {}
        for places in in_batches(sizer, group):
            with sizer.halving(len(places)):
                base = None if bases is None else torch.stack([bases[i] for i in places])
                found = self._solve_batch(contexts, above, [group[i] for i in places], base)
                solved.update(zip(places, found, strict=True))
                self.done += 0 if bases is not None else len(places)
                self.largest_batch = max(self.largest_batch, len(places))
            if self.progress is not None:
                self.progress(self.done, self.total)
        return [solved[i] for i in range(len(group))]

    def _solve_batch(
        self, contexts: Contexts | None, above: Runner, batch: Sequence[Request], base: Tensor | None
    ) -> list[Solved]:
        with self.clock("keys"):
            rows_of_batch = [row for r in batch for row in r.rows]
            states = run_to_layer(self.runner, contexts, rows_of_batch, self.layer, above)
            # An essence row, last of each request that has one, belongs to no mean.
            starts = accumulate((len(r.rows) for r in batch[:-1]), initial=0)
            ranges = [list(range(start, start + batch[0].scored)) for start in starts]
            places = torch.tensor(ranges, device=self.runner.device)
            keys, row_values = states.keys[places], states.values[places]
            mean_values = row_values.mean(1)
        with self.clock("values"):
            settings = self.settings
            if base is None:
                base = mean_values if self.how.rows == "prefixed" else row_values[:, 0]
            else:
                # When the target leads in the hardest of many rows it is clear in most; a single row has to go on.
                settings = replace(settings, margin=_BARE_MARGIN * settings.margin)
            rows = [[r.row for r in request.rows] for request in batch]
            values = optimise_values(above, rows, states, base, self.layer, settings)
        return [Solved(keys[i], row_values[i, 0], mean_values[i], value) for i, value in enumerate(values)]

    def close(self, solved: Sequence[Solved], weight_norm: float) -> Factors:
        """The closed form for these edits together, held where that would be too large, unless the guard is off."""
        return close(*self._columns(solved), harmless=largest_harmless(self.guard, weight_norm, self.limit))

    def _columns(self, solved: Sequence[Solved]) -> tuple[Tensor, Tensor, Tensor]:
        """u (columns, d_ff), k_den (columns, d_ff) and what must be added to the values there (columns, d).

        A column per edit and, behind them, one per bare key.
        """
        bare = [s.bare for s in solved if s.bare is not None]
        columns = self._left_hand(solved, self.factor)
        if not bare:
            return columns
        own = self._left_hand(bare, self.factor if self.first_token_factor is None else self.first_token_factor)
        u, k_den, residuals = (torch.cat(pair) for pair in zip(columns, own, strict=True))
        return u, k_den, residuals

    def _left_hand(self, solved: Sequence[Solved], factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one key of every edit."""
        wide = torch.promote_types(self.runner.dtype, torch.float32)
        sources = [s.keys[:1] if self.how.left == "unprefixed" else s.keys for s in solved]
        groups = torch.cat([torch.full((len(k),), i, device=k.device) for i, k in enumerate(sources)])
        left, u, _ = prefixed_solve(torch.cat(sources).to(wide), groups, len(solved), factor)
        if self.how.denominator == self.how.left:
            k_den = left
        elif self.how.denominator == "unprefixed":
            k_den = torch.stack([s.keys[0] for s in solved])
        else:
            k_den = torch.stack([s.keys.to(wide).mean(0) for s in solved])
        residuals = [
            residual(self.how, s.value.delta, s.unprefixed_value.to(wide), s.mean_value.to(wide)) for s in solved
        ]
        return u, k_den, torch.stack(residuals)

    def _weight_norm(self) -> float:
        return float(torch.linalg.vector_norm(self.runner.weight(self.layer), dtype=torch.float64))

    def _record(
        self, request: Request, solved: Solved, factors: Factors | None, index: int | None, weight_norm: float
    ) -> Record:
        """What an edit says of itself; without a column of its own in the closed form, of one that has no value."""
        values = [solved.value] if solved.bare is None else [solved.value, solved.bare.value]
        # The record speaks of the value that was not found, where one was not.
        value = next((v for v in values if not _found(v)), solved.value)
        answers_bare = solved.bare is not None and _found(solved.bare.value)
        denominator = numerator_norm = update_norm = math.nan
        needs_prefix = request.needs_prefix
        if factors is not None and index is not None:
            denominator, numerator_norm = float(factors.denominators[index]), float(factors.numerator_norms[index])
            update_norm = float(factors.update_norms[index])
            if solved.bare is not None:
                update_norm = close(*self._columns([solved])).joint_norm
            needs_prefix = not answers_bare if needs_prefix else self._share_bare(solved, factors) < ENOUGH_BARE
        return Record(
            prompt=request.edit.prompt,
            subject=request.edit.subject,
            target=request.edit.target,
            method=self.how.name,
            layer=self.layer,
            loss=value.losses[-1],
            steps=len(value.losses),
            drafted=value.drafted,
            converged=all(map(_found, values)),
            denominator=denominator,
            numerator_norm=numerator_norm,
            update_norm=update_norm,
            weight_norm=weight_norm,
            missed=0.0 if factors is None or index is None else float(factors.missed[index]),
            needs_prefix=needs_prefix,
            collapsed=predicts_collapse(update_norm, weight_norm, self.limit),
            applied=_is_finite(solved),
            text=request.edit.text,
            separator=request.edit.boundary,
            target_tokens=list(request.target_tokens),
            left_out=None if _is_finite(solved) else "loss not finite",
        )

    def _share_bare(self, solved: Solved, factors: Factors) -> float:
        """⟨r, Δ kᵤ⟩ / ⟨r, r⟩: the share of what an edit adds behind contexts that it adds without one."""
        value = solved.value.delta, solved.unprefixed_value, solved.mean_value
        r = residual(self.how, *(v.to(factors.left.dtype) for v in value))
        added = factors.left @ (factors.right @ solved.keys[0].to(factors.right.dtype))
        return float((r @ added) / (r @ r))

    def _judge_convergence(self, records: Sequence[Record]) -> None:
        broken = [r for r in records if not r.applied]
        missed = [r for r in records if r.applied and not r.converged]
        if self.unconverged == "write":
            missed = []
        if not broken and not missed:
            return
        what = _listing(broken, missed)
        if self.unconverged == "raise" or len(broken) == self.total:
            raise unconverged_error(broken, missed)
        for record in missed:
            record.applied, record.left_out = False, "did not converge"
        rest = "; write those that are finite with unconverged='write'" if missed else ""
        warnings.warn(f"{what}\nthey were left out{rest}", ConvergenceWarning, stacklevel=4)


def _tell_missed(records: Sequence[Record]) -> None:
    missed = sorted((r for r in records if r.missed > MUCH_MISSED), key=lambda r: -r.missed)
    if missed:
        named = [f"  {r.prompt!r} of {r.subject!r} → {r.target!r}: {r.missed:.0%} off" for r in missed[:_TOLD]]
        if len(missed) > _TOLD:
            named.append(f"  and {len(missed) - _TOLD} more, see missed in their records")
        listed = "\n".join(named)
        warnings.warn(
            f"{len(missed)} edit(s) are met in part, as they have the key of another one (those of one subject behind "
            f"the same words do) or nearly:\n{listed}\nno weight gives one key two values, and one that tells near "
            "keys apart is large: make fewer edits, make some at another layer, in a call of its own, or have all of "
            "them met as far as they can be, whatever that does to the model, with guard='off'",
            SharedKeyWarning,
            stacklevel=4,
        )


def unconverged_error(broken: Sequence[Record], missed: Sequence[Record] = ()) -> ConvergenceError:
    """The error of edits whose loss is not finite, and of those whose target leads in too few rows."""
    return ConvergenceError(
        f"{_listing(broken, missed)}\nnothing was written; allow more steps, lower the learning rate, load the model "
        "in float32, or choose what to do with unconverged='skip' | 'write'"
    )


def _listing(broken: Sequence[Record], missed: Sequence[Record]) -> str:
    lines = [f"  {r.subject!r} → {r.target!r}: the loss became {r.loss} at step {r.steps}" for r in broken]
    lines += [f"  {r.subject!r} → {r.target!r}: the target leads in too few rows, loss {r.loss:.3g}" for r in missed]
    return f"{len(lines)} edit(s) did not converge:\n" + "\n".join(lines)


def _is_finite(solved: Solved) -> bool:
    return solved.value.finite and (solved.bare is None or solved.bare.value.finite)


def _found(value: Value) -> bool:
    return value.finite and value.led >= 0.5


def _places(solved: Sequence[Solved]) -> list[list[int]]:
    """Which columns of the closed form are whose."""
    bare = count(len(solved))
    return [[i] if s.bare is None else [i, next(bare)] for i, s in enumerate(solved)]


class Clock:
    """Wall seconds by stage, on a GPU until its work is done; profilers see a stage as `rome_fast.STAGE`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._gpu = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        name = f"rome_fast.{stage}"
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if self._gpu else nullcontext():
                yield
                if self._gpu:
                    torch.cuda.synchronize(self._gpu)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
