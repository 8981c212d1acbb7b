"""The figure of `rome-fast bench`: where the time of an edit goes, by batch size and dtype."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .figures import literal

TRACKS = {
    "rome_fast, products in float32": "products_in_float32",
    "rome_fast, without drafts": "without_drafts",
    "rome_fast, released stop rule": "released_stop_rule",
    "as released": "as_released",
}
"""Names and keys of the other ways of making the edits that a report may hold, each a step further from ours."""

_FORMATS = (".png", ".svg", ".pdf")
_STAGES = {"keys": "#7fb3d5", "values": "#2471a3", "update": "#e0a030"}
_LEGEND = {"frameon": False, "fontsize": 8, "loc": "lower left", "bbox_to_anchor": (0, 1)}
_OTHERS = ("#2471a3", "#5499c7", "#7fb3d5", "#e0a030", "#c0392b")


def check_figure(file: Path) -> None:
    """Raise ArgumentError for a figure that could not be written once everything is measured."""
    if file.suffix.lower() not in _FORMATS:
        raise ArgumentError(f"plot: got {file}, wanted a name that ends in {', '.join(_FORMATS)}")
    if not file.parent.is_dir():
        raise ArgumentError(f"plot: there is no folder {file.parent}")
    if find_spec("matplotlib") is None:
        raise ArgumentError("plot: wants matplotlib, which `pip install matplotlib` installs")


def bench_figure(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Seconds an edit by stage, FLOPs an edit against the ideal count and, with a baseline, process time by track."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with_baseline = any("as_released" in run for run in runs)
    count = 3 if with_baseline else 2
    figure, panels = plt.subplots(1, count, figsize=(5 * count, 2.3 + 0.6 * len(runs)), sharey=True, squeeze=False)
    left, middle = panels[0][:2]
    places = range(len(runs))
    start = [0.0] * len(runs)
    for stage in dict.fromkeys(stage for run in runs for stage in run["seconds_by_stage"]):
        seconds = [run["seconds_by_stage"].get(stage, 0.0) / run["edits"] for run in runs]
        left.barh(places, seconds, 0.6, start, label=stage, color=_STAGES.get(stage, "#555555"))
        start = [a + b for a, b in zip(start, seconds, strict=True)]
    for place, run, end in zip(places, runs, start, strict=True):
        left.annotate(f" {end:.3g} s, {1 / run['seconds_per_edit']:.3g} edits/s", (end, place), va="center", fontsize=8)
    left.set_yticks(places, [_name(run) for run in runs], fontsize=9)
    left.invert_yaxis()
    left.margins(x=0.45)
    left.set_xlabel("seconds an edit")
    left.legend(**_LEGEND, ncols=3)

    flops = [run["flops_per_edit"] / 1e9 for run in runs]
    middle.barh(places, flops, 0.6, color="#7fb3d5")
    ideal = [run["ideal_flops_per_edit"] / 1e9 for run in runs]
    middle.plot(ideal, places, linestyle="none", marker="|", markersize=18, markeredgewidth=2, color="black")
    middle.margins(x=0.1)
    middle.set_xlabel("GFLOP an edit (tick: ideal count)")

    if with_baseline:
        _draw_tracks(panels[0][2], runs)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.995, 0.01, literal(_conditions(runs)), ha="right", fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _draw_tracks(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    names = {"rome_fast": None} | {name: key for name, key in TRACKS.items() if any(key in run for run in runs)}
    height = 0.8 / len(names)
    for number, (name, key) in enumerate(names.items()):
        shown = [(place, run if key is None else run[key]) for place, run in enumerate(runs) if key in (None, *run)]
        at = [place + (number - (len(names) - 1) / 2) * height for place, _ in shown]
        seconds = [track["process_seconds_per_edit"] for _, track in shown]
        bars = axes.barh(at, seconds, height * 0.9, label=name, color=_OTHERS[number % len(_OTHERS)])
        axes.bar_label(bars, [f" {value:.3g}" for value in seconds], fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("process seconds an edit")
    axes.legend(**_LEGEND, ncols=2)


def _name(run: dict[str, Any]) -> str:
    products = "" if run["compute_dtype"] == run["dtype"] else f", products {run['compute_dtype']}"
    return f"{run['dtype']}{products}\nbatch {run['batch']}"


def _conditions(runs: Sequence[dict[str, Any]]) -> str:
    run = runs[0]
    threads = f"{run['threads']} thread{'' if run['threads'] == 1 else 's'}, " if run["device"] == "cpu" else ""
    return (
        f"{Path(run['model']).name}, {run['processor']}, {threads}layer {run['layer']}, {run['method']}, "
        f"statistics: {run['statistics']}, {run['contexts']} contexts, {run['edits']} edits"
    )
