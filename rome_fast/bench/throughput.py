"""`rome-fast bench`: seconds, FLOPs and quality per edit, and against the baseline, interleaved in one run."""

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..defaults import default_layer, default_settings
from ..delta import Delta
from ..edits import Edit
from ..errors import ArgumentError
from ..evaluation import evaluate, sentence_perplexity, summarise
from ..flow import Clock, Flow, Request, tokenise
from ..methods import variant
from ..past import Contexts
from ..records import Record
from ..runner import Runner
from ..values import ValueSettings
from .flops import FlopCounter, ideal_flops
from .released import edit_as_released
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
    layer: int
    method: str
    settings: ValueSettings
    factor: Tensor | None
    sentences: Sequence[str]  # for the perplexity of each edited model; none for no quality figures
    first_token_factor: Tensor | None = None  # of C + λ C₁, for method "dual"

    @property
    def flow(self) -> Flow:
        return Flow(
            Runner(self.model),
            self.tokenizer,
            self.layer,
            variant(self.method),
            self.contexts,
            self.factor,
            self.settings,
            "off",
            "write",
            Clock(self.model.device),
            None,
            0,
            first_token_factor=self.first_token_factor,
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
    texts = [*CONTEXTS, *(f"{edit.text} {edit.target}" for edit in edits)]
    tokenizer, what = tokenizer_for(model.config.vocab_size, texts)
    settings = replace(default_settings(model.config), stop="loss", stop_loss=-1.0)
    factor = None if identity else random_factor(runner.weight(layer).shape[1], runner.device)
    return Setup(model, tokenizer, CONTEXTS, layer, "c-rome", settings, factor, []), what


@dataclass
class Measured:
    """What was measured of some batches, in sums."""

    fast: Track = field(default_factory=lambda: Track("rome_fast"))
    rule: Track = field(default_factory=lambda: Track("rome_fast, released stop rule"))
    released: Track = field(default_factory=lambda: Track("as released"))
    stages: dict[str, float] = field(default_factory=dict)  # wall seconds of `fast`
    ideal_flops: float = 0.0
    largest_batch: int = 0
    differences: list[float] = field(default_factory=list)  # see `_difference`, of `rule` and `released`
    peak_bytes: int = 0

    def add(self, other: "Measured") -> None:
        for mine, theirs in ((self.fast, other.fast), (self.rule, other.rule), (self.released, other.released)):
            mine.add(theirs)
        for stage, seconds in other.stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        self.ideal_flops += other.ideal_flops
        self.largest_batch = max(self.largest_batch, other.largest_batch)
        self.differences += other.differences
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Measured":
        tracks = {name: Track(**data[name]) for name in ("fast", "rule", "released")}
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
    """Measure `edits` in batches; with `baseline`, each batch also as released and with the released stop rule.

    The tracks take turns batch by batch, so that a change of the machine's speed meets all of them. Counting FLOPs
    slows a program down; it is done in runs of its own, which are not timed. The peak memory on a GPU includes the
    baseline's where that runs. A batch that stands in the file `kept` is taken from there, any other is added to it.

    Raises ArgumentError where `kept` was measured under other conditions.
    """
    runner = Runner(setup.model)
    base = sentence_perplexity(runner, setup.tokenizer, setup.sentences) if quality else None
    conditions: dict[str, Any] = {
        "model": str(setup.model.config._name_or_path),
        "dtype": str(setup.model.dtype).removeprefix("torch."),
        "device": str(runner.device),
        "threads": torch.get_num_threads(),
        "method": setup.method,
        "layer": setup.layer,
        "statistics": "identity" if setup.factor is None else "second moment",
        "contexts": len(setup.contexts),
        "batch": batch,
        "settings": asdict(setup.settings),
        "perplexity_before": base,
    }
    known = _read_kept(kept, conditions | {"baseline": baseline})
    roofline = measure_roofline(setup.model.device, setup.model.dtype)
    on_gpu = runner.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(runner.device)
    total = Measured()
    counts: dict[tuple[int, int], tuple[int, int]] = {}
    for start in range(0, len(edits), batch):
        group = list(edits[start : start + batch])
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
        say(_line(total.fast, total.rule, total.released))
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
            "share": {
                "algebra": theirs["process_seconds_per_edit"] / middle["process_seconds_per_edit"],
                "stop_rule": middle["process_seconds_per_edit"] / mine["process_seconds_per_edit"],
                "dtype": 1.0,
            },
            # ‖ΔW − ΔW of the baseline‖ / ‖ΔW of the baseline‖, both with the released stop rule
            "largest_difference": max(total.differences),
            "median_difference": statistics.median(total.differences),
            "as_released": theirs,
            "released_stop_rule": middle,
        }
    return report


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
    requests = [tokenise(runner, setup.tokenizer, e, setup.contexts, flow.how) for e in group]
    made = run_timed(out.fast, flow, requests)
    out.largest_batch = flow.largest_batch
    out.stages = dict(flow.clock.seconds)
    out.ideal_flops = ideal(setup, requests, [record for _, record in made])
    with FlopCounter() as counter:
        setup.flow.solve_each(requests)
    out.fast.flops = counter.total
    if baseline:
        old_rule = replace(setup, settings=replace(setup.settings, stop="loss"))
        same_rule = run_timed(out.rule, old_rule.flow, requests)
        for edit, request, (delta, _) in zip(group, requests, same_rule, strict=True):
            theirs_delta = _run_released(out.released, old_rule, edit, request, quality, base, counts)
            out.differences.append(_difference(delta, theirs_delta))
    if quality:
        for edit, (delta, _) in zip(group, made, strict=True):
            out.fast.add_quality(_quality(setup, edit, delta, base))
    return out


def _name(group: Sequence[Edit]) -> str:
    return json.dumps([[e.prompt, e.subject, e.target] for e in group], ensure_ascii=False)


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
    cpu, wall = time.process_time(), time.perf_counter()
    made = flow.solve_each(requests)
    if flow.runner.device.type == "cuda":
        torch.cuda.synchronize(flow.runner.device)
    track.process_seconds += time.process_time() - cpu
    track.wall_seconds += time.perf_counter() - wall
    track.edits += len(requests)
    track.steps += sum(record.steps for _, record in made)
    return made


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

    def once(settings: ValueSettings) -> tuple[int, Delta]:
        made = edit_as_released(
            setup.model,
            setup.tokenizer,
            edit,
            setup.contexts,
            layer=setup.layer,
            settings=settings,
            factor=setup.factor,
            method=setup.method,
        )
        return len(made.losses), made.delta

    cpu, wall = time.process_time(), time.perf_counter()
    steps, delta = once(setup.settings)
    track.process_seconds += time.process_time() - cpu
    track.wall_seconds += time.perf_counter() - wall
    track.edits += 1
    track.steps += steps
    # Every step costs the same: one evaluation, and the difference that a second one makes, tell the rest.
    shape = (len(request.rows), max(len(r.row.inputs) for r in request.rows))
    if shape not in counts:
        counted = []
        for few in (1, 2):
            with FlopCounter() as counter:
                once(replace(setup.settings, steps=few))
            counted.append(counter.total)
        counts[shape] = (counted[0], counted[1])
    first, second = counts[shape]
    track.flops += first + (steps - 1) * (second - first)
    if quality:
        track.add_quality(_quality(setup, edit, delta, base))
    return delta


def _difference(delta: Delta, wanted: Delta) -> float:
    ((name, update),) = wanted.updates.items()
    truth = update.dense().double()
    return float((delta.updates[name].dense().double() - truth).norm() / truth.norm())


def ideal(setup: Setup, requests: Sequence[Request], records: Sequence[Record]) -> float:
    """FLOPs of these edits in a program that computes nothing twice; see `flops`."""
    runner = Runner(setup.model)
    contexts = Contexts.of(runner, setup.tokenizer, ["", *setup.contexts])
    return ideal_flops(runner, contexts, requests, records, setup.layer, setup.settings)


def _quality(setup: Setup, edit: Edit, delta: Delta, base: float | None) -> dict[str, float]:
    delta.apply(setup.model)
    try:
        figures = summarise(evaluate(setup.model, setup.tokenizer, [edit], setup.contexts[:4]))
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
