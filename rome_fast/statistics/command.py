"""`rome-fast statistics`: collect, or list and prune the cache, merge, import and export."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints
from ..defaults import default_layer
from ..errors import ArgumentError, StatisticsError
from ..fingerprint import Fingerprint
from ..runner import Runner
from .cache import list_cache, prune_cache
from .collect import Progress, collect, opened_for
from .corpus import Corpus, hub_dataset
from .layer import check_ridge
from .processes import joined, launched_together
from .released import export_npz, import_npz
from .store import Statistics, statistics_cache

Shown = Callable[[str, str], AbstractContextManager[tuple[Progress, object]]]
"""From (stage, unit) to a progress bar: what moves it, and what else it shows."""


def run_statistics(arguments: argparse.Namespace, shown: Shown) -> dict[str, Any]:
    """What the verb's arguments ask for; returns its report."""
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


def _collect(arguments: argparse.Namespace, shown: Shown) -> dict[str, Any]:
    texts = _texts(arguments)
    with ExitStack() as stack:
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        first, together = True, launched_together()
        if together:
            if device == "cuda":
                device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            first = stack.enter_context(joined(device)).rank == 0
        runner, tokenizer = stack.enter_context(
            opened_for(arguments.model, arguments.layers, memory=arguments.memory, device=device)
        )
        layers = arguments.layers or [default_layer(runner.model.config)]
        out = arguments.out or _cache_folder(runner, checkpoints.resolve(arguments.model), layers)
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
        )
        if arguments.ridge and first:
            statistics = statistics.with_ridge(arguments.ridge)
            statistics.save(out)
    report = _report(arguments.model, statistics, out)
    if first:
        width = runner.weight(0).shape[1]
        ratio = f"{report['tokens'] / width:.1f} per dimension of the keys"
        print(f"{report['tokens']} tokens, {ratio}, layers {report['layers']} → {out}")
        for layer in statistics.layers:
            print(_usable(statistics, layer))
    return report


@contextmanager
def _shown(shown: Shown) -> Iterator[Progress]:
    """The bar; where it cannot be drawn, as in a log, a line per tenth."""
    if sys.stderr.isatty():
        with shown("second moments", "tokens") as (advance, _):
            yield advance
        return
    begun: tuple[float, int] | None = None
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal begun, told
        if begun is None:
            # An interrupted run begins where it was: the speed is that of what comes now.
            begun, told = (time.monotonic(), done), done * 10 // total
        elif done * 10 // total > told:
            told = done * 10 // total
            rate = (done - begun[1]) / max(time.monotonic() - begun[0], 1e-6)
            left = timedelta(seconds=round((total - done) / rate))
            print(f"{done:,} of {total:,} tokens, {rate:,.0f}/s, {left} left", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
        yield tell


def _texts(arguments: argparse.Namespace) -> Iterable[Any]:
    if arguments.dataset and arguments.corpus:
        raise ArgumentError("dataset: got both --corpus and --dataset, wanted one of them")
    if arguments.dataset:
        return hub_dataset(arguments.dataset, arguments.split)
    if not arguments.corpus:
        raise ArgumentError("corpus: got none, wanted --corpus FILE or --dataset NAME")
    return Corpus.open(*arguments.corpus, field=arguments.field)


def _cache_folder(runner: Runner, directory: Path, layers: list[int]) -> Path:
    # The name alone would let two models of one folder name replace each other's files.
    layer = max(0, min(max(layers), len(runner.layers) - 1))
    return statistics_cache() / f"{directory.resolve().name}-{Fingerprint.of(runner, layer)}"


def _usable(statistics: Statistics, layer: int) -> str:
    try:
        condition = statistics.layers[layer].condition(torch.device("cpu"))
    except StatisticsError as error:
        return f"layer {layer}: no edit can use it as it is: {error}"
    return f"layer {layer}: condition number {condition:.1e}"


def _report(model: str, statistics: Statistics, out: Path) -> dict[str, Any]:
    tokens = min(entry.tokens for entry in statistics.layers.values())
    return {"model": model, "layers": sorted(statistics.layers), "tokens": tokens, "out": str(out)}


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    statistics = Statistics.merge([Statistics.load(folder) for folder in arguments.merge])
    model, _, directory = checkpoints.load(arguments.model)
    return _keep(arguments, Runner(model), directory, statistics)


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    model, _, directory = checkpoints.load(arguments.model)
    layers = arguments.layers or [default_layer(model.config)]
    if len(layers) != 1:
        raise ArgumentError(f"layers: got {layers}, wanted the one layer that {arguments.import_npz} is of")
    statistics = import_npz(arguments.import_npz, model, layers[0])
    return _keep(arguments, Runner(model), directory, statistics)


def _keep(arguments: argparse.Namespace, runner: Runner, directory: Path, statistics: Statistics) -> dict[str, Any]:
    for layer in statistics.layers:
        statistics.for_layer(runner, layer)
    statistics = statistics.with_ridge(arguments.ridge) if arguments.ridge else statistics
    out = arguments.out or _cache_folder(runner, directory, list(statistics.layers))
    statistics.save(out)
    report = _report(arguments.model, statistics, out)
    print(f"{report['tokens']} tokens, layers {report['layers']} → {out}")
    for layer in statistics.layers:
        print(_usable(statistics, layer))
    return report


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    model, _, _ = checkpoints.load(arguments.model)
    runner = Runner(model)
    folder: Path = arguments.export_npz
    if not folder.is_dir():
        raise ArgumentError(f"export: the folder {folder} does not exist; make it first")
    files = []
    for layer in arguments.layers or [default_layer(model.config)]:
        statistics = Statistics.load(arguments.out) if arguments.out else Statistics.cached(runner, layer)
        name = runner.family.weight_name(layer).removesuffix(".weight")
        file = folder / f"{name}_float32_mom2_{arguments.sample_size}.npz"
        export_npz(statistics.for_layer(runner, layer), file, arguments.sample_size)
        files.append(str(file))
        print(file)
    return {"model": arguments.model, "files": files}


def _list() -> dict[str, Any]:
    found = list_cache()
    for entry in found:
        name = entry.file.parent.name
        size = f"{entry.size_bytes / 2**20:8.1f} MiB"
        if entry.problem:
            print(f"{name}  {entry.file.name}  {size}  unusable: {entry.problem}")
        else:
            what = "first tokens" if entry.first_tokens else f"tokens, {entry.tokens / entry.width:.1f} per dimension"
            print(f"{name}  layer {entry.layer}  {size}  {entry.tokens} {what}")
    print(f"{len(found)} layers in {statistics_cache()}")
    return {
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
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} removed")
    return {"removed": [str(path) for path in removed]}
