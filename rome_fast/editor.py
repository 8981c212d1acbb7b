"""apply_edits: from requests to an edited model, readable top to bottom.

edits → rows → keys, values → method → Delta → guard → weights
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import chains, checkpoints, saving
from .admission import admit_model, admit_tokenizer, checked_dtype, plain_modes
from .contexts import sample_contexts
from .defaults import LayerSource, default_layer, select
from .delta import Delta
from .edits import Edit, checked_edits, find_conflicts
from .errors import ArgumentError, ModelError, StatisticsError
from .evaluation import score
from .fingerprint import Fingerprint
from .flow import Clock, Flow, Progress, Unconverged, tokenise, unconverged_error
from .guard import Guard, check_guard
from .methods import hold_first_tokens, variant
from .processes import ALONE, Processes, own_device
from .records import Record, report_json
from .rows import asked
from .runner import Runner, evaluating
from .statistics import LayerStatistics, Statistics, first_token_statistics, likely_layer, tuned_choice
from .values import ValueSettings, compute_dtype
from .verification import Verified, verified
from .weights import Link, OnRead, Stream, align_, check_link
from .weights.files import check_writable

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
    layer_source: LayerSource = "given"  # who says which layer
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Kept with the Delta, for as long as the edit is in the model; it must not hold the model itself.
        self.delta.report.update(
            model=str(self.model.config._name_or_path),
            method=self.records[0].method,
            layer=self.records[0].layer,
            layer_source=self.layer_source,
            schedule=self.schedule,
            dtype=str(self.model.dtype).removeprefix("torch."),
            compute_dtype=str(compute_dtype(Runner(self.model), self.settings)).removeprefix("torch."),
            edits=self.records,
            contexts=list(self.contexts),
            settings=asdict(self.settings),
            condition=self.condition,
            seconds=self.seconds,
        )

    def revert(self) -> None:
        """Restore the model's weights bit for bit; where every edit was left out they never changed."""
        if self.delta.updates:
            self.delta.revert(self.model)

    def save(self, out: str | Path, source: str | Path | None = None, link: Link = "copy") -> None:
        """Write the model in memory as a complete checkpoint directory `out`, exactly as it is.

        That is with all the edits that are in it, before and after this one, each of which `rome-fast revert` undoes,
        the last one first. What the edits did not touch is copied from `source`, the checkpoint that the model was
        loaded from, by default the one it says itself, once every weight was found to be the same there. Where one is
        not (an adapter was merged, the dtype, the vocabulary or the config is another, the model was trained, or there
        is no such checkpoint), the model is written as by `save_pretrained`, with its tokenizer; `link` is then of no
        use, and the record in `out/rome_fast` says what differs.

        Raises ArgumentError where `out` exists or cannot be made, every edit was left out, or this one is not in the
        model any more; ModelError for a model that cannot be stored; CheckpointError for a `source` that was given and
        is no checkpoint, and a full disk.
        """
        self.check_applied()
        saving.save(self.model, self.delta, out, source, tokenizer=self.tokenizer, link=link)

    def check_applied(self, argument: str = "out") -> None:
        """Raise ArgumentError where every edit was left out."""
        if not self.delta.updates:
            reasons = ", ".join(sorted({record.left_out for record in self.records if record.left_out is not None}))
            raise ArgumentError(f"{argument}: no edit was applied ({reasons}), so there is no edited model to write")

    def report(self) -> dict[str, Any]:
        """Everything that is needed to read or repeat this edit, as JSON values."""
        return report_json(self.delta.report)


@plain_modes()
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
    settings: ValueSettings | Mapping[str, Any] | None = None,
    batch_size: int = 1,
    guard: Guard = "raise",
    unconverged: Unconverged = "skip",
    seed: int = 0,
    measure: bool = True,
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
        tokenizer: the model's fast tokenizer; not needed for a checkpoint, which has its own.
        statistics: second moments of this model's keys, "identity" for C = I, or None to look in the cache.
        method: "c-rome", "rome", "c-rome-released", "p-rome", or "dual", which is c-rome but for subjects that are the
            first token: those answer without a prefix as well. It needs the keys of all first tokens, which the first
            such edit of a model collects in one pass over the vocabulary and keeps in the cache.
        layer: edit layer; by default the one that `rome-fast tune` chose for this very model, as `statistics` say or,
            where none are given, the cache does; else by model, see `rome_fast.defaults`. `result.layer_source` says
            whose it was.
        contexts: prefix contexts, each ending in a space; default 20 sampled with `seed`. They stand before a prompt,
            in a chat before what the user says last.
        settings: how δ is optimised; default as for the layer, those of `rome-fast tune` at the layer it chose. A
            mapping changes some fields of that default.
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
    wanted_dtype = checked_dtype(dtype)
    processes = Processes.of_default_group(RESUME) if distributed else ALONE
    first = processes.rank == 0
    if out is not None:
        checkpoints.check_new(out)
        check_writable(Path(out))
        if in_place:
            raise ArgumentError(f"out: got {out} and in_place=True, wanted one of them")
    if lora is not None:
        _check_adapter(lora, out, in_place)
    with ExitStack() as stack:
        stream = None
        if not isinstance(model, str | Path):
            admit_model(model, or_path=True)
            if tokenizer is None:
                raise ArgumentError("tokenizer: got None, wanted the model's tokenizer, since the model is in memory")
            if in_place:
                raise ArgumentError("in_place: got True for a model in memory, which is edited itself in any case")
            if memory is not None:
                raise ArgumentError("memory: got a budget for a model that is in memory already; give its checkpoint")
            _check_where_it_is(model, device, wanted_dtype)
            source: Path | None = None
            converted = False
        else:
            if out is None and lora is None and not in_place:
                raise ArgumentError(
                    "out: got None, wanted a new directory, since the model is a checkpoint on disk; "
                    "in_place=True changes the checkpoint itself"
                )
            device = own_device(device)
            if in_place and first:
                stack.enter_context(chains.changing_in_place(model))
            # Where it was found to be cut short, that has been put right by now.
            processes.wait()
            outlined = partial(
                checkpoints.outline,
                model,
                memory=memory,
                device=device,
                identity=isinstance(statistics, str),
                dtype=wanted_dtype,
                trust_remote_code=trust_remote_code,
            )
            outline = outlined(layer=partial(likely_layer, statistics=statistics) if layer is None else layer)
            stored = outline.skeleton.dtype
            converted = wanted_dtype not in (None, stored)
            if in_place and converted:
                raise ArgumentError(
                    f"dtype: got {wanted_dtype} with in_place=True, where weights stay in {stored}; give a "
                    "new directory as out"
                )
            source = outline.directory
            chains.check_continues(source)
            _check_outside(source, out=out, lora=lora)
            own_tokenizer = checkpoints.load_tokenizer(source, trust_remote_code=trust_remote_code)
            if outline.placement is None:
                model = checkpoints.load_model(
                    source, device=device, dtype=wanted_dtype, trust_remote_code=trust_remote_code
                )
                admit_model(model)
            else:
                stream = outline.stream(on_read)
                if layer is None:
                    stream = _at_its_layer(stream, outline, outlined, statistics, on_read)
                stack.enter_context(closing(stream))
                model = stream.model
            tokenizer = tokenizer or own_tokenizer
        admit_tokenizer(tokenizer, model, [f"{edit.text} {edit.target}" for edit in edits])
        align_(model)
        runner = Runner(model, stream)
        wanted = None if layer is None else checked_layer(runner, layer)
        selection = select(model.config, wanted, settings, tuned_choice(runner, statistics))
        layer = selection.layer if wanted is not None else runner.decoder.nearest_site(selection.layer)
        chosen_settings = selection.settings
        _check_weights(runner, layer)
        verified(runner, layer)
        entry = _checked_statistics(runner, layer, statistics)
        factor = None if entry is None else entry.factor(runner.device)

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
                            chosen_settings,
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
                    chosen_settings,
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
                result = EditResult(
                    model,
                    delta,
                    records,
                    chosen,
                    schedule,
                    chosen_settings,
                    flow.condition,
                    selection.layer_source,
                    clock.seconds,
                    tokenizer,
                )
                # Nothing is written while another process still reads.
                processes.wait()
                if first and lora is not None:
                    result.check_applied("lora")
                    delta.to_lora(lora, model)
                if first and (out is not None or in_place):
                    with _without(lora):
                        if out is not None and (source is None or converted):
                            result.save(out, source, link)
                        elif source is not None:
                            result.check_applied()
                            saving.save_edited(model, delta, source, out, link=link)
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
    return verified(runner, checked_layer(runner, layer))


def _check_adapter(lora: str | Path, out: str | Path | None, in_place: bool) -> None:
    """Raise ArgumentError for a place where no adapter could be written later, or a model it would not belong to."""
    place = Path(lora).absolute()
    if place.exists():
        raise ArgumentError(f"lora: {lora} exists already; choose a new name or remove it")
    if out is not None and (place == Path(out).absolute() or Path(out).absolute() in place.parents):
        raise ArgumentError(f"lora: got {lora}, the same as out or inside of it, wanted another directory")
    if in_place:
        raise ArgumentError("lora: got it with in_place=True, where the model that the adapter belongs to is gone")
    check_writable(place)


def _check_outside(source: Path, **places: str | Path | None) -> None:
    """Raise ArgumentError for a place to write to that is in the source."""
    for name, place in places.items():
        if place is not None and source.resolve() in Path(place).resolve().parents:
            raise ArgumentError(f"{name}: {place} lies inside the source, which is only read; choose another place")


@contextmanager
def _without(lora: str | Path | None) -> Iterator[None]:
    """Where the block fails, the adapter that was written before it goes as well."""
    try:
        yield
    except BaseException:
        if lora is not None:
            shutil.rmtree(lora, ignore_errors=True)
        raise


def _check_where_it_is(model: PreTrainedModel, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise ArgumentError for a device or dtype that a model in memory does not have."""
    have, want = model.device, None if device is None else checkpoints.checked_device(device)
    if want is not None and (want.type != have.type or want.index not in (None, have.index)):
        raise ArgumentError(
            f"device: got {device} for a model in memory on {have}; move it by model.to({str(device)!r})"
        )
    if dtype not in (None, model.dtype):
        raise ArgumentError(
            f"dtype: got {dtype} for a model in memory in {model.dtype}; convert it by model.to({dtype})"
        )


def _checked_edits(given: object) -> list[Edit]:
    edits = checked_edits(given)
    if not edits:
        raise ArgumentError("edits: got none, wanted at least one")
    find_conflicts(edits)
    return edits


def checked_layer(runner: Runner, layer: int | None) -> int:
    """The layer to edit, by default the model's; ArgumentError for one that it does not have."""
    count = len(runner.layers)
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count):
        raise ArgumentError(f"layer: got {layer!r}, wanted one of 0 .. {count - 1}")
    return runner.decoder.nearest_site(default_layer(runner.model.config)) if layer is None else layer


def _at_its_layer(
    stream: Stream,
    outline: checkpoints.Outline,
    outlined: Callable[..., checkpoints.Outline],
    statistics: Statistics | str | None,
    on_read: OnRead | None,
) -> Stream:
    """The stream with the edit layer in place: which one `rome-fast tune` chose, only weights tell for certain."""
    try:
        config = stream.model.config
        layer = select(config, tuned=tuned_choice(Runner(stream.model, stream), statistics)).layer
        if layer == outline.layer:
            return stream
    except BaseException:
        stream.close()
        raise
    stream.close()
    return outlined(layer=layer).stream(on_read)


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
    return [s.probability for s in score(runner, tokenizer, [asked(tokenizer, edit) for edit in edits])]


def _fill_probabilities(
    runner: Runner,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    records: Sequence[Record],
    before: Sequence[float],
) -> None:
    pairs = [asked(tokenizer, edit, context) for edit in edits for context in ("", *contexts)]
    scores = score(runner, tokenizer, pairs)
    per_edit = 1 + len(contexts)
    for i, record in enumerate(records):
        bare, *prefixed = scores[i * per_edit : (i + 1) * per_edit]
        record.probability_before = before[i]
        record.probability_after = bare.probability
        record.argmax_after = bare.is_argmax
        record.probability_after_prefixed = sum(s.probability for s in prefixed) / len(prefixed)
        record.argmax_after_prefixed = sum(s.is_argmax for s in prefixed) / len(prefixed)
