"""apply_edits: from requests to an edited model, readable top to bottom.

open → choose → rows → keys, values → closed form → guard → Delta → measure → write
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .closing.closing import Closing
from .closing.effect import Effect, judge_drift
from .closing.flow import Flow
from .closing.geometry import Geometries
from .closing.guard import Guard, check_guard
from .closing.history import History
from .closing.judging import Unconverged, check_unconverged, unconverged_error
from .closing.neighbours import tell_nearest
from .edits import Edit, asked_edits
from .errors import ArgumentError, StatisticsError
from .methods import DEFAULT_METHOD, Method, method_named
from .models.fingerprint import Fingerprint
from .models.runner import Runner, evaluating
from .models.verification import Verified, check_shared_out, shared_out, verified
from .opening.admission import admit_tokenizer, checked_dtype, plain_modes
from .opening.checkpoints import checked_layers
from .opening.defaults import Selection, default_layer, select
from .opening.opening import Destination, Opened, check_weights, given_layers, open_checkpoint, open_model
from .records import Record
from .result import EditResult
from .runs.processes import ALONE, Processes
from .search.contexts import sample_contexts
from .search.requests import Request, tokenise
from .search.search import Clock, Progress, Search
from .search.values import ValueSettings
from .statistics import Statistics, first_token_statistics, tuned_choice
from .updates import saving
from .updates.delta import Delta
from .weights import Link, OnRead, check_link

RESUME = "nothing was written: run the same command again"
"""What to do when one of several processes has died."""


@plain_modes()
def apply_edits(
    model: PreTrainedModel | str | Path,
    edits: Sequence[Edit] | Edit,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    statistics: Statistics | Literal["identity"] | None = None,
    method: str | Method = DEFAULT_METHOD,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    schedule: Literal["joint", "sequential"] = "joint",
    contexts: Sequence[str] | None = None,
    settings: ValueSettings | Mapping[str, Any] | None = None,
    batch_size: int = 1,
    rounds: int = 1,
    guard: Guard = "raise",
    unconverged: Unconverged = "skip",
    seed: int = 0,
    measure: bool = True,
    history: History | bool = False,
    out: str | Path | None = None,
    in_place: bool = False,
    link: Link = "copy",
    lora: str | Path | None = None,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    distributed: bool = False,
    progress: Progress | None = None,
    on_read: OnRead | None = None,
) -> EditResult:
    """Edit facts into a model, in memory or into a new checkpoint.

    Args:
        model: a transformers causal language model, a decoder, in any float dtype: the same object is
            edited, and `result.revert()` restores it. Or the directory (or hub id) of a checkpoint, which is only
            read; the edited one is written to `out`.
        edits: one or more requests. With `schedule="joint"` one closed-form update satisfies all of them; with
            "sequential" `batch_size` of them at a time, each batch on the model as edited so far. Either way one
            Delta comes out.
        tokenizer: the model's fast tokenizer; not needed for a checkpoint, which has its own. Another one is written
            to `out` with the model.
        statistics: second moments of this model's keys, "identity" for C = I, or None to look in the cache.
        method: one of `rome_fast.methods.METHODS`, by name, or such a description, as with another ridge by
            `dataclasses.replace`. "dual", the default, holds every edit with and without text before its prompt. For
            subjects that are the first token it needs the keys of all first tokens, which the first such edit of a
            model collects in one pass over the vocabulary and keeps in the cache.
        layer: one edit layer, instead of those that are usual for method and model.
        layers: several, over which the edit is spread; δ is found at the last of them. By default those below the
            layer that `rome-fast tune` chose for this very model, as `statistics` say or, where none are given, the
            cache does; else by model, see `rome_fast.opening.defaults`; or the one layer alone, for methods that are of
            one. `result.layer_source` says whose they were.
        contexts: prefix contexts, each ending in a space; default 20 sampled with `seed`. They stand before a prompt,
            in a chat before what the user says last.
        settings: how δ is optimised; default as for the layer, those of `rome-fast tune` at the layer it chose. A
            mapping changes some fields of that default.
        rounds: how often values are searched. From the second time on they are found with the update of the time before
            in the model, on top of what has arrived of the edits: these answer more surely and in more wordings, for
            two thirds as much time again (docs/methods.md). Not of a model whose weights are read while it runs.
        guard: what to do with an edit predicted to collapse the model, before anything is written: "raise",
            "warn", "skip" (leave that edit out) or "off". Unless it is "off", edits made together whose keys are too
            near to be told apart without harm are met in part (`Record.missed`), with a SharedKeyWarning.
        unconverged: what to do with an edit whose target leads in less than half of its rows at the end: "skip"
            (leave it out, with a warning), "write" or "raise". One whose loss is not finite is never written.
        measure: whether to fill the records' probabilities (two forward passes over each edit's texts).
        history: what the model was edited to before, `result.history` of the call that did: its keys get nothing added,
            so that the edits of before stay as they are. True for a model that has none; `result.history` is then of
            this call's edits, or of both. Layers and method are those of before.
        out: a new directory for the edited checkpoint.
        in_place: of a checkpoint directory, instead of `out`: change that very directory. A process killed meanwhile
            leaves it as it was or, once any rome_fast command has looked at it again, edited.
        link: "hard" makes the shards of `out` that no edit touches hard links to those of the source, which must not be
            written to then; "copy" shares their space only where the file system copies on write.
        lora: a new directory for the edit as an adapter of PEFT, which belongs to the model before the edit; of a
            checkpoint, beside `out` or in place of it.
        memory: of a checkpoint: how much of it may be in memory at a time, hidden states and buffers included, as
            bytes or "8GiB"; by default what is free. What does not fit is read anew whenever it is needed, and the
            edited bytes are the same. The result's model then has no weights but the edited ones. A budget that holds
            little more than one layer is exceeded by what the process itself and statistics take, and one below 1 GiB
            by up to 128 MiB of hidden states.
        device: of a checkpoint: where it runs, as "cpu" or "cuda:1", by default a GPU where torch finds one; `memory`
            is that of the device. A model in memory runs where it is.
        dtype: of a checkpoint: float32, bfloat16 or float16, by default as it is stored. The edited one is written as
            the model is in memory. Neither with `in_place` nor where the weights are read in parts.
        trust_remote_code: of a checkpoint: whether code in its directory may run.
        distributed: whether the processes of torch.distributed share the search of values. All of them give the same
            model, edits and options; all get the result, equal to that of one process to rounding, but only the first
            one measures and writes.
        progress: called with (edits done, edits in all), each counted as often as there are rounds.
        on_read: called with (bytes read, bytes per second) while weights are read.

    Raises EditError, ArgumentError, ModelError, StatisticsError, CheckpointError, ConvergenceError, CollapseError or
    DistributedError; the model is then as it was before the call, and `out` does not exist.
    """
    edits = asked_edits(edits)
    how = method_named(method)
    check_guard(guard)
    check_schedule(schedule, batch_size)
    check_rounds(rounds)
    check_unconverged(unconverged)
    check_link(link)
    given = given_layers(layer, layers)
    wanted_dtype = checked_dtype(dtype)
    processes = Processes.of_default_group(RESUME) if distributed else ALONE
    destination = Destination(out, in_place, lora)
    destination.check()
    with ExitStack() as stack:
        if isinstance(model, str | Path):
            opened = open_checkpoint(
                stack,
                model,
                tokenizer,
                destination,
                layers=given,
                method=how,
                statistics=statistics,
                memory=memory,
                device=device,
                dtype=wanted_dtype,
                trust_remote_code=trust_remote_code,
                processes=processes,
                on_read=on_read,
            )
        else:
            opened = open_model(model, tokenizer, destination, memory=memory, device=device, dtype=wanted_dtype)
        given_tokenizer = tokenizer
        if in_place and opened.source is not None and tokenizer is not None:
            _check_own(tokenizer, opened.source)
        runner, tokenizer = opened.runner, opened.tokenizer
        if runner.stream is not None:
            check_rounds(rounds, streamed=True)
        admit_tokenizer(tokenizer, runner.model, [f"{edit.text} {edit.target}" for edit in edits])
        chosen = chosen_for(runner, how, given, settings, statistics)
        before = _checked_history(history, runner, chosen, how)
        geometries = Geometries(runner, chosen.layers, checked_statistics(runner, chosen.layers, statistics))
        geometries.check()

        clock = Clock(runner.device)
        stack.enter_context(evaluating(runner.model))
        with clock("contexts"):
            texts = contexts_for(runner.model, tokenizer, contexts, seed)
        if distributed:
            made = (method, schedule, batch_size, rounds, guard, unconverged, before, chosen, texts)
            mine = (Fingerprint.of(runner, chosen.layer).to_json(), edits, *made)
            processes.agree("model, edits, options", repr(mine))
        with clock("rows"):
            requests = [tokenise(runner, tokenizer, edit, texts, how) for edit in edits]
        if any(request.bare for request in requests) or (before is not None and bool(before.first_tokens.any())):
            with clock("first tokens"):
                geometries.first_tokens = first_token_statistics(runner, chosen.layers)
        effect = Effect(runner, tokenizer, edits, texts) if measure and processes.rank == 0 else None
        if effect is not None:
            with clock("measure"):
                effect.before()

        total = rounds * len(edits)
        search = Search(
            runner, tokenizer, chosen.layers, how, texts, chosen.settings, clock, progress, total, processes
        )
        closing = Closing(runner, how, geometries, guard, before)
        flow = Flow(search, closing, guard, unconverged, len(edits), rounds)
        groups = [requests] if schedule == "joint" else _batches(requests, batch_size)
        with _undone_on_failure(runner.model) as applied:
            records = _apply_in_turn(flow, groups, applied)
            tell_nearest(records, flow.keys)
            nll = None
            if effect is not None:
                with clock("measure"):
                    nll = effect.after(records)
                for request, record in zip(requests, records, strict=True):
                    if request.bare is not None:
                        record.needs_prefix = not record.argmax_after
            # What the first process has measured, all of them act on, and none reads any more when it writes.
            nll = processes.gather(nll)[0]
            judge_drift(nll, guard)
            delta = applied.delta
            delta.metadata.update(
                method=how.name,
                layers=json.dumps(chosen.layers),
                model_type=runner.model.config.model_type,
                contexts=json.dumps(texts, ensure_ascii=False),
            )
            result = EditResult(
                runner.model,
                delta,
                records,
                texts,
                schedule,
                chosen.settings,
                flow.condition,
                chosen.layer_source,
                clock.seconds,
                tokenizer,
                nll,
                None if before is None else closing.history_by_now(),
                None if runner.stream is None else runner.stream.rates,
                rounds,
            )
            if processes.rank == 0:
                _write(result, opened, destination, link, given_tokenizer)
        return result


def verify(model: PreTrainedModel, layer: int | None = None) -> Verified:
    """What was found out about a model by running it, and how it is therefore edited.

    See `rome_fast.models.verification`.

    `layer` is the one to edit, by default as in `apply_edits`. Raises ModelError, which says what was found, for a
    model that cannot be edited, and ArgumentError for a layer that it does not have.
    """
    runner = Runner(model)
    return verified(runner, checked_layer(runner, layer))


def checked_layer(runner: Runner, layer: int | None) -> int:
    """The layer to edit, by default the model's one; ArgumentError for one that it does not have."""
    if layer is None:
        return runner.decoder.nearest_site(default_layer(runner.model.config))
    (checked,) = checked_layers(layer, len(runner.layers))
    return checked


def chosen_for(
    runner: Runner,
    how: Method,
    given: tuple[int, ...] | None,
    settings: ValueSettings | Mapping[str, Any] | None,
    statistics: Statistics | str | None,
) -> Selection:
    """Layers and settings for this very model, whose weights and layers have been checked."""
    chosen = _selected(runner, how, given, settings, statistics)
    check_weights(runner, chosen.layers)
    return _verified(runner, chosen, given)


def _selected(
    runner: Runner,
    how: Method,
    given: tuple[int, ...] | None,
    settings: ValueSettings | Mapping[str, Any] | None,
    statistics: Statistics | str | None,
) -> Selection:
    given = None if given is None else checked_layers(given, len(runner.layers))
    config = runner.model.config
    chosen = select(config, given, settings, tuned_choice(runner, statistics), spread=how.spread)
    return chosen if given is not None else replace(chosen, layers=runner.decoder.sites_of(chosen.layers))


def _verified(runner: Runner, chosen: Selection, given: tuple[int, ...] | None) -> Selection:
    """The same, checked; of several layers that nobody asked for the last one alone, where δ cannot be shared out."""
    if given is None:
        return replace(chosen, layers=shared_out(runner, chosen.layers))
    check_shared_out(runner, chosen.layers)
    return chosen


def check_schedule(schedule: str, batch_size: int) -> None:
    """ArgumentError for what is no schedule, and for groups of no size."""
    if schedule not in ("joint", "sequential"):
        raise ArgumentError(f"schedule: got {schedule!r}, wanted 'joint' or 'sequential'")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size: got {batch_size!r}, wanted at least 1, a whole number")


def check_rounds(rounds: object, *, streamed: bool = False) -> None:
    """ArgumentError for no number of rounds, and of a model that is read while it runs for more than one."""
    if type(rounds) is not int or rounds < 1:
        raise ArgumentError(f"rounds: got {rounds!r}, wanted at least 1, a whole number")
    if streamed and rounds > 1:
        raise ArgumentError(
            f"rounds: got {rounds} for a model whose weights are read while it runs, wanted 1, or memory for all of it"
        )


def _checked_history(given: History | bool, runner: Runner, chosen: Selection, how: Method) -> History | None:
    """The one that this call goes on from; None where nobody asks for any."""
    check_kind_of_history(given)
    if isinstance(given, bool):
        return History.none(runner, chosen.layers, len(how.columns)) if given else None
    given.check(runner, chosen.layers, len(how.columns))
    return given


def check_kind_of_history(given: object) -> None:
    """ArgumentError for what is neither a history nor whether there is to be one."""
    if not isinstance(given, History | bool):
        raise ArgumentError(f"history: got {type(given).__name__}, wanted result.history of an earlier edit, or True")


def checked_statistics(
    runner: Runner, layers: tuple[int, ...], statistics: Statistics | str | None
) -> Statistics | None:
    """Those of this model's layers, from the cache where none are given; None for C = I."""
    check_kind_of_statistics(statistics, layers)
    if isinstance(statistics, str):
        return None
    return Statistics.cached(runner, layers) if statistics is None else statistics


def check_kind_of_statistics(statistics: object, layers: Sequence[int]) -> None:
    """ArgumentError for another text than "identity", StatisticsError for what is neither that, None nor statistics."""
    if isinstance(statistics, str):
        if statistics != "identity":
            raise ArgumentError(f"statistics: got {statistics!r}, wanted a Statistics, 'identity' or None")
    elif not isinstance(statistics, Statistics | None):
        raise StatisticsError(
            f"statistics: got {type(statistics).__name__}, wanted a Statistics, 'identity' or None; make them with "
            f"rome_fast.collect_statistics(model, tokenizer, texts, layers={list(layers)})"
        )


def contexts_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Sequence[str] | None, seed: int
) -> tuple[str, ...]:
    """The prefix contexts given, checked, or else sampled ones; ArgumentError for a seed that is no whole number."""
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed: got {seed!r}, wanted a whole number of 64 bits")
    return checked_contexts(sample_contexts(model, tokenizer, seed=seed) if given is None else given)


def checked_contexts(given: Sequence[str]) -> tuple[str, ...]:
    """ArgumentError for none, for one that does not end in a space, and for one text in place of several."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentError(f"contexts: got {given!r}, wanted texts that end in a space, as ['It rained. ']")
    contexts = tuple(given)
    bad = [c for c in contexts if not isinstance(c, str) or not c.strip() or not c[-1].isspace()]
    if not contexts or bad:
        raise ArgumentError(
            f"contexts: got {bad or 'none'}, wanted texts that are not empty and end in a space, as 'It rained. '"
        )
    return contexts


def _batches(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]


@dataclass
class _Applied:
    """A Delta that is in a model as far as it goes."""

    model: PreTrainedModel
    delta: Delta = field(default_factory=lambda: Delta({}))

    def add(self, step: Delta) -> None:
        # Applied afresh from the original weights, so that each parameter is rounded once.
        self.undo()
        self.delta = self.delta.merge(step)
        self.delta.apply(self.model)

    def undo(self) -> None:
        if self.delta.is_applied:
            self.delta.revert(self.model)


@contextmanager
def _undone_on_failure(model: PreTrainedModel) -> Iterator[_Applied]:
    applied = _Applied(model)
    try:
        yield applied
    except BaseException:
        applied.undo()
        raise


def _apply_in_turn(flow: Flow, groups: Sequence[Sequence[Request]], applied: _Applied) -> list[Record]:
    """Every group on the model as edited so far; raises ConvergenceError where no edit has a finite loss."""
    records: list[Record] = []
    for group in groups:
        step, made = flow.solve(group)
        records += made
        if step is not None:
            applied.add(step)
    if not any(math.isfinite(record.loss) for record in records):
        raise unconverged_error(records)
    return records


def _check_own(tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
    if saving.is_another_tokenizer(tokenizer, source):
        raise ArgumentError(
            f"tokenizer: got another one than {source} has, which in_place=True leaves there; save it there first, by "
            "tokenizer.save_pretrained, or give out="
        )


def _write(
    result: EditResult,
    opened: Opened,
    destination: Destination,
    link: Link,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    lora, out = destination.lora, destination.out
    if lora is not None:
        result.check_applied("lora")
        result.delta.to_lora(lora, result.model)
    if out is None and not destination.in_place:
        return
    try:
        if out is not None and (opened.source is None or opened.converted):
            result.save(out, opened.source, link)
        elif opened.source is not None:
            result.check_applied()
            saving.save_edited(result.model, result.delta, opened.source, out, tokenizer=tokenizer, link=link)
    except BaseException:
        # The adapter that was written before it goes as well.
        if lora is not None:
            shutil.rmtree(lora, ignore_errors=True)
        raise
