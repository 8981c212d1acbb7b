"""`rome-fast bench`: seconds, FLOPs and quality per edit, and against the baseline, interleaved in one run."""

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..closing.flow import Flow
from ..closing.geometry import Geometry
from ..edits import Edit
from ..errors import ArgumentError
from ..evaluation import evaluate, sentence_perplexity, summarise
from ..methods import method_named
from ..models.past import Contexts
from ..models.runner import Runner
from ..models.verification import verified_each
from ..opening.defaults import default_layer, default_settings
from ..records import Record
from ..search.requests import Request, by_head, tokenise
from ..search.search import Clock
from ..search.values import ValueSettings, compute_dtype
from ..updates.delta import Delta
from .flops import FlopCounter, ideal_flops
from .released import ReleasedEdit, edit_as_released
from .roofline import measure_roofline
from .shapes import CONTEXTS, random_factor, random_model, tokenizer_for

Say = Callable[[str], None]

_QUALITY = ("probability", "efficacy", "paraphrase", "neighborhood", "probability_prefixed", "efficacy_prefixed")


@dataclass
class Track:
    """One way of making edits: what it cost and how good its edits are."""

    name: str
    edits: int = 0
    process_seconds: float = 0.0
    wall_seconds: float = 0.0
    flops: float = 0.0
    steps: int = 0
    quality: dict[str, list[float]] = field(default_factory=dict)

    def add_quality(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.quality.setdefault(name, []).append(value)

    def add(self, other: "Track") -> None:
        self.edits += other.edits
        self.process_seconds += other.process_seconds
        self.wall_seconds += other.wall_seconds
        self.flops += other.flops
        self.steps += other.steps
        for name, values in other.quality.items():
            self.quality.setdefault(name, []).extend(values)

    def report(self) -> dict[str, Any]:
        count = max(1, self.edits)
        return {
            "edits": self.edits,
            "process_seconds_per_edit": self.process_seconds / count,
            "seconds_per_edit": self.wall_seconds / count,
            "flops_per_edit": self.flops / count,
            "steps_per_edit": self.steps / count,
            "quality": {name: sum(values) / len(values) for name, values in self.quality.items()},
        }


@dataclass(frozen=True)
class Setup:
    """What all tracks share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    contexts: tuple[str, ...]
    geometries: Mapping[int, Geometry]  # by edit layer, ascending
    method: str
    settings: ValueSettings
    sentences: Sequence[str]  # for the perplexity of each edited model; none for no quality figures

    @property
    def layers(self) -> list[int]:
        return list(self.geometries)

    @property
    def layer(self) -> int:
        """The last of them, where δ is found."""
        return self.layers[-1]

    @property
    def statistics(self) -> str:
        """What the closed form is solved with, in words."""
        return "identity" if self.geometries[self.layer].factor is None else "second moment"

    @property
    def flow(self) -> Flow:
        runner = Runner(self.model)
        # Once for every model, and no part of the edits that are measured.
        verified_each(runner, self.layers)
        return Flow.measuring(
            runner,
            self.tokenizer,
            method_named(self.method),
            self.geometries,
            self.contexts,
            self.settings,
            Clock(self.model.device),
        )


def shape_setup(
    name: str, device: torch.device, dtype: torch.dtype, edits: Sequence[Edit], *, identity: bool = False
) -> tuple[Setup, str]:
    """A random model of a shape with the published settings, and what its tokenizer is.

    Every edit takes all its steps on all its rows: when a random model would have learned a target means nothing.
    C is random, or the identity. Raises ArgumentError for a shape that is unknown or cannot be edited.
    """
    model = random_model(name, device, dtype)
    runner, layer = Runner(model), default_layer(model.config)
    texts = [*CONTEXTS, *(edit.text + edit.continuation(edit.text, edit.target) for edit in edits)]
    tokenizer, what = tokenizer_for(model.config.vocab_size, texts)
    settings = replace(default_settings(model.config), stop="loss", stop_loss=-1.0)
    factor = None if identity else random_factor(runner.weight(layer).shape[1], runner.device)
    return Setup(model, tokenizer, CONTEXTS, {layer: Geometry(factor)}, "c-rome", settings, []), what


@dataclass
class Measured:
    """What was measured of some batches, in sums.

    Each track is one step from the one before it: `wide` forces products in float32, `undrafted` takes all steps on all
    rows, `rule` stops as the released editors do, `released` is the baseline. Of the first two only those are run that
    differ from the track before.
    """

    fast: Track = field(default_factory=lambda: Track("rome_fast"))
    wide: Track = field(default_factory=lambda: Track("rome_fast, products in float32"))
    undrafted: Track = field(default_factory=lambda: Track("rome_fast, without drafts"))
    rule: Track = field(default_factory=lambda: Track("rome_fast, released stop rule"))
    released: Track = field(default_factory=lambda: Track("as released"))
    stages: dict[str, float] = field(default_factory=dict)  # wall seconds of `fast`
    ideal_flops: float = 0.0
    largest_batch: int = 0
    differences: list[float] = field(default_factory=list)  # see `_difference`, of `rule` and `released`
    peak_bytes: int = 0

    def add(self, other: "Measured") -> None:
        for mine, theirs in zip(self.tracks, other.tracks, strict=True):
            mine.add(theirs)
        for stage, seconds in other.stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        self.ideal_flops += other.ideal_flops
        self.largest_batch = max(self.largest_batch, other.largest_batch)
        self.differences += other.differences
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    @property
    def tracks(self) -> tuple[Track, ...]:
        return self.fast, self.wide, self.undrafted, self.rule, self.released

    def shares(self) -> dict[str, float]:
        """By what factor each step between two tracks changes the process time; all of them make up the whole ratio."""
        costs: list[float] = []
        for track in self.tracks:
            costs.append(track.process_seconds / track.edits if track.edits else costs[-1])
        names = ("dtype", "draft", "stop_rule", "algebra")
        return {name: after / before for name, before, after in zip(names, costs, costs[1:], strict=False)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Measured":
        tracks = {f.name: Track(**data[f.name]) for f in fields(cls) if f.type is Track}
        return cls(**(data | tracks))


def bench(
    setup: Setup,
    edits: Sequence[Edit],
    batch: int,
    baseline: bool,
    quality: bool,
    say: Say,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Measure `edits` in batches; with `baseline`, each also as released and by the tracks between, see `Measured`.

    The tracks take turns batch by batch, so that a change of the machine's speed meets all of them. Counting FLOPs
    slows a program down; it is done in runs of its own, which are not timed. On a GPU the first batch is made with two
    steps by every track before anything is timed. The peak memory there includes the baseline's where that runs. A
    batch that stands in the file `kept` is taken from there, any other is added to it.

    The share of the dtype is 1 where products are taken in the model's own, or in float32, which a CPU without
    instructions for 16 bits does for a model in 16 bits too: what the baseline, which does not, loses by it counts as
    algebra.

    Raises ArgumentError where `kept` was measured under other conditions, and for a baseline of several layers.
    """
    if baseline and len(setup.layers) > 1:
        raise ArgumentError(f"baseline: got layers {', '.join(map(str, setup.layers))}, wanted one, as it edits")
    runner = Runner(setup.model)
    base = sentence_perplexity(runner, setup.tokenizer, setup.sentences) if quality else None
    conditions: dict[str, Any] = {
        "model": str(setup.model.config._name_or_path),
        "dtype": str(setup.model.dtype).removeprefix("torch."),
        "compute_dtype": str(compute_dtype(runner, setup.settings)).removeprefix("torch."),  # "auto" resolved
        "device": str(runner.device),
        "threads": torch.get_num_threads(),
        "method": setup.method,
        "layer": setup.layer,
        "layers": setup.layers,
        "statistics": setup.statistics,
        "contexts": len(setup.contexts),
        "batch": batch,
        "settings": asdict(setup.settings),
        "perplexity_before": base,
    }
    known = _read_kept(kept, conditions | {"baseline": baseline})
    roofline = measure_roofline(setup.model.device, compute_dtype(runner, setup.settings))
    on_gpu = is_gpu(runner.device)
    groups = [list(edits[start : start + batch]) for start in range(0, len(edits), batch)]
    if on_gpu:
        if waiting := [group for group in groups if _name(group) not in known]:
            _warm_up(setup, waiting[0], baseline)
        torch.cuda.reset_peak_memory_stats(runner.device)
    total = Measured()
    counts: dict[tuple[int, int], tuple[int, int]] = {}
    for group in groups:
        name = _name(group)
        if name not in known:
            measured = _measure(setup, group, baseline, quality, base, counts)
            measured.peak_bytes = (
                torch.cuda.max_memory_allocated(runner.device)
                if on_gpu
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            known[name] = measured
            if kept is not None:
                line = {"conditions": conditions | {"baseline": baseline}, "edits": name, "measured": asdict(measured)}
                with kept.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line) + "\n")
        total.add(known[name])
        say(_line(*total.tracks))
    weight_bytes = sum(p.nbytes for p in setup.model.parameters())
    mine = total.fast.report()
    flops_per_second = mine["flops_per_edit"] / mine["seconds_per_edit"]
    report: dict[str, Any] = {
        **conditions,
        "largest_batch": total.largest_batch,  # what the memory allowed of it
        **mine,
        "seconds_by_stage": total.stages,
        "ideal_flops_per_edit": total.ideal_flops / max(1, len(edits)),
        "flops_over_ideal": total.fast.flops / total.ideal_flops if total.ideal_flops else None,
        "flops_per_second": flops_per_second,
        "roofline": roofline.to_json(),
        "share_of_matrix_rate": flops_per_second / roofline.matrix_rate,
        # Of the GPU's allocator, or of this process.
        "peak_memory_bytes": total.peak_bytes,
        "weight_bytes": weight_bytes,
        "peak_memory_over_weights": total.peak_bytes / weight_bytes,
    }
    if total.released.edits:
        theirs, middle = total.released.report(), total.rule.report()
        report |= {
            "process_time_ratio": theirs["process_seconds_per_edit"] / mine["process_seconds_per_edit"],
            "flops_ratio": theirs["flops_per_edit"] / mine["flops_per_edit"],
            "share": total.shares(),
            # ‖ΔW − ΔW of the baseline‖ / ‖ΔW of the baseline‖, both with the released stop rule
            "largest_difference": max(total.differences),
            "median_difference": statistics.median(total.differences),
            "as_released": theirs,
            "released_stop_rule": middle,
        }
        for name, track in (("without_drafts", total.undrafted), ("products_in_float32", total.wide)):
            if track.edits:
                report[name] = track.report()
    return report


def _between(setup: Setup) -> dict[str, Setup]:
    """How the tracks between ours and the baseline make edits, by their names in `Measured`."""
    out, settings = {}, setup.settings
    if compute_dtype(Runner(setup.model), settings) not in (setup.model.dtype, torch.float32):
        out["wide"] = settings = replace(settings, compute_dtype="float32")
    if settings.stop == "argmax" and settings.draft_rows:
        out["undrafted"] = settings = replace(settings, draft_rows=0)
    out["rule"] = replace(settings, stop="loss")
    return {name: replace(setup, settings=changed) for name, changed in out.items()}


def _warm_up(setup: Setup, group: Sequence[Edit], baseline: bool) -> None:
    """Make a batch by every track with two steps: the first use of a shape takes longer than all the others."""
    requests = [tokenise(Runner(setup.model), setup.tokenizer, e, setup.contexts, setup.flow.method) for e in group]
    for each in (setup, *(_between(setup).values() if baseline else ())):
        warm_up(each, requests)
    if baseline:
        _as_released(setup, group[0], _short(setup.settings))


def warm_up(setup: Setup, requests: Sequence[Request]) -> None:
    """Make the edits with two steps."""
    replace(setup, settings=_short(setup.settings)).flow.solve_each(requests)


def _short(settings: ValueSettings) -> ValueSettings:
    return replace(settings, steps=min(2, settings.steps), extra_steps=0)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _measure(
    setup: Setup,
    group: Sequence[Edit],
    baseline: bool,
    quality: bool,
    base: float | None,
    counts: dict[tuple[int, int], tuple[int, int]],
) -> Measured:
    """One batch, by every track."""
    out, flow, runner = Measured(), setup.flow, Runner(setup.model)
    requests = [tokenise(runner, setup.tokenizer, e, setup.contexts, flow.method) for e in group]
    made = run_timed(out.fast, flow, requests)
    out.largest_batch = flow.search.largest_batch
    out.stages = dict(flow.search.clock.seconds)
    out.ideal_flops = ideal(setup, requests, [record for _, record in made])
    with FlopCounter() as counter:
        setup.flow.solve_each(requests)
    out.fast.flops = counter.total
    if baseline:
        for name, between in _between(setup).items():
            same_rule = run_timed(getattr(out, name), between.flow, requests)
        # The last one has the baseline's rule, rows and dtype.
        for edit, request, (delta, _) in zip(group, requests, same_rule, strict=True):
            theirs_delta = _run_released(out.released, between, edit, request, quality, base, counts)
            out.differences.append(_difference(delta, theirs_delta))
    if quality:
        for edit, (delta, _) in zip(group, made, strict=True):
            out.fast.add_quality(_quality(setup, edit, delta, base))
    return out


def _name(group: Sequence[Edit]) -> str:
    return json.dumps([[e.prompt, e.subject, e.boundary + e.target, e.end] for e in group], ensure_ascii=False)


def _read_kept(file: Path | None, conditions: dict[str, Any]) -> dict[str, Measured]:
    """The batches of a file by their edits; a line that was cut short by a kill is left out, and cut off."""
    if file is None or not file.exists():
        return {}
    out, whole = {}, 0
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            os.truncate(file, whole)
            break
        whole += len(line)
        data = json.loads(line)
        wanted = json.loads(json.dumps(conditions))
        if other := [key for key, value in wanted.items() if data["conditions"].get(key) != value]:
            raise ArgumentError(
                f"keep: {file} was measured under another {', '.join(other)}; give another file, or delete this one"
            )
        out[data["edits"]] = Measured.from_json(data["measured"])
    return out


def run_timed(track: Track, flow: Flow, requests: Sequence[Request]) -> list[tuple[Delta, Record]]:
    """Make the edits, each alone on the unedited model, and add what that cost to the track."""
    with _timed(track, flow.runner.device):
        made = flow.solve_each(requests)
    track.edits += len(requests)
    track.steps += sum(record.steps for _, record in made)
    return made


@contextmanager
def _timed(track: Track, device: torch.device) -> Iterator[None]:
    """Add the seconds of the block to the track: of its own work, and on a GPU of all of it."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    if is_gpu(device):
        torch.cuda.synchronize(device)
    track.process_seconds += time.process_time() - cpu
    track.wall_seconds += time.perf_counter() - wall


def _run_released(
    track: Track,
    setup: Setup,
    edit: Edit,
    request: Request,
    quality: bool,
    base: float | None,
    counts: dict[tuple[int, int], tuple[int, int]],
) -> Delta:
    """One edit by the baseline; `counts` keeps the FLOPs of one and of two steps by the shape of the padded rows."""
    with _timed(track, setup.model.device):
        made = _as_released(setup, edit, setup.settings)
    steps = len(made.losses)
    track.edits += 1
    track.steps += steps
    # Every step costs the same: one evaluation, and the difference that a second one makes, tell the rest.
    shape = (len(request.rows), max(len(r.row.inputs) for r in request.rows))
    if shape not in counts:
        counted = []
        for few in (1, 2):
            with FlopCounter() as counter:
                _as_released(setup, edit, replace(setup.settings, steps=few))
            counted.append(counter.total)
        counts[shape] = (counted[0], counted[1])
    first, second = counts[shape]
    track.flops += first + (steps - 1) * (second - first)
    if quality:
        track.add_quality(_quality(setup, edit, made.delta, base))
    return made.delta


def _as_released(setup: Setup, edit: Edit, settings: ValueSettings) -> ReleasedEdit:
    return edit_as_released(
        setup.model,
        setup.tokenizer,
        edit,
        setup.contexts,
        layer=setup.layer,
        settings=settings,
        factor=setup.geometries[setup.layer].factor,
        method=setup.method,
    )


def _difference(delta: Delta, wanted: Delta) -> float:
    ((name, update),) = wanted.updates.items()
    truth = update.dense().double()
    return float((delta.updates[name].dense().double() - truth).norm() / truth.norm())


def ideal(setup: Setup, requests: Sequence[Request], records: Sequence[Record]) -> float:
    """FLOPs of these edits in a program that computes nothing twice; see `flops`."""
    runner = Runner(setup.model)
    total = 0.0
    for head, places in by_head(requests):
        contexts = Contexts.of(runner, setup.tokenizer, ["", *setup.contexts], setup.layers, head=head)
        some, made = [requests[i] for i in places], [records[i] for i in places]
        total += ideal_flops(runner, contexts, some, made, setup.layers, setup.settings)
    return total


def _quality(setup: Setup, edit: Edit, delta: Delta, base: float | None) -> dict[str, float]:
    delta.apply(setup.model)
    try:
        measured = evaluate(setup.model, setup.tokenizer, [edit], setup.contexts[:4], answer_tokens=0)
        figures = summarise(measured)
        figures = {name: figures[name] for name in _QUALITY if name in figures}
        if base is not None:
            perplexity = sentence_perplexity(Runner(setup.model), setup.tokenizer, setup.sentences)
            figures["perplexity_ratio"] = perplexity / base
    finally:
        delta.revert(setup.model)
    return figures


def _line(*tracks: Track) -> str:
    parts = [
        f"{t.name}: {t.edits} edits, {t.process_seconds / t.edits:.2f} CPU s, {t.wall_seconds / t.edits:.2f} s each"
        for t in tracks
        if t.edits
    ]
    return "; ".join(parts)
