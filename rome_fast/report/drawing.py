"""Small figures as SVG inside a page: they take its colours, light or dark, and its text, and need no library.

A mark says its numbers where the pointer rests on it. Values that are no finite numbers are not drawn.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import quantiles

from .document import escaped

BINS = 20
"""Of a histogram."""

STYLE = """\
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem 2rem; }
.figures figure { margin: 0; } .figures h3 { font-size: 1rem; margin: 0 0 0.25rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.fill0 { fill: var(--before); } .fill1 { fill: var(--now); }
.line { stroke: var(--rule); fill: none; } .line1 { stroke: var(--now); } .median { stroke: var(--paper); }
.median { stroke-width: 2; } .limit { stroke: var(--bad); stroke-dasharray: 4 3; }
.dots { stroke: var(--now); stroke-width: 5; stroke-linecap: round; fill: none; opacity: 0.6; }
"""
"""Of figures in a page; it names the colours --before, --now and --bad beside those of every document."""

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 330, 28, 170  # of what lies between the axes
_BAR, _NAMES, _BARS_END = 22, 122, 276  # height of a horizontal bar with its gap; where names end, and bars


def histogram(
    title: str,
    axis: str,
    series: Mapping[str, Sequence[float]],
    low: float,
    high: float,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """How many values of each series lie in each of BINS equal parts of low .. high, the outermost with what is beyond.

    A bin that is not empty can be seen, however few it holds. `marks` are vertical lines, with what they mean.
    """
    counts = {name: _counts(values, low, high) for name, values in series.items()}
    most = max((max(bins) for bins in counts.values()), default=0) or 1
    step = (_RIGHT - _LEFT) / BINS
    width = 0.84 * step / len(series)
    parts = _axes(axis, "edits", [f"{value:g}" for value in (low, (low + high) / 2, high)])
    parts += [_y_label(_TOP, f"{most}"), *_legend(list(series))]
    for j, (name, bins) in enumerate(counts.items()):
        colour = j if len(series) > 1 else 1
        for i, count in enumerate(bins):
            if count:
                tall = max(2.0, count / most * (_BOTTOM - _TOP))
                x = _LEFT + i * step + 0.08 * step + j * width
                edges = (f"{low + (high - low) * edge / BINS:.3g}" for edge in (i, i + 1))
                said = f"{name}: {count} of {sum(bins)} edits, {' to '.join(edges)}"
                parts.append(_rectangle(colour, x, _BOTTOM - tall, width, tall, said))
    for value, words in marks:
        x = _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)
        parts.append(f'<path class="limit" d="M{x:.1f} {_TOP}V{_BOTTOM}"><title>{escaped(words)}</title></path>')
    return _svg(title, parts)


def spreads(title: str, axis: str, groups: Mapping[str, Sequence[float]]) -> str:
    """Of each group a line from the least to the most, a box from the first quartile to the third, and the median."""
    known = {name: sorted(v for v in values if math.isfinite(v)) for name, values in groups.items()}
    known = {name: values for name, values in known.items() if values}
    most = max((values[-1] for values in known.values()), default=0.0) or 1.0
    step = (_RIGHT - _LEFT) / max(len(known), 1)
    parts = [*_axes(axis, "", []), _y_label(_TOP, f"{most:.3g}"), _y_label(_BOTTOM, "0")]
    named = math.ceil(len(known) / 12)  # every so many of them, where there is no room for more
    for i, (name, values) in enumerate(known.items()):
        least, first, median, third, last = five_numbers(values)
        x, wide = _LEFT + (i + 0.5) * step, min(0.6 * step, 26)
        top, upper, middle, lower, foot = (
            _BOTTOM - v / most * (_BOTTOM - _TOP) for v in (last, third, median, first, least)
        )
        said = escaped(
            f"{axis} {name}: least {least:.3g}, median {median:.3g}, most {last:.3g}, of {len(values)} edits"
        )
        parts.append(
            f'<g><title>{said}</title><path class="line1" d="M{x:.1f} {top:.1f}V{foot:.1f}"/>'
            f'<rect class="fill1" x="{x - wide / 2:.1f}" y="{upper:.1f}" width="{wide:.1f}" '
            f'height="{max(lower - upper, 1.5):.1f}"/>'
            f'<path class="median" d="M{x - wide / 2:.1f} {middle:.1f}h{wide:.1f}"/></g>'
        )
        if i % named == 0:
            parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{escaped(name)}</text>')
    return _svg(title, parts)


def scatter(title: str, across: str, up: str, points: Sequence[tuple[float, float]], right: float) -> str:
    """Points (x, y), from 0 to `right` across and from 0 to the largest up; all of them are one path."""
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    most = max((y for _, y in known), default=0.0) or 1.0
    parts = [*_axes(across, up, ["0", f"{right / 2:g}", f"{right:g}"]), _y_label(_TOP, f"{most:.3g}")]
    places = (
        (
            _LEFT + min(max(x / right, 0.0), 1.0) * (_RIGHT - _LEFT),
            _BOTTOM - max(y, 0.0) / most * (_BOTTOM - _TOP),
        )
        for x, y in known
    )
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    return _svg(title, [*parts, f'<path class="dots" d="{dots}"/>'])


def bars(title: str, values: Mapping[str, float], unit: str) -> str:
    """A horizontal bar for each, with its name and number."""
    most = max((v for v in values.values() if math.isfinite(v)), default=0.0) or 1.0
    parts = []
    for i, (name, value) in enumerate(values.items()):
        y = 6 + i * _BAR
        long = value / most * (_BARS_END - _NAMES) if math.isfinite(value) else 0.0
        number = "no number"
        if math.isfinite(value):
            number = f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
        parts.append(f'<text x="{_NAMES - 6}" y="{y + 12}" text-anchor="end">{escaped(name)}</text>')
        parts.append(_rectangle(1, _NAMES, y, max(long, 1.0), _BAR - 6, f"{name}: {number}"))
        parts.append(f'<text x="{_NAMES + max(long, 1.0) + 5:.1f}" y="{y + 12}">{escaped(number)}</text>')
    return _svg(title, parts, 12 + _BAR * len(values))


def five_numbers(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Least, first quartile, median, third quartile and most, of at least one value; numpy's default quartiles."""
    if len(values) == 1:
        return (values[0],) * 5
    first, median, third = quantiles(values, n=4, method="inclusive")
    return min(values), first, median, third, max(values)


def _counts(values: Sequence[float], low: float, high: float) -> list[int]:
    counts = [0] * BINS
    for value in values:
        if math.isfinite(value):
            counts[min(max(int((value - low) / (high - low) * BINS), 0), BINS - 1)] += 1
    return counts


def _axes(across: str, up: str, ticks: Sequence[str]) -> list[str]:
    """Both axes with their names, and what stands at even distances below."""
    parts = [f'<path class="line" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>']
    for i, words in enumerate(ticks):
        x = _LEFT + i / (len(ticks) - 1) * (_RIGHT - _LEFT)
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{escaped(words)}</text>')
    middle = (_LEFT + _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_BOTTOM + 32}" text-anchor="middle">{escaped(across)}</text>')
    if up:
        parts.append(f'<text x="4" y="12">{escaped(up)}</text>')
    return parts


def _y_label(y: float, words: str) -> str:
    return f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escaped(words)}</text>'


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for i, name in enumerate(names if len(names) > 1 else ()):
        x = _RIGHT - 64 * (len(names) - i) + 8
        parts.append(f'<rect class="fill{i}" x="{x}" y="3" width="10" height="10"/>')
        parts.append(f'<text x="{x + 14}" y="12">{escaped(name)}</text>')
    return parts


def _rectangle(colour: int, x: float, y: float, width: float, height: float, said: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="fill{colour}" {place}><title>{escaped(said)}</title></rect>'


def _svg(title: str, parts: Sequence[str], height: float = _HEIGHT) -> str:
    return f'<svg role="img" aria-label="{escaped(title)}" viewBox="0 0 {_WIDTH} {height:g}">{"".join(parts)}</svg>'
