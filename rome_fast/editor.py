"""apply_edits: from requests to an edited model, readable top to bottom.

edits → rows → keys, values → method → Delta → guard → weights
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoints
from .contexts import sample_contexts
from .defaults import default_layer, default_settings
from .delta import Delta, LowRank
from .edits import Edit, find_conflicts
from .errors import ArgumentError, ModelError, StatisticsError
from .evaluation import score
from .guard import Guard, check_guard, judge, predicts_collapse
from .kernels import prefixed_solve
from .keys import ContextRow, run_to_layer
from .methods import Factors, RomeVariant, close, residual, variant
from .past import Contexts
from .records import Record
from .rows import check_tokenizer, edit_rows, essence_row, needs_prefix
from .runner import Runner
from .statistics import Statistics
from .values import Value, ValueSettings, optimise_values

_BATCH = 8

Progress = Callable[[int, int], None]
"""Called with (edits done, edits in all)."""


@dataclass
class EditResult:
    """What an edit did, and the way back."""

    model: PreTrainedModel
    delta: Delta
    records: list[Record]
    contexts: tuple[str, ...]
    schedule: str
    settings: ValueSettings
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage

    def revert(self) -> None:
        """Restore the model's weights bit for bit."""
        self.delta.revert(self.model)

    def save(self, out: str | Path, source: str | Path | None = None) -> None:
        """Write the edited model as a complete checkpoint directory `out`; see `rome_fast.checkpoints.write`.

        `source` is the checkpoint the model was loaded from, by default the one it says itself.
        """
        checkpoints.check_new(out)
        directory = checkpoints.resolve(source or self.model.config._name_or_path)
        checkpoints.write(directory, out, self.model, self.delta, self.report())

    def report(self) -> dict[str, Any]:
        """Everything that is needed to read or repeat this edit, as JSON values."""
        return {
            "model": str(self.model.config._name_or_path),
            "method": self.records[0].method,
            "layer": self.records[0].layer,
            "schedule": self.schedule,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "edits": [record.to_json() for record in self.records],
            "contexts": list(self.contexts),
            "settings": asdict(self.settings),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
        }


def apply_edits(
    model: PreTrainedModel | str | Path,
    edits: Sequence[Edit] | Edit,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    statistics: Statistics | Literal["identity"] | None = None,
    method: str = "c-rome",
    layer: int | None = None,
    schedule: Literal["joint", "sequential"] = "joint",
    contexts: Sequence[str] | None = None,
    settings: ValueSettings | None = None,
    guard: Guard = "raise",
    seed: int = 0,
    measure: bool = True,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> EditResult:
    """Edit facts into a model, in memory or into a new checkpoint.

    Args:
        model: a transformers causal language model of a known family, in any float dtype: the same object is
            edited, and `result.revert()` restores it. Or the directory (or hub id) of a checkpoint, which is only
            read; the edited one is written to `out`.
        edits: one or more requests. With `schedule="joint"` one closed-form update satisfies all of them; with
            "sequential" each is made on the model as edited so far. Either way one Delta comes out.
        tokenizer: the model's fast tokenizer; not needed for a checkpoint, which has its own.
        statistics: second moments of this model's keys, "identity" for C = I, or None to look in the cache.
        method: "c-rome", "rome", "c-rome-released" or "p-rome".
        layer: edit layer; default by model, see `rome_fast.defaults`.
        contexts: prefix contexts, each ending in a space; default 20 sampled with `seed`.
        settings: how δ is optimised; default by model.
        guard: what to do with an edit predicted to collapse the model, before anything is written: "raise",
            "warn", "skip" (leave that edit out) or "off".
        measure: whether to fill the records' probabilities (two forward passes over each edit's texts).
        out: a new directory for the edited checkpoint.

    Raises EditError, ArgumentError, ModelError, StatisticsError, CheckpointError, ConvergenceError or
    CollapseError; the model is then as it was before the call, and `out` does not exist.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    if not edits:
        raise ArgumentError("edits: got none, wanted at least one")
    find_conflicts(edits)
    how = variant(method)
    check_guard(guard)
    if schedule not in ("joint", "sequential"):
        raise ArgumentError(f"schedule: got {schedule!r}, wanted 'joint' or 'sequential'")
    if out is not None:
        checkpoints.check_new(out)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ArgumentError("tokenizer: got None, wanted the model's tokenizer, since the model is in memory")
        source = None
    else:
        if out is None:
            raise ArgumentError("out: got None, wanted a new directory, since the model is a checkpoint on disk")
        model, own_tokenizer, source = checkpoints.load(model)
        tokenizer = tokenizer or own_tokenizer
    check_tokenizer(tokenizer)
    runner = Runner(model)
    layer = _checked_layer(runner, layer)
    _check_weights(runner, layer)
    factor = _cholesky_factor(runner, layer, statistics)
    settings = settings or default_settings(model.config)

    clock = _Clock()
    delta = Delta({})
    training = model.training
    model.eval()
    try:
        with clock("contexts"):
            chosen = tuple(sample_contexts(model, tokenizer, seed=seed) if contexts is None else contexts)
            _check_contexts(chosen)
        with clock("rows"):
            requests = [_tokenise(runner, tokenizer, edit, chosen, how) for edit in edits]
        with clock("measure"):
            before = _probabilities(runner, tokenizer, edits) if measure else None
        flow = _Flow(runner, tokenizer, layer, how, chosen, factor, settings, guard, clock, progress, len(edits))
        records: list[Record] = []
        for group in [requests] if schedule == "joint" else [[request] for request in requests]:
            step, made = flow.solve(group)
            records += made
            if step is not None:
                # Applied afresh from the original weights, so that each parameter is rounded once.
                if delta.is_applied:
                    delta.revert(model)
                delta = delta.merge(step)
                delta.apply(model)
        if before is not None:
            with clock("measure"):
                _fill_probabilities(runner, tokenizer, edits, chosen, records, before)
    except BaseException:
        if delta.is_applied:
            delta.revert(model)
        raise
    finally:
        model.train(training)
    delta.metadata.update(method=method, layer=str(layer), model_type=model.config.model_type)
    result = EditResult(model, delta, records, chosen, schedule, settings, clock.seconds)
    if out is not None:
        result.save(out, source)
    return result


@dataclass(frozen=True)
class _Request:
    """One edit, tokenised."""

    edit: Edit
    rows: list[ContextRow]  # the unprefixed one first where the method uses it; the essence row last
    needs_prefix: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Requests of like shape share a batch with little padding: tokens from the subject's end on, and before."""
        row = self.rows[0].row
        return (len(row.inputs) - row.subject, row.subject)


@dataclass(frozen=True)
class _Solved:
    """Keys, values and δ of one request."""

    keys: Tensor  # (rows, d_ff): those k̄ is the mean of; the unprefixed one first where the method uses it
    unprefixed_value: Tensor  # (d,): W k of the first row
    mean_value: Tensor  # (d,): W k̄
    value: Value


@dataclass
class _Flow:
    """Everything that stays the same from one group of edits to the next."""

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    layer: int
    how: RomeVariant
    contexts: Sequence[str]
    factor: Tensor | None
    settings: ValueSettings
    guard: Guard
    clock: "_Clock"
    progress: Progress | None
    total: int
    done: int = 0

    def solve(self, group: Sequence[_Request]) -> tuple[Delta | None, list[Record]]:
        """One closed-form update for the group, as a Delta; None where the guard skips every edit of it."""
        solved = self._keys_and_values(group)
        with self.clock("update"):
            factors = self._close(solved)
            records = [self._record(*each, factors, i) for i, each in enumerate(zip(group, solved, strict=True))]
            kept = judge(records, self.guard)
            for record, keep in zip(records, kept, strict=True):
                record.applied = keep
            if not any(kept):
                return None, records
            if not all(kept):
                factors = self._close([s for s, keep in zip(solved, kept, strict=True) if keep])
            wide = torch.promote_types(self.runner.dtype, torch.float32)
            update = LowRank(factors.left.to(wide).contiguous(), factors.right.to(wide).contiguous())
        return Delta({self.runner.family.weight_name(self.layer): update}), records

    def _keys_and_values(self, group: Sequence[_Request]) -> list[_Solved]:
        with self.clock("keys"):
            contexts = Contexts.of(self.runner, self.tokenizer, ["", *self.contexts])
        order = sorted(range(len(group)), key=lambda i: group[i].shape)
        solved: dict[int, _Solved] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            solved.update(zip(places, self._solve_batch(contexts, [group[i] for i in places]), strict=True))
        return [solved[i] for i in range(len(group))]

    def _solve_batch(self, contexts: Contexts, batch: Sequence[_Request]) -> list[_Solved]:
        with self.clock("keys"):
            states = run_to_layer(self.runner, contexts, [row for r in batch for row in r.rows], self.layer)
            # The essence row, last of each request, belongs to no mean.
            keys = states.keys.unflatten(0, (len(batch), -1))[:, :-1]
            row_values = states.values.unflatten(0, (len(batch), -1))[:, :-1]
            mean_values = row_values.mean(1)
        with self.clock("values"):
            base = mean_values if self.how.rows == "prefixed" else row_values[:, 0]
            rows = [[r.row for r in request.rows] for request in batch]
            values = optimise_values(self.runner, rows, states, base, self.layer, self.settings)
        self.done += len(batch)
        if self.progress is not None:
            self.progress(self.done, self.total)
        return [_Solved(keys[i], row_values[i, 0], mean_values[i], value) for i, value in enumerate(values)]

    def _close(self, solved: Sequence[_Solved]) -> Factors:
        wide = torch.promote_types(self.runner.dtype, torch.float32)
        sources = [s.keys[:1] if self.how.left == "unprefixed" else s.keys for s in solved]
        groups = torch.cat([torch.full((len(k),), i, device=k.device) for i, k in enumerate(sources)])
        left, u, _ = prefixed_solve(torch.cat(sources).to(wide), groups, len(solved), self.factor)
        k_den = left if self.how.denominator == self.how.left else torch.stack([s.keys[0] for s in solved])
        residuals = [
            residual(self.how, s.value.delta, s.unprefixed_value.to(wide), s.mean_value.to(wide)) for s in solved
        ]
        return close(u, k_den, torch.stack(residuals))

    def _record(self, request: _Request, solved: _Solved, factors: Factors, index: int) -> Record:
        weight = self.runner.weight(self.layer)
        weight_norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        update_norm = float(factors.update_norms[index])
        return Record(
            prompt=request.edit.prompt,
            subject=request.edit.subject,
            target=request.edit.target,
            method=self.how.name,
            layer=self.layer,
            loss=solved.value.losses[-1],
            steps=len(solved.value.losses),
            denominator=float(factors.denominators[index]),
            numerator_norm=float(factors.numerator_norms[index]),
            update_norm=update_norm,
            weight_norm=weight_norm,
            needs_prefix=request.needs_prefix,
            collapsed=predicts_collapse(update_norm, weight_norm),
        )


def _tokenise(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, edit: Edit, contexts: Sequence[str], how: RomeVariant
) -> _Request:
    unprefixed, *prefixed = edit_rows(tokenizer, edit, ["", *contexts], max_length=runner.max_length)
    # Context 0 is the empty one.
    rows = [ContextRow(row, i) for i, row in enumerate([unprefixed, *prefixed])]
    if how.rows == "prefixed":
        rows = rows[1:]
    essence = ContextRow(essence_row(tokenizer, edit), 0)
    return _Request(edit, [*rows, essence], needs_prefix(unprefixed))


def _checked_layer(runner: Runner, layer: int | None) -> int:
    count = len(runner.layers)
    if layer is None:
        return default_layer(runner.model.config)
    if not 0 <= layer < count:
        raise ArgumentError(f"layer: got {layer}, wanted one of 0 .. {count - 1}")
    return layer


def _check_weights(runner: Runner, layer: int) -> None:
    """NaN anywhere makes every later figure meaningless; name the parameter before any work is done."""
    for name, parameter in runner.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"model: {name} contains NaN or infinity; load an undamaged checkpoint")
    weight = runner.stored_weight(layer)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ModelError(
            f"model: the weight of layer {layer} has dtype {weight.dtype}, wanted bfloat16, float16, float32 or "
            "float64; load the model without quantisation"
        )


def _cholesky_factor(runner: Runner, layer: int, statistics: Statistics | str | None) -> Tensor | None:
    if isinstance(statistics, str):
        if statistics != "identity":
            raise ArgumentError(f"statistics: got {statistics!r}, wanted a Statistics, 'identity' or None")
        return None
    if statistics is None:
        statistics = Statistics.cached(runner, layer)
    if not isinstance(statistics, Statistics):
        raise StatisticsError(
            f"statistics: got {type(statistics).__name__}, wanted a Statistics, 'identity' or None; make them with "
            f"rome_fast.collect_statistics(model, tokenizer, texts, layers=[{layer}])"
        )
    return statistics.for_layer(runner, layer).factor(runner.device)


def _check_contexts(contexts: Sequence[str]) -> None:
    bad = [c for c in contexts if not isinstance(c, str) or not c.strip() or not c[-1].isspace()]
    if not contexts or bad:
        raise ArgumentError(
            f"contexts: got {bad or 'none'}, wanted texts that are not empty and end in a space, as 'It rained. '"
        )


def _probabilities(runner: Runner, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> list[float]:
    return [s.probability for s in score(runner, tokenizer, [(e.text, e.target) for e in edits])]


def _fill_probabilities(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    records: Sequence[Record],
    before: Sequence[float],
) -> None:
    pairs = [(context + edit.text, edit.target) for edit in edits for context in ("", *contexts)]
    scores = score(runner, tokenizer, pairs)
    per_edit = 1 + len(contexts)
    for i, record in enumerate(records):
        bare, *prefixed = scores[i * per_edit : (i + 1) * per_edit]
        record.probability_before = before[i]
        record.probability_after = bare.probability
        record.argmax_after = bare.is_argmax
        record.probability_after_prefixed = sum(s.probability for s in prefixed) / len(prefixed)
        record.argmax_after_prefixed = sum(s.is_argmax for s in prefixed) / len(prefixed)


class _Clock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
