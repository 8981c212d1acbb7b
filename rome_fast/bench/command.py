"""What the arguments of `rome-fast bench` mean, and what it prints."""

import argparse
import csv
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import assets, demo
from ..closing.geometry import Geometries
from ..edits import Edit, load_edits
from ..errors import ArgumentError
from ..methods import method_named
from ..models.runner import Runner
from ..models.verification import check_shared_out, shared_out
from ..opening import checkpoints
from ..opening.checkpoints import checked_layers
from ..opening.defaults import default_layers, default_settings
from ..opening.opening import given_layers
from ..report.bench import TRACKS, bench_figure, check_figure
from ..runs.processes import own_device
from ..runs.terminal import say, show
from ..runs.texts import read_sentences
from ..search.contexts import sample_contexts
from ..statistics import Statistics, first_token_statistics
from .prediction import check_prediction, run_prediction
from .shapes import repeated
from .throughput import Setup, bench, shape_setup

REQUESTS = Path(__file__).with_name("requests.jsonl")
_SENTENCES = 20
_BATCH = 16


def run_bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every batch size in every dtype, print tables, append CSV rows, draw the figure.

    With `predict`, a prediction instead. Returns the report; of several batch sizes or dtypes {"runs": [report, …]}.
    """
    if arguments.predict is not None:
        check_prediction(arguments)
        edits = load_edits(arguments.edits or REQUESTS, arguments.on_error, arguments.duplicates)
        return run_prediction(arguments, edits)
    if arguments.steps is not None:
        raise ArgumentError("steps: got a number without --predict, wanted both or none")
    batches, dtypes = arguments.batch or [_BATCH], arguments.dtype or [None]
    if min(batches) < 1:
        raise ArgumentError(f"batch: got {min(batches)}, wanted at least 1")
    several = len(batches) * len(dtypes) > 1
    if several and arguments.keep:
        raise ArgumentError("keep: wanted with one batch size and one dtype, which the file is of")
    for name in ("keep", "csv"):
        file = getattr(arguments, name)
        if file and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise ArgumentError(f"{name}: got {file}, wanted the name of a file, in a folder that is there")
    if arguments.plot:
        check_figure(arguments.plot)
    one_batch = arguments.shape is not None and arguments.count is None
    runs = []
    for dtype in dtypes:
        # The same model and requests for all batch sizes.
        prepared = prepare(arguments, max(batches) if one_batch else arguments.count, dtype)
        for batch in batches:
            setup, edits, extra = prepared
            runs.append(_run(arguments, setup, edits[:batch] if one_batch else edits, batch) | extra)
            show(_table(runs[-1]))
        del prepared, setup  # before the next one is loaded
    if several:
        show(_overview(runs))
    if arguments.csv:
        append_rows(arguments.csv, runs)
    if arguments.plot:
        bench_figure(runs, arguments.plot)
    return {"runs": runs} if several else runs[0]


def _run(arguments: argparse.Namespace, setup: Setup, edits: Sequence[Edit], batch: int) -> dict[str, Any]:
    return bench(setup, edits, batch, arguments.baseline, bool(setup.sentences), say, arguments.keep) | {
        "versions": checkpoints.versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(setup.model.device),
    }


def prepare(
    arguments: argparse.Namespace, count: int | None, dtype: str | None
) -> tuple[Setup, list[Edit], dict[str, Any]]:
    """Model in a dtype (None: as stored) and `count` requests (None: all) as the arguments say.

    And what the report must say of a random model.
    """
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ArgumentError(f"threads: got {arguments.threads}, wanted at least 1")
        torch.set_num_threads(arguments.threads)
    edits = load_edits(arguments.edits or REQUESTS, arguments.on_error, arguments.duplicates)
    edits = repeated(edits, count) if arguments.shape else edits[:count]
    if not edits:
        raise ArgumentError(f"count: got {count}, wanted at least 1")
    device = checkpoints.checked_device(own_device(arguments.device))
    if arguments.shape:
        setup, extra = _random_setup(arguments, device, dtype, edits)
    else:
        setup, extra = _real_setup(arguments, device, dtype), {}
    settings = replace(setup.settings, compute_dtype=arguments.compute_dtype)
    return replace(setup, settings=settings), edits, extra


def _random_setup(
    arguments: argparse.Namespace, device: torch.device, dtype: str | None, edits: Sequence[Edit]
) -> tuple[Setup, dict[str, Any]]:
    """A shape with random weights, and what the report must say of it."""
    if arguments.model is not None or arguments.statistics or arguments.sentences:
        raise ArgumentError("shape: wanted without a model, statistics or sentences, which a shape does not have")
    stored = getattr(torch, dtype or "float32")
    setup, tokens = shape_setup(arguments.shape, device, stored, edits, identity=arguments.identity)
    geometries = dict.fromkeys(_layers(arguments, Runner(setup.model)), setup.geometries[setup.layer])
    statistics = "identity" if arguments.identity else "random, of the right size"
    return (
        replace(setup, geometries=geometries, method=arguments.method),
        {"statistics": statistics, "tokenizer": tokens},
    )


def _real_setup(arguments: argparse.Namespace, device: torch.device, dtype: str | None) -> Setup:
    own = arguments.model is None
    model, tokenizer, _ = checkpoints.load(
        assets.model_dir(say) if own else arguments.model,
        device=str(device),
        dtype=dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    model.eval()
    runner = Runner(model)
    layers, statistics = _layers(arguments, runner), None
    if not arguments.identity:
        usual = own and arguments.layer is None and arguments.layers is None
        folder = arguments.statistics or (demo.statistics_dir(say) if usual else None)
        statistics = Statistics.load(folder) if folder else Statistics.cached(runner, layers)
    geometries = Geometries(runner, layers, statistics)
    if method_named(arguments.method).bare:
        geometries.first_tokens = first_token_statistics(runner, layers)
    geometries.check()
    if arguments.no_quality:
        sentences = []
    elif arguments.sentences:
        sentences = read_sentences(arguments.sentences)
    else:
        sentences = demo.held_out_sentences(_SENTENCES)
    return Setup(
        model,
        tokenizer,
        sample_contexts(model, tokenizer),
        geometries,
        arguments.method,
        default_settings(model.config),
        sentences,
    )


def _layers(arguments: argparse.Namespace, runner: Runner) -> tuple[int, ...]:
    """Those that are given, else those that an edit by this method takes by default."""
    given = given_layers(arguments.layer, arguments.layers)
    if given is not None:
        layers = checked_layers(given, len(runner.layers))
        check_shared_out(runner, layers)
        return layers
    spread = method_named(arguments.method).spread
    return shared_out(runner, runner.decoder.sites_of(default_layers(runner.model.config, spread)))


def processor(device: torch.device | None = None) -> str:
    """Name of the GPU, or of the CPU, for figures that depend on it."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append_rows(file: Path, reports: Sequence[dict[str, Any]]) -> None:
    """One flat row per run; nested tables become dotted columns. A file with other columns is refused."""
    rows = [_flat(report) for report in reports]
    # A run may have a column that another has not: a share of its own dtype.
    columns = list(dict.fromkeys(column for row in rows for column in row))
    exists = file.exists() and file.stat().st_size > 0
    if exists:
        with file.open(newline="", encoding="utf-8") as lines:
            header = next(csv.reader(lines))
        if header != columns:
            raise ArgumentError(f"csv: {file} has other columns than this run; give another file")
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        if not exists:
            writer.writeheader()
        writer.writerows(rows)


def _flat(report: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = round(value, 6) if isinstance(value, float) else value
    return out


def _overview(runs: Sequence[dict[str, Any]]) -> Table:
    """A line for each batch size and dtype."""
    table = Table(header_style="bold")
    stages = list(dict.fromkeys(stage for run in runs for stage in run["seconds_by_stage"]))
    columns = ["weights", "products", "batch", "CPU s/edit", "s/edit", *stages, "GFLOP/edit", "over ideal", "rate"]
    columns += ["peak GiB", "efficacy", "perplexity ratio", "baseline / ours"]
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for run in runs:
        quality = run["quality"]
        table.add_row(
            run["dtype"],
            run["compute_dtype"],
            str(run["batch"]),
            f"{run['process_seconds_per_edit']:.3g}",
            f"{run['seconds_per_edit']:.3g}",
            *(f"{run['seconds_by_stage'].get(stage, 0.0) / run['edits']:.3g}" for stage in stages),
            f"{run['flops_per_edit'] / 1e9:.0f}",
            f"{run['flops_over_ideal']:.2f}",
            f"{run['share_of_matrix_rate']:.0%}",
            f"{run['peak_memory_bytes'] / 2**30:.2f}",
            *(f"{quality[key]:.3f}" if key in quality else "" for key in ("efficacy", "perplexity_ratio")),
            f"{run['process_time_ratio']:.1f}" if "process_time_ratio" in run else "",
        )
    table.caption = "stages in s/edit; rate: FLOP/s as a share of that of a large product in the same dtype"
    return table


def _table(report: dict[str, Any]) -> Table:
    tracks = {"rome_fast": report} | {name: report[key] for name, key in TRACKS.items() if key in report}
    table = Table(header_style="bold")
    for column in (
        "",
        "edits",
        "CPU s/edit",
        "s/edit",
        "steps",
        "GFLOP/edit",
        "efficacy",
        "paraphrase",
        "neighbourhood",
    ):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("perplexity ratio", justify="right")
    for name, track in tracks.items():
        quality = track["quality"]
        table.add_row(
            name,
            str(track["edits"]),
            f"{track['process_seconds_per_edit']:.2f}",
            f"{track['seconds_per_edit']:.2f}",
            f"{track['steps_per_edit']:.1f}",
            f"{track['flops_per_edit'] / 1e9:.0f}" if track["flops_per_edit"] else "",
            *(
                f"{quality[key]:.3f}" if key in quality else ""
                for key in ("efficacy", "paraphrase", "neighborhood", "perplexity_ratio")
            ),
        )
    roofline = report["roofline"]
    product = f"a {roofline['matrix_dtype']} product of size {roofline['matrix_size']}"
    ratios = [
        f"FLOPs over the ideal count: {report['flops_over_ideal']:.3f}",
        f"{report['flops_per_second'] / 1e12:.3g} TFLOP/s, {report['share_of_matrix_rate']:.0%} of the "
        f"{roofline['matrix_rate'] / 1e12:.3g} of {product}",
        f"peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB, {report['peak_memory_over_weights']:.2f} x the "
        f"weights; statistics: {report['statistics']}",
    ]
    if "process_time_ratio" in report:
        share = report["share"]
        ratios.append(
            f"baseline / rome_fast: process time {report['process_time_ratio']:.1f} "
            f"(algebra {share['algebra']:.1f} x stop rule {share['stop_rule']:.2f} x drafts {share['draft']:.2f} "
            f"x dtype {share['dtype']:.2f}), FLOPs {report['flops_ratio']:.1f}"
        )
        ratios.append(
            f"ΔW against the baseline's, same stop rule: {report['median_difference']:.1e} apart (median), "
            f"{report['largest_difference']:.1e} (largest)"
        )
    table.caption = "\n".join(ratios)
    return table
