"""What the arguments of `rome-fast tune` mean, and the run itself."""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import assets, demo
from ..bench.command import REQUESTS
from ..closing.geometry import Geometries
from ..edits import Edit, load_edits
from ..errors import ArgumentError, ModelError, StatisticsError
from ..evaluation import sentence_perplexity
from ..methods import method_named
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner
from ..models.verification import shared_out
from ..opening import checkpoints
from ..opening.defaults import select, spread_below
from ..report.tune import summary, tune_table
from ..runs.costs import about, flops_per_second, layer_flops
from ..runs.parts import Parts
from ..runs.processes import own_device
from ..runs.terminal import show
from ..runs.texts import read_sentences
from ..search.contexts import sample_contexts
from ..search.values import ValueSettings
from ..statistics import (
    TOKENS_PER_DIMENSION,
    Choice,
    Corpus,
    LayerStatistics,
    Statistics,
    cache_folder,
    collect_statistics,
)
from .cost import edit_flops
from .halving import Ranking, edits_in, halve
from .measure import Candidate, Sweep
from .objective import Figures, compare, perplexity_ratio, score

Advance = Callable[[int, int], None]
Say = Callable[[str], None]

_LOWEST, _HIGHEST = 0.1, 0.5  # of the depth, between which layers are tried
_MOST_LAYERS = 12
_WEIGHT_DECAYS = (1e-3, 0.5, 20.0)
_UNSEEN_SEED = 1  # the editing contexts have 0
_SENTENCES = 20
_HELD_OUT = 10  # of the demo's articles, which the perplexity sentences come from


@dataclass(frozen=True)
class _Job:
    """What is to be tried on which model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    runner: Runner
    name: str
    edits: list[Edit]
    sentences: list[str]
    method: str
    default: Candidate
    base: ValueSettings
    layers: list[int]
    decays: Sequence[float]
    clamps: Sequence[float]
    folder: Path | None  # of statistics; None for the cache

    @property
    def candidates(self) -> list[Candidate]:
        """The layers, with the settings that are usual for the model."""
        return [Candidate.of(layer, self.base) for layer in self.layers]

    def settings_at(self, layer: int) -> list[Candidate]:
        """The usual settings first, so that of equals they are chosen."""
        usual = Candidate.of(layer, self.base)
        tried = (Candidate(layer, float(decay), float(clamp)) for decay, clamp in product(self.decays, self.clamps))
        return [usual, *(candidate for candidate in tried if candidate != usual)]

    @property
    def place(self) -> Path:
        """Where what is collected and chosen is kept."""
        return self.folder or cache_folder(self.runner, self.name, self.layers)

    def statistics(self, layer: int) -> LayerStatistics:
        """Those of a layer; StatisticsError where there are none."""
        found = Statistics.load(self.folder, [layer]) if self.folder else Statistics.cached(self.runner, [layer])
        return found.for_layer(self.runner, layer)


def candidate_layers(count: int, default: int) -> list[int]:
    """Up to 12 layers and the default, evenly spaced from a tenth to half of the depth."""
    first = round(_LOWEST * count)
    stop = max(first + 1, round(_HIGHEST * count))
    step = -(-(stop - first) // _MOST_LAYERS)
    return sorted({*range(first, stop, step), default})


def run_tune(arguments: argparse.Namespace, advance: Advance, say: Say) -> dict[str, Any]:
    """Try layers, then settings at the best of them, and keep the choice with the statistics."""
    start, process_start = time.perf_counter(), time.process_time()
    job = _prepare(arguments, say)
    tokens, missing = _collected(job, job.layers)
    texts = _texts(arguments, job, missing)
    planned = edits_in(len(job.layers), len(job.edits)) + edits_in(
        len(job.settings_at(job.default.layer)), len(job.edits)
    )
    _say_cost(job, missing, arguments, planned, say)
    if missing:
        tokens |= _collect(job, missing, texts, arguments.tokens, say)
    sweep = _sweep(job, arguments.out, tokens, lambda done: advance(done, max(done, planned)))

    by_layer = halve(job.candidates, len(job.edits), sweep.measure, job.default, arguments.perplexity_limit)
    say(f"best of {len(job.layers)} layers: {by_layer.best.layer}")
    at_best = job.settings_at(by_layer.best.layer)
    by_settings = halve(at_best, len(job.edits), sweep.measure, at_best[0], arguments.perplexity_limit)
    advance(sweep.done, sweep.done)  # the default may be among the best, which saves some of what was planned
    report = _report(job, sweep, by_layer, by_settings, arguments.perplexity_limit)
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["process_seconds"] = round(time.process_time() - process_start, 1)

    best = by_settings.best
    choice = Choice(
        layer=best.layer,
        settings=best.settings(job.base),
        fingerprint=Fingerprint.of(job.runner, best.layer),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        figures=report["choice"],
    )
    choice.save(job.place)
    show(tune_table(report["layers"], f"layers, {by_layer.requests} requests"))
    show(tune_table(report["settings"], f"settings at layer {best.layer}"))
    for line in summary(report):
        say(line)
    say(f"kept in {job.place}; edits of this model use it from now on, unless told a layer")
    _complete(arguments, job, best.layer, say)
    say(f"wrote {sweep.parts.write('tune.json', report)}")
    return report


def _prepare(arguments: argparse.Namespace, say: Say) -> _Job:
    for name in ("count", "tokens", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ArgumentError(f"{name}: got {getattr(arguments, name)}, wanted at least 1")
    if not arguments.perplexity_limit > 0:
        raise ArgumentError(f"perplexity_limit: got {arguments.perplexity_limit}, wanted a ratio above 0, as 1.01")
    if method_named(arguments.method).bare:
        raise ArgumentError(
            f"method: got {arguments.method!r}, wanted one without keys of first tokens; tune with c-rome, which finds "
            "the same values"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    edits = load_edits(arguments.edits or REQUESTS, arguments.on_error, arguments.duplicates)[: arguments.count]
    own = arguments.model is None
    model, tokenizer, directory = checkpoints.load(
        assets.model_dir(say) if own else arguments.model,
        device=own_device(arguments.device),
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    runner = Runner(model)
    count = len(runner.layers)
    usual = select(model.config)
    editable = [layer for layer in range(count) if _is_editable(runner, layer)]
    default = min(editable, key=lambda layer: abs(layer - usual.layer), default=usual.layer)
    layers = arguments.layers or [layer for layer in candidate_layers(count, default) if layer in editable]
    if unknown := [layer for layer in layers if layer not in editable]:
        wanted = f"0 .. {count - 1}" if len(editable) == count else ", ".join(map(str, editable))
        raise ArgumentError(f"layers: got {', '.join(map(str, unknown))}, wanted some of {wanted}")
    layers = sorted({*layers, default})
    for name, values in (("weight_decay", arguments.weight_decay), ("clamp", arguments.clamp)):
        if values and not min(values) >= 0:
            raise ArgumentError(f"{name}: got {values}, wanted numbers from 0 on")
    sentences = read_sentences(arguments.sentences) if arguments.sentences else demo.held_out_sentences(_SENTENCES)
    return _Job(
        model,
        tokenizer,
        runner,
        directory.resolve().name,
        edits,
        sentences,
        arguments.method,
        Candidate.of(default, usual.settings),
        usual.settings,
        layers,
        arguments.weight_decay or _WEIGHT_DECAYS,
        arguments.clamp or (usual.settings.clamp,),
        arguments.statistics,
    )


def _is_editable(runner: Runner, layer: int) -> bool:
    """Whether a layer has a down-projection that every token goes through."""
    try:
        return runner.weight(layer).dim() == 2
    except ModelError:
        return False


def _collected(job: _Job, layers: Sequence[int]) -> tuple[dict[int, int], list[int]]:
    """Tokens that the statistics of each layer are of, and the layers that have none."""
    tokens, missing = {}, []
    for layer in layers:
        try:
            tokens[layer] = job.statistics(layer).tokens
        except StatisticsError:
            missing.append(layer)
    return tokens, missing


def _texts(arguments: argparse.Namespace, job: _Job, missing: Sequence[int]) -> Iterable[Any]:
    """What statistics are collected over; StatisticsError where some have to be and there is nothing."""
    if not missing:
        return ()
    if arguments.corpus:
        return Corpus.open(*arguments.corpus)
    if arguments.model is None:
        return assets.demo_texts()[:-_HELD_OUT]
    layers = " ".join(map(str, missing))
    raise StatisticsError(
        f"statistics: none for layers {layers} in {job.folder or 'the cache'}; give --corpus FILE, and they are "
        f"collected in one pass, or collect them with: rome-fast statistics {arguments.model} --corpus FILE --layers "
        f"{layers}"
    )


def _say_cost(job: _Job, missing: Sequence[int], arguments: argparse.Namespace, planned: int, say: Say) -> None:
    runner = job.runner
    each = [
        edit_flops(runner, job.tokenizer, job.edits, job.method, layer, job.base, job.sentences) for layer in job.layers
    ]
    edits = planned * sum(each) / len(each)
    width = runner.weight(job.layers[-1]).shape[1]
    collecting = 0.0
    if missing:
        tokens = arguments.tokens or TOKENS_PER_DIMENSION * width
        collecting = tokens * ((missing[-1] + 1) * layer_flops(runner) + 2.0 * len(missing) * width**2)
    seconds = (edits + collecting) / flops_per_second(runner)
    say(f"{job.name}: layers {', '.join(map(str, job.layers))}; {len(job.edits)} requests, {planned} edits, each alone")
    first = f", statistics of {len(missing)} layers in one pass first" if missing else ""
    say(f"about {about(seconds)} on {runner.device} ({(edits + collecting) / 1e12:.3g} TFLOP{first})")
    weights = sum(p.numel() * p.element_size() for p in job.model.parameters())
    # While they are collected, sums in fp64 and means in fp32; later one layer's, factored in fp64 out of a copy.
    moments = max((12 * len(missing) + 8) * width**2 if missing else 0, 20 * width**2)
    say(
        f"memory: weights {weights / 2**30:.2f} GiB, second moments up to {moments / 2**30:.2f} GiB, and what edits use"
    )


def _collect(job: _Job, missing: Sequence[int], texts: Iterable[Any], tokens: int | None, say: Say) -> dict[int, int]:
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done * 4 // total > told:
            told = done * 4 // total
            say(f"statistics: {done:,} of {total:,} tokens")

    found = collect_statistics(job.model, job.tokenizer, texts, missing, tokens, progress=tell, out=job.place)
    return {layer: found.layers[layer].tokens for layer in missing}


def _complete(arguments: argparse.Namespace, job: _Job, layer: int, say: Say) -> None:
    """Collect what edits that are spread over the layers below this one need as well, or say how to."""
    layers = shared_out(job.runner, job.runner.decoder.sites_of(spread_below(layer)))
    missing = _collected(job, layers)[1]
    if missing:
        listed = ", ".join(map(str, layers))
        try:
            texts = _texts(arguments, job, missing)
        except StatisticsError as error:
            say(f"edits are spread over layers {listed}; {error}")
        else:
            say(f"edits are spread over layers {listed}: statistics of {', '.join(map(str, missing))} as well")
            _collect(job, missing, texts, arguments.tokens, say)


def _sweep(job: _Job, out: Path, tokens: dict[int, int], advance: Callable[[int], None]) -> Sweep:
    contexts = sample_contexts(job.model, job.tokenizer)
    unseen = sample_contexts(job.model, job.tokenizer, seed=_UNSEEN_SEED)
    unseen = tuple(context for context in unseen if context not in contexts)
    conditions = {
        "model": job.name,
        "fingerprint": str(Fingerprint.of(job.runner, job.layers[-1])),
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "method": job.method,
        "settings": asdict(job.base),
        "requests": len(job.edits),
        "edits_sha256": _hash(*map(repr, job.edits)),
        "contexts_sha256": _hash(*contexts, *unseen),
        "sentences": len(job.sentences),
        "sentences_sha256": _hash(*job.sentences),
        "statistics_tokens": {str(layer): tokens[layer] for layer in job.layers},
    }
    return Sweep(
        job.model,
        job.tokenizer,
        job.edits,
        job.method,
        job.base,
        lambda layer: Geometries(job.runner, (layer,), Statistics([job.statistics(layer)]))[layer],
        contexts,
        unseen,
        job.sentences,
        sentence_perplexity(job.runner, job.tokenizer, job.sentences),
        Parts(out, "tune", conditions),
        advance,
    )


def _report(job: _Job, sweep: Sweep, by_layer: Ranking, by_settings: Ranking, limit: float) -> dict[str, Any]:
    best, default = by_settings.best, job.default
    of_best, of_default = by_settings.figures[best], by_layer.figures[default]
    difference = compare(of_best, of_default)
    return {
        "conditions": sweep.parts.conditions
        | {
            "perplexity": sweep.perplexity,
            "perplexity_limit": limit,
            "device": str(job.runner.device),
            "threads": torch.get_num_threads(),
            "versions": checkpoints.versions(),
        },
        "choice": _row(best, of_best, limit),
        "default": _row(default, of_default, limit)
        | {"difference": asdict(difference) | {"told_apart": difference.told_apart}},
        "layers": _rows(by_layer, limit),
        "settings": _rows(by_settings, limit),
    }


def _rows(ranking: Ranking, limit: float) -> list[dict[str, Any]]:
    """The best first; those measured on all requests with their difference to the best."""
    of_best = ranking.figures[ranking.best]
    rows = []
    for candidate in ranking.candidates:
        figures = ranking.figures[candidate]
        row = _row(candidate, figures, limit)
        if candidate in ranking.finalists and candidate != ranking.best:
            difference = compare(of_best, figures)
            row["difference"] = asdict(difference) | {"told_apart": difference.told_apart}
        rows.append(row)
    return rows


def _row(candidate: Candidate, figures: Sequence[Figures], limit: float) -> dict[str, Any]:
    row: dict[str, Any] = asdict(candidate) | {"requests": len(figures), "score": score(figures)}
    for name in Figures.__dataclass_fields__:
        known = [value for value in (getattr(each, name) for each in figures) if value is not None]
        row[name] = sum(known) / len(known) if known else None
    row["largest_perplexity_ratio"] = max(each.perplexity_ratio for each in figures)
    row["eligible"] = perplexity_ratio(figures) <= limit
    return row


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
