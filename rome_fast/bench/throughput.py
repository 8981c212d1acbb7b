"""`rome-fast bench`: seconds, FLOPs and quality per edit, and against the baseline, interleaved in one run."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..defaults import default_layer, default_settings
from ..delta import Delta
from ..edits import Edit
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


def bench(setup: Setup, edits: Sequence[Edit], batch: int, baseline: bool, quality: bool, say: Say) -> dict[str, Any]:
    """Measure `edits` in batches; with `baseline`, each batch also as released and with the released stop rule.

    The tracks take turns batch by batch, so that a change of the machine's speed meets all of them. Counting FLOPs
    slows a program down; it is done in runs of its own, which are not timed. The peak memory on a GPU includes the
    baseline's where that runs.
    """
    roofline = measure_roofline(setup.model.device, setup.model.dtype)
    fast, rule, released = Track("rome_fast"), Track("rome_fast, released stop rule"), Track("as released")
    stages: dict[str, float] = {}
    ideal_total, largest = 0.0, 0
    old_rule = replace(setup, settings=replace(setup.settings, stop="loss"))
    differences: list[float] = []
    counts: dict[tuple[int, int], tuple[int, int]] = {}
    runner = Runner(setup.model)
    base = sentence_perplexity(runner, setup.tokenizer, setup.sentences) if quality else None
    on_gpu = runner.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(runner.device)
    for start in range(0, len(edits), batch):
        group = list(edits[start : start + batch])
        flow = setup.flow
        requests = [tokenise(runner, setup.tokenizer, e, setup.contexts, flow.how) for e in group]
        made = run_timed(fast, flow, requests)
        largest = max(largest, flow.largest_batch)
        for stage, seconds in flow.clock.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
        ideal_total += ideal(setup, requests, [record for _, record in made])
        with FlopCounter() as counter:
            setup.flow.solve_each(requests)
        fast.flops += counter.total
        if baseline:
            same_rule = run_timed(rule, old_rule.flow, requests)
            for edit, request, (delta, _) in zip(group, requests, same_rule, strict=True):
                theirs_delta = _run_released(released, old_rule, edit, request, quality, base, counts)
                differences.append(_difference(delta, theirs_delta))
        if quality:
            for edit, (delta, _) in zip(group, made, strict=True):
                fast.add_quality(_quality(setup, edit, delta, base))
        say(_line(fast, rule, released))
    weight_bytes = sum(p.nbytes for p in setup.model.parameters())
    peak_bytes = (
        torch.cuda.max_memory_allocated(runner.device)
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    mine = fast.report()
    flops_per_second = mine["flops_per_edit"] / mine["seconds_per_edit"]
    report: dict[str, Any] = {
        "model": str(setup.model.config._name_or_path),
        "dtype": str(setup.model.dtype).removeprefix("torch."),
        "device": str(runner.device),
        "threads": torch.get_num_threads(),
        "method": setup.method,
        "layer": setup.layer,
        "statistics": "identity" if setup.factor is None else "second moment",
        "contexts": len(setup.contexts),
        "batch": batch,
        "largest_batch": largest,  # what the memory allowed of it
        "settings": asdict(setup.settings),
        **mine,
        "seconds_by_stage": stages,
        "ideal_flops_per_edit": ideal_total / max(1, len(edits)),
        "flops_over_ideal": fast.flops / ideal_total if ideal_total else None,
        "flops_per_second": flops_per_second,
        "roofline": roofline.to_json(),
        "share_of_matrix_rate": flops_per_second / roofline.matrix_rate,
        # Of the GPU's allocator, or of this process.
        "peak_memory_bytes": peak_bytes,
        "weight_bytes": weight_bytes,
        "peak_memory_over_weights": peak_bytes / weight_bytes,
        "perplexity_before": base,
    }
    if released.edits:
        theirs, middle = released.report(), rule.report()
        report |= {
            "process_time_ratio": theirs["process_seconds_per_edit"] / mine["process_seconds_per_edit"],
            "flops_ratio": theirs["flops_per_edit"] / mine["flops_per_edit"],
            "share": {
                "algebra": theirs["process_seconds_per_edit"] / middle["process_seconds_per_edit"],
                "stop_rule": middle["process_seconds_per_edit"] / mine["process_seconds_per_edit"],
                "dtype": 1.0,
            },
            # ‖ΔW − ΔW of the baseline‖ / ‖ΔW of the baseline‖, both with the released stop rule
            "largest_difference": max(differences),
            "median_difference": statistics.median(differences),
            "as_released": theirs,
            "released_stop_rule": middle,
        }
    return report


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
