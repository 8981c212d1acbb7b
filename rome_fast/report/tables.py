"""Tables for the terminal."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from ..evaluation import AgeGroup, EditMetrics, Interval
from ..evaluation.harness import TaskChange
from ..records import Record
from ..runs.terminal import one_line
from .outcomes import verdict

_MOST_SHOWN = 40  # characters of an answer


def edit_table(records: Sequence[Record]) -> Table:
    """One row per edit; perplexity columns where it was measured."""
    measured = any(r.perplexity_after is not None for r in records)
    columns = ["request → target", "method", "P before", "P after", "P with prefix", "uᵀk", "‖Δ‖/‖W‖"]
    table = _table([*columns, "perplexity", "verdict"] if measured else [*columns, "verdict"])
    previous = None
    for r in records:
        name = f"{r.text or r.prompt.replace('{}', r.subject)} → {r.target}"
        cells = [
            "" if name == previous else one_line(name),
            r.method,
            number(r.probability_before),
            number(r.probability_after),
            number(r.probability_after_prefixed),
            f"{r.denominator:.4g}",
            _ratios(r),
        ]
        if measured:
            cells.append(f"{number(r.perplexity_before)} → {number(r.perplexity_after)}")
        table.add_row(*cells, verdict(r))
        previous = name
    return table


def metrics_table(metrics: Sequence[EditMetrics]) -> Table:
    table = _table(
        [
            "subject → target",
            "P",
            "argmax",
            "decoded",
            "answer",
            "efficacy",
            "paraphrase",
            "neighbourhood",
            "P with prefix",
        ]
    )
    for m in metrics:
        table.add_row(
            one_line(f"{m.subject} → {m.target}"),
            number(m.probability),
            "yes" if m.argmax else "no",
            repr(m.decoded),
            "–" if m.answer is None else f"{_shortened(m.answer)!r}{' ✓' if m.answer_right else ''}",
            number(m.efficacy),
            number(m.paraphrase),
            number(m.neighborhood),
            number(m.probability_prefixed),
        )
    return table


def summary_table(figures: Mapping[str, Interval], count: int) -> Table:
    """A row for each figure over `count` edits, with the 95 % interval of its mean."""
    table = _table(["figure", f"mean of {count}", "95 %"])
    for name, (mean, low, high) in figures.items():
        table.add_row(name, number(mean), f"{number(low)} … {number(high)}")
    return table


def ages_table(groups: Sequence[AgeGroup]) -> Table:
    """A row for each figure, a column for edits made one after another, the oldest first: mean and 95 % interval."""
    spans = [f"{g.first}" if g.first == g.last else f"{g.first} – {g.last}" for g in groups]
    ends = ["the first", *[""] * (len(groups) - 2), "the last"][: len(groups)]
    table = _table(["figure by age", *(f"{span}\n{end}".strip() for span, end in zip(spans, ends, strict=True))])
    for name in dict.fromkeys(name for group in groups for name in group.figures):
        cells = [name]
        for group in groups:
            interval = group.figures.get(name)
            cells.append("–" if interval is None else "{} ({} … {})".format(*map(number, interval)))
        table.add_row(*cells)
    return table


def tasks_table(changes: Sequence[TaskChange]) -> Table:
    """A row for each metric of a task, with standard errors."""
    compared = any(change.before is not None for change in changes)
    table = _table(["task", "metric", *(["before"] if compared else []), "now", *(["difference"] if compared else [])])
    for change in changes:
        cells = [one_line(change.task), one_line(change.metric), _with_error(change.after.value, change.after.error)]
        if change.before is not None:
            cells.insert(2, _with_error(change.before.value, change.before.error))
            cells.append(_with_error(change.difference, change.error))
        table.add_row(*cells)
    return table


def _with_error(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def _ratios(record: Record) -> str:
    """‖Δ‖ / ‖W‖, of several layers the least and the most."""
    if not record.update_ratios:
        return "–"
    least, most = (f"{of(record.update_ratios):.2f}" for of in (min, max))
    return least if least == most else f"{least} – {most}"


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isinf(value) or abs(value) >= 10_000:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _table(columns: Sequence[str]) -> Table:
    table = Table(header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if i < 2 or column == "verdict" else "right")
    return table
