"""What the arguments of `rome-fast bench` mean, and what it prints."""

import argparse
import csv
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import assets, checkpoints, demo
from ..contexts import sample_contexts
from ..defaults import default_layer, default_settings
from ..edits import load_edits
from ..errors import ArgumentError
from ..report import print_table
from ..runner import Runner
from ..statistics import Statistics
from .throughput import Setup, bench

_REQUESTS = Path(__file__).with_name("requests.jsonl")
_SENTENCES = 20


def run_bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, append the CSV row; returns the report."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    own = arguments.model is None
    model, tokenizer, _ = checkpoints.load(assets.model_dir(print) if own else arguments.model)
    if arguments.dtype:
        model.to(getattr(torch, arguments.dtype))
    module: torch.nn.Module = model
    module.to(torch.device(arguments.device)).eval()
    runner = Runner(model)
    layer = default_layer(model.config) if arguments.layer is None else arguments.layer
    edits = load_edits(arguments.edits or _REQUESTS)[: arguments.count]
    if arguments.batch < 1 or not edits:
        raise ArgumentError(f"batch, count: got {arguments.batch} and {len(edits)} edits, wanted at least 1 of each")
    if arguments.identity:
        factor = None
    else:
        folder = arguments.statistics or (demo.statistics_dir(print) if own and arguments.layer is None else None)
        statistics = Statistics.load(folder) if folder else Statistics.cached(runner, layer)
        factor = statistics.for_layer(runner, layer).factor(runner.device)
    if arguments.sentences:
        sentences = [s for s in arguments.sentences.read_text(encoding="utf-8").splitlines() if s.strip()]
    else:
        sentences = [] if arguments.no_quality else demo.held_out_sentences(_SENTENCES)
    setup = Setup(
        model,
        tokenizer,
        sample_contexts(model, tokenizer),
        layer,
        arguments.method,
        default_settings(model.config),
        factor,
        sentences,
    )

    def say(line: str) -> None:
        print(line, flush=True)

    report = bench(setup, edits, arguments.batch, arguments.baseline, not arguments.no_quality, say)
    report["versions"] = checkpoints.versions()
    report["date"] = datetime.now(UTC).date().isoformat()
    report["processor"] = processor()
    print_table(_table(report))
    if arguments.csv:
        append_row(arguments.csv, report)
    return report


def processor() -> str:
    """Name of the CPU, for figures that depend on it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def append_row(file: Path, report: dict[str, Any]) -> None:
    """One flat row per run; nested tables become dotted columns. A file with other columns is refused."""
    row = _flat(report)
    exists = file.exists() and file.stat().st_size > 0
    if exists:
        with file.open(newline="", encoding="utf-8") as lines:
            header = next(csv.reader(lines))
        if header != list(row):
            raise ArgumentError(f"csv: {file} has other columns than this run; give another file")
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(row))
        if not exists:
            writer.writeheader()
        writer.writerow(row)


def _flat(report: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = round(value, 6) if isinstance(value, float) else value
    return out


def _table(report: dict[str, Any]) -> Table:
    tracks = {"rome_fast": report}
    if "as_released" in report:
        tracks["rome_fast, released stop rule"] = report["released_stop_rule"]
        tracks["as released"] = report["as_released"]
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
    ratios = [f"FLOPs over the ideal count: {report['flops_over_ideal']:.3f}"]
    if "process_time_ratio" in report:
        share = report["share"]
        ratios.append(
            f"baseline / rome_fast: process time {report['process_time_ratio']:.1f} "
            f"(algebra {share['algebra']:.1f} x stop rule {share['stop_rule']:.2f}), "
            f"FLOPs {report['flops_ratio']:.1f}"
        )
        ratios.append(
            f"ΔW against the baseline's, same stop rule: {report['median_difference']:.1e} apart (median), "
            f"{report['largest_difference']:.1e} (largest)"
        )
    table.caption = "\n".join(ratios)
    return table
