"""apply_edits: from requests to an edited model, readable top to bottom.

edits → rows → keys, values → method → Delta → guard → weights
"""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoints
from .contexts import sample_contexts
from .defaults import default_layer, default_settings
from .delta import Delta
from .edits import Edit, find_conflicts
from .errors import ArgumentError, ModelError, StatisticsError
from .evaluation import score
from .fingerprint import Fingerprint
from .flow import Clock, Flow, Progress, Unconverged, tokenise, unconverged_error
from .guard import Guard, check_guard
from .methods import hold_first_tokens, variant
from .processes import ALONE, Processes
from .records import Record
from .rows import check_tokenizer
from .runner import Runner, evaluating
from .statistics import LayerStatistics, Statistics, first_token_statistics
from .values import ValueSettings, compute_dtype
from .verification import Verified, verified
from .weights import Link, OnRead, align_, check_link

RESUME = "nothing was written: run the same command again"
"""What to do when one of several processes has died."""

_CHECKED_AT_ONCE = 1 << 20  # elements; a sum in fp32 copies what it sums


@dataclass
class EditResult:
    """What an edit did, and the way back."""

    model: PreTrainedModel
    delta: Delta
    records: list[Record]
    contexts: tuple[str, ...]
    schedule: str
    settings: ValueSettings
    condition: float  # of the joint closed form; 1 for a single key
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage

    def revert(self) -> None:
        """Restore the model's weights bit for bit; where every edit was left out they never changed."""
        if self.delta.updates:
            self.delta.revert(self.model)

    def save(self, out: str | Path, source: str | Path | None = None, link: Link = "copy") -> None:
        """Write the edited model as a complete checkpoint directory `out`; see `rome_fast.checkpoints.write`.

        `source` is the checkpoint the model was loaded from, by default the one it says itself.
        """
        checkpoints.check_new(out)
        self.check_applied()
        directory = checkpoints.resolve(source or _origin(self.model))
        checkpoints.write(directory, out, self.model, self.delta, self.report(), link)

    def check_applied(self) -> None:
        """Raise ArgumentError where every edit was left out."""
        if not self.delta.updates:
            raise ArgumentError("out: no edit was applied, so there is no edited model to write")

    def report(self) -> dict[str, Any]:
        """Everything that is needed to read or repeat this edit, as JSON values."""
        return {
            "model": str(self.model.config._name_or_path),
            "method": self.records[0].method,
            "layer": self.records[0].layer,
            "schedule": self.schedule,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "compute_dtype": str(compute_dtype(Runner(self.model), self.settings)).removeprefix("torch."),
            "edits": [record.to_json() for record in self.records],
            "contexts": list(self.contexts),
            "settings": asdict(self.settings),
            "condition": self.condition,
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
    batch_size: int = 1,
    guard: Guard = "raise",
    unconverged: Unconverged = "skip",
    seed: int = 0,
    measure: bool = True,
    out: str | Path | None = None,
    in_place: bool = False,
    link: Link = "copy",
    memory: int | str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    distributed: bool = False,
    progress: Progress | None = None,
    on_read: OnRead | None = None,
) -> EditResult:
    """Edit facts into a model, in memory or into a new checkpoint.

    Args:
        model: a transformers causal language model of a known family, in any float dtype: the same object is
            edited, and `result.revert()` restores it. Or the directory (or hub id) of a checkpoint, which is only
            read; the edited one is written to `out`.
        edits: one or more requests. With `schedule="joint"` one closed-form update satisfies all of them; with
            "sequential" `batch_size` of them at a time, each batch on the model as edited so far. Either way one
            Delta comes out.
        tokenizer: the model's fast tokenizer; not needed for a checkpoint, which has its own.
        statistics: second moments of this model's keys, "identity" for C = I, or None to look in the cache.
        method: "c-rome", "rome", "c-rome-released", "p-rome", or "dual", which is c-rome but for subjects that are the
            first token: those answer without a prefix as well. It needs the keys of all first tokens, which the first
            such edit of a model collects in one pass over the vocabulary and keeps in the cache.
        layer: edit layer; default by model, see `rome_fast.defaults`.
        contexts: prefix contexts, each ending in a space; default 20 sampled with `seed`.
        settings: how δ is optimised; default by model.
        guard: what to do with an edit predicted to collapse the model, before anything is written: "raise",
            "warn", "skip" (leave that edit out) or "off". Unless it is "off", edits made together whose keys are too
            near to be told apart without harm are met in part (`Record.missed`), with a SharedKeyWarning.
        unconverged: what to do with an edit whose target leads in less than half of its rows at the end: "skip"
            (leave it out, with a warning), "write" or "raise". One whose loss is not finite is never written.
        measure: whether to fill the records' probabilities (two forward passes over each edit's texts).
        out: a new directory for the edited checkpoint.
        in_place: of a checkpoint directory, instead of `out`: change that very directory. A process killed meanwhile
            leaves it as it was or, once any rome_fast command has looked at it again, edited.
        link: "hard" makes the shards of `out` that no edit touches hard links to those of the source, which must not be
            written to then; "copy" shares their space only where the file system copies on write.
        memory: of a checkpoint: how much of it may be in memory at a time, hidden states and buffers included, as
            bytes or "8GiB"; by default what is free. What does not fit is read anew whenever it is needed, and the
            edited bytes are the same. The result's model then has no weights but the edited ones. A budget that holds
            little more than one layer is exceeded by what the process itself and statistics take, and one below 1 GiB
            by up to 128 MiB of hidden states.
        device: of a checkpoint: where it runs, as "cuda"; `memory` is then that of the device.
        trust_remote_code: of a checkpoint: whether code in its directory may run.
        distributed: whether the processes of torch.distributed share the search of values. All of them give the same
            model, edits and options; all get the result, equal to that of one process to rounding, but only the first
            one measures and writes.
        progress: called with (edits done, edits in all).
        on_read: called with (bytes read, bytes per second) while weights are read.

    Raises EditError, ArgumentError, ModelError, StatisticsError, CheckpointError, ConvergenceError, CollapseError or
    DistributedError; the model is then as it was before the call, and `out` does not exist.
    """
    edits = _checked_edits(edits)
    how = variant(method)
    check_guard(guard)
    if schedule not in ("joint", "sequential"):
        raise ArgumentError(f"schedule: got {schedule!r}, wanted 'joint' or 'sequential'")
    if unconverged not in get_args(Unconverged):
        raise ArgumentError(f"unconverged: got {unconverged!r}, wanted one of {', '.join(get_args(Unconverged))}")
    if batch_size < 1:
        raise ArgumentError(f"batch_size: got {batch_size}, wanted at least 1")
    check_link(link)
    processes = Processes.of_default_group(RESUME) if distributed else ALONE
    first = processes.rank == 0
    if out is not None:
        checkpoints.check_new(out)
        if in_place:
            raise ArgumentError(f"out: got {out} and in_place=True, wanted one of them")
    with ExitStack() as stack:
        stream = None
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ArgumentError("tokenizer: got None, wanted the model's tokenizer, since the model is in memory")
            if in_place:
                raise ArgumentError("in_place: got True for a model in memory, which is edited itself in any case")
            if memory is not None:
                raise ArgumentError("memory: got a budget for a model that is in memory already; give its checkpoint")
            source = None if out is None else Path(_origin(model))
        else:
            if not isinstance(model, str | Path):
                raise ModelError(
                    f"model: got {type(model).__name__}, wanted a transformers PreTrainedModel or the path of a "
                    "checkpoint"
                )
            if out is None and not in_place:
                raise ArgumentError(
                    "out: got None, wanted a new directory, since the model is a checkpoint on disk; "
                    "in_place=True changes the checkpoint itself"
                )
            if in_place and first:
                stack.enter_context(checkpoints.changing_in_place(model))
            # Where it was found to be cut short, that has been put right by now.
            processes.wait()
            outline = checkpoints.outline(
                model,
                memory=memory,
                layer=layer,
                device=device,
                identity=isinstance(statistics, str),
                trust_remote_code=trust_remote_code,
            )
            source = outline.directory
            own_tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trust_remote_code)
            if outline.placement is None:
                model = checkpoints.load_model(source, device=device, trust_remote_code=trust_remote_code)
            else:
                stream = stack.enter_context(closing(outline.stream(on_read)))
                model = stream.model
            tokenizer = tokenizer or own_tokenizer
        check_tokenizer(tokenizer)
        align_(model)
        runner = Runner(model, stream)
        layer = _checked_layer(runner, layer)
        _check_weights(runner, layer)
        verified(runner, layer)
        entry = _checked_statistics(runner, layer, statistics)
        factor = None if entry is None else entry.factor(runner.device)
        settings = default_settings(model.config) if settings is None else settings
        if not isinstance(settings, ValueSettings):
            raise ArgumentError(f"settings: got {type(settings).__name__}, wanted a rome_fast.ValueSettings or None")

        clock = Clock(runner.device)
        delta = Delta({})
        with evaluating(model):
            try:
                with clock("contexts"):
                    chosen = tuple(sample_contexts(model, tokenizer, seed=seed) if contexts is None else contexts)
                    _check_contexts(chosen)
                    if distributed:
                        given = (
                            Fingerprint.of(runner, layer).to_json(),
                            edits,
                            method,
                            layer,
                            schedule,
                            settings,
                            chosen,
                        )
                        processes.agree("model, edits, options", repr(given))
                with clock("rows"):
                    requests = [tokenise(runner, tokenizer, edit, chosen, how) for edit in edits]
                held = None
                if any(request.bare for request in requests):
                    with clock("first tokens"):
                        first_tokens = first_token_statistics(runner, layer).moment.to(runner.device)
                        held = hold_first_tokens(factor, first_tokens)
                with clock("measure"):
                    before = _probabilities(runner, tokenizer, edits) if measure and first else None
                flow = Flow(
                    runner,
                    tokenizer,
                    layer,
                    how,
                    chosen,
                    factor,
                    settings,
                    guard,
                    unconverged,
                    clock,
                    progress,
                    len(edits),
                    limit=None if entry is None else entry.collapse_limit,
                    first_token_factor=held,
                    processes=processes,
                )
                records: list[Record] = []
                size = len(requests) if schedule == "joint" else batch_size
                for start in range(0, len(requests), size):
                    step, made = flow.solve(requests[start : start + size])
                    records += made
                    if step is not None:
                        # Applied afresh from the original weights, so that each parameter is rounded once.
                        if delta.is_applied:
                            delta.revert(model)
                        delta = delta.merge(step)
                        delta.apply(model)
                if not any(math.isfinite(record.loss) for record in records):
                    raise unconverged_error(records)
                if before is not None:
                    with clock("measure"):
                        _fill_probabilities(runner, tokenizer, edits, chosen, records, before)
                        for request, record in zip(requests, records, strict=True):
                            if request.bare is not None:
                                record.needs_prefix = not record.argmax_after
                delta.metadata.update(
                    method=method,
                    layer=str(layer),
                    model_type=model.config.model_type,
                    contexts=json.dumps(chosen, ensure_ascii=False),
                )
                result = EditResult(model, delta, records, chosen, schedule, settings, flow.condition, clock.seconds)
                # Nothing is written while another process still reads.
                processes.wait()
                if out is not None and first:
                    result.save(out, source, link)
                elif in_place and first and source is not None:
                    result.check_applied()
                    checkpoints.write(source, None, model, delta, result.report())
            except BaseException:
                if delta.is_applied:
                    delta.revert(model)
                raise
        return result


def verify(model: PreTrainedModel, layer: int | None = None) -> Verified:
    """What was found out about a model by running it, and how it is therefore edited; see `rome_fast.verification`.

    `layer` is the one to edit, by default as in `apply_edits`. Raises ModelError, which says what was found, for a
    model that cannot be edited, and ArgumentError for a layer that it does not have.
    """
    runner = Runner(model)
    return verified(runner, _checked_layer(runner, layer))


def _origin(model: PreTrainedModel) -> str:
    """Where a model says it was loaded from."""
    name = model.config._name_or_path
    if not name:
        raise ArgumentError(
            "out: the model in memory does not say which checkpoint it was loaded from; save it with "
            "model.save_pretrained() and edit that directory, or call result.save(out, source=...)"
        )
    return str(name)


def _checked_edits(given: object) -> list[Edit]:
    items = list(given) if isinstance(given, Iterable) else [given]
    if not items:
        raise ArgumentError("edits: got none, wanted at least one")
    edits = [item for item in items if isinstance(item, Edit)]
    if len(edits) < len(items):
        strangers = ", ".join(sorted({type(item).__name__ for item in items if not isinstance(item, Edit)}))
        raise ArgumentError(
            f"edits: got {strangers}, wanted rome_fast.Edit objects; read a file with rome_fast.load_edits"
        )
    find_conflicts(edits)
    return edits


def _checked_layer(runner: Runner, layer: int | None) -> int:
    count = len(runner.layers)
    if layer is None:
        return runner.decoder.nearest_site(default_layer(runner.model.config))
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
        raise ArgumentError(f"layer: got {layer!r}, wanted one of 0 .. {count - 1}")
    return layer


def _check_weights(runner: Runner, layer: int) -> None:
    """NaN anywhere makes every later figure meaningless; name the parameter before any work is done."""
    weight = runner.stored_weight(layer)
    if not _is_wide(weight):
        raise ModelError(
            f"model: the weight of layer {layer} has dtype {weight.dtype}, wanted bfloat16, float16, float32 or "
            "float64; load the model without quantisation"
        )
    for name, parameter in runner.parameters():
        if not _is_wide(parameter):
            continue
        if not all(map(_is_finite, parameter.detach().reshape(-1).split(_CHECKED_AT_ONCE))):
            raise ModelError(f"model: {name} contains NaN or infinity; load an undamaged checkpoint")


def _is_finite(part: Tensor) -> bool:
    # One read of the weights: a sum is finite unless an element is not, or it overflows, which is looked into.
    total = part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(part).all())


def _is_wide(weight: Tensor) -> bool:
    """A float dtype that arithmetic is defined for: not one of those that only store quantised weights."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize >= 2


def _checked_statistics(runner: Runner, layer: int, statistics: Statistics | str | None) -> LayerStatistics | None:
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
    return statistics.for_layer(runner, layer)


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
