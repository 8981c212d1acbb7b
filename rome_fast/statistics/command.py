"""`rome-fast statistics`: collect, or list and prune the cache, merge, import and export."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, StatisticsError
from ..models.runner import Runner
from ..opening import checkpoints
from ..runs.processes import joined, launched_together, own_device
from ..runs.terminal import say, tell
from ..weights import explain_rates
from .cache import list_cache, prune_cache
from .choice import cached_choices
from .collect import RESUME, Progress, collect, opened_for
from .corpus import Corpus, hub_dataset
from .layer import check_ridge
from .released import export_npz, import_npz
from .snapshots import PATTERN
from .store import Statistics, cache_folder, check_replaces, statistics_cache, usual_layers

Shown = Callable[[str, str], AbstractContextManager[tuple[Progress, object]]]
"""From (stage, unit) to a progress bar: what moves it, and what else it shows."""


def run_statistics(arguments: argparse.Namespace, shown: Shown) -> dict[str, Any] | None:
    """What the verb's arguments ask for; returns its report, None in all but the first of several processes."""
    if arguments.list:
        return _list()
    if arguments.prune:
        return _prune([arguments.model] if arguments.model else [])
    if arguments.model is None:
        raise ArgumentError("model: got none, wanted a directory or hub id (or --list, or --prune)")
    check_ridge(arguments.ridge)
    if arguments.merge:
        return _merge(arguments)
    if arguments.import_npz:
        return _import(arguments)
    if arguments.export_npz:
        return _export(arguments)
    return _collect(arguments, shown)


def _collect(arguments: argparse.Namespace, shown: Shown) -> dict[str, Any] | None:
    texts = _texts(arguments)
    with ExitStack() as stack:
        device, first, together = own_device(arguments.device), True, launched_together()
        if together:
            first = stack.enter_context(joined(device, RESUME)).rank == 0
        runner, tokenizer = stack.enter_context(
            opened_for(
                arguments.model,
                arguments.layers,
                memory=arguments.memory,
                device=device,
                dtype=arguments.dtype,
                trust_remote_code=arguments.trust_remote_code,
            )
        )
        layers = arguments.layers or list(usual_layers(runner))
        out = arguments.out or cache_folder(runner, checkpoints.resolve(arguments.model).resolve().name, layers)
        progress = stack.enter_context(_shown(shown)) if first else None
        statistics = collect(
            runner,
            tokenizer,
            texts,
            layers,
            arguments.tokens,
            arguments.max_length,
            progress,
            field=arguments.field,
            out=out,
            distributed=together,
            ridge=arguments.ridge,
            resumed=_tell_resumed,
        )
        width = runner.weight(max(layers)).shape[1]
        rates = None if runner.stream is None else runner.stream.rates
    if not first:
        return None
    report = _report(arguments.model, statistics, out)
    if rates is not None:
        report["streaming"] = rates
        say(explain_rates(rates))
    ratio = f"{report['tokens'] / width:.1f} per dimension of the keys"
    say(f"{report['tokens']} tokens, {ratio}, layers {report['layers']} → {out}")
    _tell_usable(statistics, report)
    return report


def _tell_resumed(done: int, total: int) -> None:
    tell(f"going on from {done:,} of {total:,} tokens, which an interrupted run has done")


@contextmanager
def _shown(shown: Shown) -> Iterator[Progress]:
    """The bar; where it cannot be drawn, as in a log, a line per tenth."""
    if sys.stderr.isatty():
        with shown("second moments", "tokens") as (advance, _):
            yield advance
        return
    begun: tuple[float, int] | None = None
    told = 0

    def tell_tenth(done: int, total: int) -> None:
        nonlocal begun, told
        if begun is None:
            # An interrupted run begins where it was: the speed is that of what comes now.
            begun, told = (time.monotonic(), done), done * 10 // total
        elif done * 10 // total > told:
            told = done * 10 // total
            rate = (done - begun[1]) / max(time.monotonic() - begun[0], 1e-6)
            left = timedelta(seconds=round((total - done) / rate))
            tell(f"{done:,} of {total:,} tokens, {rate:,.0f}/s, {left} left")

    yield tell_tenth


def _texts(arguments: argparse.Namespace) -> Iterable[Any]:
    if arguments.dataset and arguments.corpus:
        raise ArgumentError("dataset: got both --corpus and --dataset, wanted one of them")
    if arguments.dataset:
        return hub_dataset(arguments.dataset, arguments.split)
    if not arguments.corpus:
        raise ArgumentError("corpus: got none, wanted --corpus FILE or --dataset NAME")
    return Corpus.open(*arguments.corpus, field=arguments.field)


def _tell_usable(statistics: Statistics, report: dict[str, Any]) -> None:
    """Say of every layer whether it can be solved with, and put its condition number into the report."""
    report["conditions"] = {}
    for layer, entry in statistics.layers.items():
        # A copy, whose factor goes with it: of several wide layers they would not fit.
        try:
            condition = replace(entry).condition(torch.device("cpu"))
        except StatisticsError as error:
            report["conditions"][layer] = None
            say(f"layer {layer}: no edit can use it as it is: {error}")
        else:
            report["conditions"][layer] = condition
            say(f"layer {layer}: condition number {condition:.1e}")


def _report(model: str, statistics: Statistics, out: Path) -> dict[str, Any]:
    tokens = min(entry.tokens for entry in statistics.layers.values())
    ridge = max(entry.ridge for entry in statistics.layers.values())
    return {"model": model, "layers": sorted(statistics.layers), "tokens": tokens, "ridge": ridge, "out": str(out)}


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    statistics = Statistics.merge([Statistics.load(folder) for folder in arguments.merge])
    with _opened(arguments, list(statistics.layers)) as runner:
        return _keep(arguments, runner, statistics)


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    with _opened(arguments, arguments.layers) as runner:
        layers = arguments.layers or list(usual_layers(runner))[-1:]
        if len(layers) != 1:
            raise ArgumentError(f"layers: got {layers}, wanted the one layer that {arguments.import_npz} is of")
        return _keep(arguments, runner, import_npz(arguments.import_npz, runner, layers[0]))


@contextmanager
def _opened(arguments: argparse.Namespace, layers: list[int] | None) -> Iterator[Runner]:
    """The model, to compare fingerprints with; a few numbers of each weight are all that is read of a streamed one."""
    with opened_for(
        arguments.model,
        layers,
        memory=arguments.memory,
        device=arguments.device or "cpu",
        trust_remote_code=arguments.trust_remote_code,
    ) as (runner, _):
        yield runner


def _keep(arguments: argparse.Namespace, runner: Runner, statistics: Statistics) -> dict[str, Any]:
    for layer in statistics.layers:
        statistics.for_layer(runner, layer)
    statistics = statistics.with_ridge(arguments.ridge) if arguments.ridge else statistics
    directory = checkpoints.resolve(arguments.model)
    out = arguments.out or cache_folder(runner, directory.resolve().name, list(statistics.layers))
    for layer, entry in statistics.layers.items():
        check_replaces(out, layer, entry.fingerprint, entry.tokens)
    statistics.save(out)
    report = _report(arguments.model, statistics, out)
    say(f"{report['tokens']} tokens, layers {report['layers']} → {out}")
    _tell_usable(statistics, report)
    return report


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    folder: Path = arguments.export_npz
    if not folder.is_dir():
        raise ArgumentError(f"export: the folder {folder} does not exist; make it first")
    files = []
    with _opened(arguments, arguments.layers) as runner:
        for layer in arguments.layers or usual_layers(runner):
            statistics = Statistics.load(arguments.out) if arguments.out else Statistics.cached(runner, [layer])
            name = runner.weight_name(layer).removesuffix(".weight")
            file = folder / f"{name}_float32_mom2_{arguments.sample_size}.npz"
            export_npz(statistics.for_layer(runner, layer), file, arguments.sample_size)
            files.append(str(file))
            say(str(file))
    return {"model": arguments.model, "files": files}


def _list() -> dict[str, Any]:
    found = list_cache()
    for entry in found:
        name = entry.file.parent.name
        size = f"{entry.size_bytes / 2**20:8.1f} MiB"
        if entry.problem:
            say(f"{name}  {entry.file.name}  {size}  unusable: {entry.problem}")
        else:
            what = "first tokens" if entry.first_tokens else f"tokens, {entry.tokens / entry.width:.1f} per dimension"
            say(f"{name}  layer {entry.layer}  {size}  {entry.tokens} {what}")
    choices = cached_choices(statistics_cache())
    for choice in choices:
        settings = f"weight decay {choice.settings.weight_decay:g}, clamp {choice.settings.clamp:g}"
        say(f"{choice.fingerprint}  tuned: layer {choice.layer}, {settings} ({choice.made})")
    say(f"{len(found)} layers in {statistics_cache()}")
    return {
        "tuned": [{"model": str(c.fingerprint), "layer": c.layer, "made": c.made} for c in choices],
        "cache": str(statistics_cache()),
        "layers": [
            {
                "file": str(entry.file),
                "bytes": entry.size_bytes,
                "layer": entry.layer,
                "tokens": entry.tokens,
                "first_tokens": entry.first_tokens,
                "model": entry.model,
                "problem": entry.problem,
            }
            for entry in found
        ],
    }


def _prune(names: list[str]) -> dict[str, Any]:
    removed = prune_cache(names)
    at_work = [statistics_cache() / name for name in names] if names else statistics_cache().glob(f"*/{PATTERN}")
    for path in at_work:
        if path.exists():
            say(f"kept {path}: a process is writing there")
    for path in removed:
        say(f"removed {path}")
    say(f"{len(removed)} removed")
    return {"removed": [str(path) for path in removed]}
