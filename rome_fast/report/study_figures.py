"""The figures of the collapse study, drawn with matplotlib (the `study` extra), each as the bytes of a PNG.

Triangles are first-token requests, circles normal ones; filled marks are models that collapsed. A colour is a method,
which is named as well, or in the projection a kind of vector; colour-blind readers can tell all of them apart.
"""

import io
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from .figures import HIGHEST, literal, method_colour
from .projection import directions, neighbour_embedding, principal_components
from .study_data import Keys, PrefixRecord, StudyData, StudyRecord
from .study_tables import methods_of

_FIRST, _NORMAL = "^", "o"
_GREY = "#666666"
_ROME = method_colour("rome")
_BEYOND = "above 10⁶ or infinite"


def perplexity_figure(data: StudyData, conditions: str) -> bytes:
    """Perplexity of every edited model, sorted within its method and kind of request."""
    figure, axes = _figure(1, height=_bands_height(data.records))
    limit = data.collapse_ratio * data.perplexity_before
    edge = _edge([r.perplexity_after for r in data.records], limit)
    _bands(axes[0], data.records, lambda r: _drawable(r.perplexity_after, edge))
    marks = [
        (data.perplexity_before, ":", "right", f"unedited {data.perplexity_before:.1f} "),
        (limit, "--", "left", f" collapsed above {limit:.1f}"),
    ]
    if any((r.perplexity_after or 0.0) >= HIGHEST for r in data.records):
        marks.append((edge, "-", "center", _BEYOND))
    for x, style, side, words in marks:
        axes[0].axvline(x, color="#bbbbbb" if x == edge else "black", linewidth=0.9, linestyle=style, zorder=0)
        axes[0].annotate(words, (x, 1.0), xycoords=("data", "axes fraction"), ha=side, va="bottom", fontsize=8)
    # A log axis that spans less than this would show rounding errors as differences.
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(min(low, data.perplexity_before / 2), max(high, limit * 2.5))
    axes[0].set_xlabel("perplexity of the edited model")
    return _png(figure, conditions, _group_marks(collapse=True))


def denominator_figure(data: StudyData, conditions: str) -> bytes:
    """|uᵀk| of every edit, sorted within its method and kind of request."""
    figure, axes = _figure(1, height=_bands_height(data.records))
    _bands(axes[0], data.records, lambda r: abs(r.denominator))
    axes[0].set_xlabel("denominator |uᵀk| of the update")
    return _png(figure, conditions, _group_marks(collapse=True))


def projection_figure(keys: Keys, conditions: str) -> bytes:
    """The directions of C⁻¹k̄, kᵤ and k̄ on a plane: by principal components, and by t-SNE where it is installed."""
    kinds = (
        ("C⁻¹ k̄, left of the denominator", keys.solved, "#e69f00"),
        ("kᵤ, unprefixed key", keys.unprefixed, "#222222"),
        ("k̄, mean key", keys.mean, "#009e73"),
    )
    vectors = np.concatenate([directions(values) for _, values, _ in kinds])
    figure, (left, right) = _figure(2, height=5.0)
    points, shares = principal_components(vectors)
    _scatter(left, points, keys, [colour for *_, colour in kinds])
    left.set_title("principal components", fontsize=10)
    left.set_xlabel(f"first ({shares[0]:.0%} of the variance)")
    left.set_ylabel(f"second ({shares[1]:.0%})")
    right.set_title("t-SNE", fontsize=10)
    right.set_xticks([])
    right.set_yticks([])
    try:
        _scatter(right, neighbour_embedding(vectors), keys, [colour for *_, colour in kinds])
    except ImportError:
        words = "t-SNE needs scikit-learn:\npip install 'rome-fast[study]'"
        right.text(0.5, 0.5, words, transform=right.transAxes, ha="center", va="center", color=_GREY)
    marks = [_mark(name, "s", colour, filled=True) for name, _, colour in kinds]
    return _png(figure, conditions, [*marks, *_group_marks()])


def key_norm_figure(keys: Keys, layer: int, conditions: str) -> bytes:
    """Mean norm of the key of a first token and of later tokens, layer by layer; the edited layer is marked."""
    figure, axes = _figure(1, height=3.6)
    layers = range(keys.norms.shape[1])
    first, later = keys.norms
    marks = [
        *axes[0].plot(layers, first, color="black", marker=_FIRST, markersize=5, label="first token"),
        *axes[0].plot(layers, later, color=_GREY, marker=_NORMAL, markersize=4, mfc="white", label="later tokens"),
    ]
    axes[0].axvline(layer, color="black", linewidth=0.9, linestyle=":", zorder=0)
    place = (layer, 1.0)
    axes[0].annotate("edited layer", place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("mean norm of the key")
    return _png(figure, conditions, marks)


def prefix_figure(prefixes: Sequence[PrefixRecord], collapse_ratio: float, conditions: str) -> bytes:
    """rome's denominator and perplexity ratio on first-token requests, by the words put before the subject."""
    figure, (left, right) = _figure(2, height=3.8)
    _by_words(left, prefixes, lambda r: abs(r.denominator))
    left.set_ylabel("denominator |uᵀk|")
    edge = _edge([r.perplexity_ratio for r in prefixes], collapse_ratio)
    _by_words(right, prefixes, lambda r: _drawable(r.perplexity_ratio, edge))
    right.axhline(collapse_ratio, color="black", linewidth=0.9, linestyle="--", zorder=0)
    marks = [(collapse_ratio, f"collapsed above {collapse_ratio:g}")]
    if any((r.perplexity_ratio or 0.0) >= HIGHEST for r in prefixes):
        marks.append((edge, _BEYOND))
    for y, words in marks:
        right.annotate(words, (1.0, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    low, high = right.get_ylim()
    right.set_ylim(min(low, 0.8), max(high, 2 * collapse_ratio))
    right.set_ylabel("perplexity, edited / unedited")
    lines = [
        Line2D([], [], color=_ROME, marker=_FIRST, linewidth=2, label="median"),
        Line2D([], [], color=_ROME, alpha=0.3, linewidth=1, label="one request"),
    ]
    return _png(figure, conditions, lines)


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure, conditions: str, marks: Sequence[Line2D]) -> bytes:
    figure.legend(handles=list(marks), loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)
    figure.supxlabel(literal(conditions), fontsize=7, color=_GREY, x=0.99, ha="right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _mark(label: str, marker: str, colour: str, filled: bool) -> Line2D:
    face = colour if filled else "white"
    return Line2D([], [], linestyle="none", marker=marker, color=colour, markerfacecolor=face, label=label)


def _group_marks(collapse: bool = False) -> list[Line2D]:
    marks = [_mark("first-token request", _FIRST, _GREY, not collapse), _mark("normal request", _NORMAL, _GREY, False)]
    return [*marks, _mark("filled: collapsed", "s", _GREY, True)] if collapse else marks


def _bands_height(records: Sequence[StudyRecord]) -> float:
    """Inches."""
    return 1.6 + 0.95 * len(methods_of(records))


def _bands(axes: Axes, records: Sequence[StudyRecord], value: Callable[[StudyRecord], float | None]) -> None:
    """One band per method, first-token requests in its upper half; within a half, values rise from bottom to top."""
    methods = methods_of(records)
    labels = []
    for band, method in enumerate(methods):
        edits = [r for r in records if r.method == method]
        for first, bottom in ((True, band - 0.05), (False, band + 0.4)):
            shown = [r for r in edits if r.first_token == first and value(r) is not None]
            shown.sort(key=lambda r: value(r) or 0.0)
            axes.scatter(
                [value(r) or 0.0 for r in shown],
                [bottom - 0.35 * (rank + 0.5) / len(shown) for rank in range(len(shown))],
                s=26,
                marker=_FIRST if first else _NORMAL,
                edgecolors=method_colour(method),
                facecolors=[method_colour(method) if r.collapsed else "white" for r in shown],
            )
        verdicts = [r.collapsed for r in edits if r.collapsed is not None]
        labels.append(f"{literal(method)}\n{sum(verdicts)} of {len(verdicts)} collapsed")
    axes.set_xscale("log")
    axes.set_yticks(range(len(methods)), labels, fontsize=9)
    axes.set_ylim(len(methods) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)


def _edge(perplexities: Sequence[float | None], least: float) -> float:
    """Where perplexities beyond what an axis can show are drawn: a little beyond all the others."""
    return 3 * max([least, *(p for p in perplexities if p is not None and p < HIGHEST)])


def _drawable(perplexity: float | None, edge: float) -> float | None:
    return edge if perplexity is not None and perplexity >= HIGHEST else perplexity


def _request(record: PrefixRecord) -> tuple[str, str, str]:
    """What stays the same whatever is put before the subject."""
    return record.subject, record.prompt.partition("{}")[2], record.target


def _scatter(axes: Axes, points: NDArray[np.floating], keys: Keys, colours: Sequence[str]) -> None:
    for kind, colour in zip(np.split(points, len(colours)), colours, strict=True):
        for first, marker in ((False, _NORMAL), (True, _FIRST)):
            shown = kind[keys.first_token == first]
            face = colour if first else "none"
            axes.scatter(shown[:, 0], shown[:, 1], s=28, marker=marker, edgecolors=colour, facecolors=face, alpha=0.7)


def _by_words(axes: Axes, prefixes: Sequence[PrefixRecord], value: Callable[[PrefixRecord], float | None]) -> None:
    """A thin line per request, and the median; counts of words are evenly spaced."""
    words = sorted({r.words for r in prefixes})
    known = [(r, v) for r in prefixes if (v := value(r)) is not None]
    for request in dict.fromkeys(_request(r) for r in prefixes):
        line = {r.words: v for r, v in known if _request(r) == request}
        axes.plot(
            [words.index(w) for w in sorted(line)],
            [line[w] for w in sorted(line)],
            color=_ROME,
            alpha=0.3,
            linewidth=1,
        )
    groups = [[v for r, v in known if r.words == w] for w in words]
    medians = [statistics.median(group) if group else math.nan for group in groups]
    axes.plot(range(len(words)), medians, color=_ROME, marker=_FIRST, linewidth=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(words)), [str(w) for w in words])
    axes.set_xlabel("words before the subject")
