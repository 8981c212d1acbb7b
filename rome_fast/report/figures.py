"""Figures, drawn with matplotlib (the `demo` extra)."""

from collections.abc import Sequence
from pathlib import Path

from ..records import Record
from ..runs.terminal import one_line

_COLOURS = {
    "rome": "#c0392b",
    "c-rome-released": "#e0a030",
    "c-rome": "#2471a3",
    "p-rome": "#7f8c8d",
    "dual": "#56b4e9",
}
# A collapsed perplexity can exceed what an axis can show.
HIGHEST = 1e6


def method_colour(method: str) -> str:
    """The colour of a method in every figure."""
    return _COLOURS.get(method, "#555555")


def literal(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign begins no formula, and nothing breaks the line."""
    return one_line(text).replace("$", r"\$")


def collapse_figure(records: Sequence[Record], base_perplexity: float, conditions: str, file: Path) -> None:
    """Two bars a method for every request: perplexity of the edited model (log), and P(target) behind a prefix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    requests = list(dict.fromkeys((r.prompt.replace("{}", r.subject), r.target) for r in records))
    methods = list(dict.fromkeys(r.method for r in records))
    found = {(r.prompt.replace("{}", r.subject), r.target, r.method): r for r in records}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.2 + 0.95 * len(requests)), sharey=True)
    height = 0.8 / len(methods)
    for j, method in enumerate(methods):
        places = [i + (j - (len(methods) - 1) / 2) * height for i in range(len(requests))]
        rows = [found[(*request, method)] for request in requests]
        perplexities = [min(r.perplexity_after or 0.0, HIGHEST) for r in rows]
        colour = method_colour(method)
        bars = left.barh(places, perplexities, height * 0.9, color=colour, label=method)
        left.bar_label(bars, [f" {p:,.0f}" if p >= 1000 else f" {p:.1f}" for p in perplexities], fontsize=8)
        bare = [r.probability_after or 0.0 for r in rows]
        prefixed = [r.probability_after_prefixed or 0.0 for r in rows]
        right.barh(places, prefixed, height * 0.9, color=colour)
        right.plot(bare, places, linestyle="none", marker="|", markersize=9, markeredgewidth=2, color="black")
    left.axvline(base_perplexity, color="black", linewidth=0.8, linestyle=":")
    left.set_xscale("log")
    left.margins(x=0.2)
    left.set_xlabel(f"perplexity of the edited model (dotted: unedited, {base_perplexity:.1f})")
    left.set_yticks(
        range(len(requests)), [f"{literal(text)}\n→ {literal(target)}" for text, target in requests], fontsize=9
    )
    left.invert_yaxis()
    right.set_xlim(0, 1.02)
    right.set_xlabel("P(target): bar behind a prefix, tick without")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper center", ncols=len(methods), frameon=False)
    figure.text(0.985, 0.005, literal(conditions), ha="right", fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.02, 1, 0.93))
    figure.savefig(file, dpi=150)
    plt.close(figure)
