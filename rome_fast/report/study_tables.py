"""The tables of the collapse study. A cell is empty where nothing was measured, and never zero for that reason."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from ..methods import METHODS, Method
from .document import Table
from .study_data import FactorRecord, PrefixRecord, StudyData, StudyRecord

LEFT_KEYS = ("mean", "unprefixed")
DENOMINATOR_KEYS = ("unprefixed", "mean")
RESIDUALS = ("delta", "to_unprefixed_value")

_CONDITIONS = {
    "model": "model",
    "dtype": "dtype",
    "device": "device",
    "processor": "processor",
    "processes": "processes",
    "threads": "threads of each",
    "layer": "edited layer",
    "spread": "layers of methods that spread an edit",
    "statistics": "statistics C",
    "contexts": "editing contexts",
    "unseen_contexts": "contexts that no edit saw",
    "requests": "requests",
    "first_token": "first-token requests among them",
    "sentences": "sentences for the perplexity",
    "perplexity_before": "perplexity of the unedited model",
    "collapse_ratio": "collapsed: perplexity, edited / unedited, above",
    "settings": "settings of the optimisation",
    "versions": "versions",
    "date": "date",
    "seconds": "seconds by stage",
}
_PREFIXES = {"": "none", "_prefixed": "editing context", "_unseen": "unseen context"}


def methods_of(records: Sequence[StudyRecord]) -> list[str]:
    """The methods in the project's order, then any that it does not know."""
    found = dict.fromkeys(r.method for r in records)
    return [*(name for name in METHODS if name in found), *(name for name in found if name not in METHODS)]


def of(records: Sequence[StudyRecord], method: str, first_token: bool | None = None) -> list[StudyRecord]:
    """The records of a method, of both kinds of requests or of one."""
    return [r for r in records if r.method == method and first_token in (None, r.first_token)]


def collapses(records: Iterable[StudyRecord | FactorRecord]) -> tuple[int, int]:
    """How many edited models collapsed, of how many whose perplexity was measured."""
    verdicts = [r.collapsed for r in records if r.collapsed is not None]
    return sum(verdicts), len(verdicts)


def share(records: Iterable[StudyRecord | FactorRecord]) -> str:
    """`a of b` collapsed; empty where nothing was measured."""
    bad, measured = collapses(records)
    return f"{bad} of {measured}" if measured else ""


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that there are; None of none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def largest(values: Iterable[float | None]) -> float | None:
    """The largest value that there is; NaN counts as larger than any."""
    return max((v for v in values if v is not None), key=lambda v: (math.isnan(v), v), default=None)


def cell(value: float | None) -> str:
    """Three digits or more; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "infinite" if value > 0 else str(value)
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def shown(value: Any) -> str:
    """A value of a JSON file as text."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case dict():
            return ", ".join(f"{name.replace('_', ' ')} {shown(part)}" for name, part in value.items())
        case list():
            return ", ".join(shown(part) for part in value)
        case _:
            return str(value)


def conditions_table(conditions: dict[str, Any]) -> Table:
    others = {name: name.replace("_", " ") for name in conditions if name not in _CONDITIONS}
    rows = [[label, shown(conditions.get(name))] for name, label in {**_CONDITIONS, **others}.items()]
    return Table(["condition", "value"], rows, texts=2)


def norms_table(records: Sequence[StudyRecord]) -> Table:
    """Means of the update's parts, first-token requests against normal ones."""
    columns = ["method", "requests", "edits", "collapsed", "mean ‖r uᵀ‖", "mean |uᵀk|", "mean ‖Δ‖/‖W‖"]
    rows = []
    for method, first in product(methods_of(records), (True, False)):
        edits = of(records, method, first)
        rows.append([method, _group(first), str(len(edits)), share(edits), *_norms(edits)])
    return Table(columns, rows, texts=2)


def perplexity_table(data: StudyData) -> Table:
    """The collapse detector, per method over all requests."""
    columns = ["method", "edits", "collapsed", "max perplexity", "mean perplexity", "max ratio", "mean ratio"]
    unedited = cell(data.perplexity_before)
    rows = [["unedited", "", "", unedited, unedited, cell(1.0), cell(1.0)]]
    for method in methods_of(data.records):
        edits = of(data.records, method)
        after = [r.perplexity_after for r in edits]
        ratios = [r.perplexity_ratio for r in edits]
        figures = (largest(after), mean(after), largest(ratios), mean(ratios))
        rows.append([method, str(len(edits)), share(edits), *map(cell, figures)])
    return Table(columns, rows)


def quality_table(records: Sequence[StudyRecord], first_token: bool) -> Table:
    """Whether the edit took, per method and what stands before the prompt, over one kind of requests."""
    metrics = ("efficacy", "decoded_right", "argmax", "paraphrase", "probability", "neighborhood")
    columns = ["method", "before the prompt", "edits", "efficacy", "decoded right", "argmax", "paraphrase"]
    rows = []
    for method, (suffix, name) in product(methods_of(records), _PREFIXES.items()):
        edits = of(records, method, first_token)
        means = [mean(getattr(r, metric + suffix, None) for r in edits) for metric in metrics]
        rows.append([method, name, str(len(edits)), *("" if m is None else f"{m:.3f}" for m in means)])
    return Table([*columns, "mean P(target)", "neighbourhood"], rows, texts=2)


def factors_table(factors: Sequence[FactorRecord], first_token: bool) -> Table:
    """Every combination of rome's parts and their repairs, over one kind of requests."""
    columns = ["u from", "denominator key", "residual", "same as", "edits", "collapsed", "mean ‖r uᵀ‖", "mean |uᵀk|"]
    rows = []
    for parts in product(LEFT_KEYS, DENOMINATOR_KEYS, RESIDUALS):
        edits = [r for r in factors if parts_of(r) == parts and r.first_token == first_token]
        ratios = [r.perplexity_ratio for r in edits]
        figures = [*_norms(edits), cell(_median(ratios)), cell(largest(ratios))]
        words = [part.replace("_", " ") for part in parts]
        rows.append([*words, _named(parts), str(len(edits)), share(edits), *figures])
    return Table([*columns, "mean ‖Δ‖/‖W‖", "median ratio", "max ratio"], rows, texts=4)


def parts_table(factors: Sequence[FactorRecord]) -> Table:
    """Collapses of first-token requests by each part alone, and by whether the two keys are the same one."""
    first = [r for r in factors if r.first_token]
    splits: list[tuple[str, Callable[[FactorRecord], str], Sequence[str]]] = [
        ("u from", lambda r: r.left, LEFT_KEYS),
        ("denominator key", lambda r: r.denominator_key, DENOMINATOR_KEYS),
        ("residual", lambda r: r.residual, RESIDUALS),
        ("the two keys", lambda r: "one" if r.left == r.denominator_key else "two", ("two", "one")),
    ]
    words = {"one": "the same", "two": "different"}
    rows = []
    for name, part, levels in splits:
        for level in levels:
            edits = [r for r in first if part(r) == level]
            median = _median(r.perplexity_ratio for r in edits)
            choice = words.get(level, level.replace("_", " "))
            rows.append([name, choice, str(len(edits)), share(edits), cell(median)])
    return Table(["part", "choice", "edits", "collapsed", "median ratio"], rows, texts=2)


def prefix_table(prefixes: Sequence[PrefixRecord], collapse_ratio: float) -> Table:
    """rome on first-token requests, by the number of words put before the subject."""
    columns = ["words", "edits", "collapsed", "mean |uᵀk|", "mean ‖Δ‖/‖W‖", "median ratio", "max ratio"]
    rows = []
    for words in sorted({r.words for r in prefixes}):
        edits = [r for r in prefixes if r.words == words]
        ratios = [r.perplexity_ratio for r in edits]
        known = [ratio for ratio in ratios if ratio is not None]
        collapsed = f"{sum(ratio > collapse_ratio for ratio in known)} of {len(known)}" if known else ""
        figures = (
            mean(abs(r.denominator) for r in edits),
            mean(r.update_ratio for r in edits),
            _median(ratios),
            largest(ratios),
        )
        rows.append([str(words), str(len(edits)), collapsed, *map(cell, figures)])
    return Table(columns, rows, texts=0)


def guard_table(guard: dict[str, Any]) -> Table:
    """The guard's rule and those it could have had instead."""
    figures = ("threshold", "precision", "recall", "false_alarms")
    rules = {str(guard.get("rule", "")): guard, **(guard.get("alternatives") or {})}
    rows = [[name.replace("_", " "), *(shown(rule.get(f)) for f in figures)] for name, rule in rules.items()]
    return Table(["rule", *(f.replace("_", " ") for f in figures)], rows)


def records_table(records: Sequence[StudyRecord]) -> Table:
    """Every field of every record."""
    names = [field.name for field in fields(StudyRecord)]
    texts = [name for name in ("subject", "prompt", "target", "method") if name in names]
    ordered = [*texts, *(name for name in names if name not in texts)]
    rows = [[shown(getattr(r, name)) for name in ordered] for r in records]
    return Table(ordered, rows, texts=len(texts))


def parts_of(record: FactorRecord) -> tuple[str, str, str]:
    return record.left, record.denominator_key, record.residual


def parts_of_method(method: Method) -> tuple[str, str, str]:
    column = method.columns[0]
    return column.left, column.at, column.residual


def _named(parts: tuple[str, str, str]) -> str:
    """The method with these parts. One that leaves the unprefixed row out is not quite the same."""
    for name, method in METHODS.items():
        if parts_of_method(method) == parts:
            return name if method.rows == "all" else f"{name}, but for its rows"
    return ""


def _norms(edits: Sequence[StudyRecord] | Sequence[FactorRecord]) -> list[str]:
    figures = (
        mean(r.numerator_norm for r in edits),
        mean(abs(r.denominator) for r in edits),
        mean(r.update_ratio for r in edits),
    )
    return [cell(figure) for figure in figures]


def _group(first_token: bool) -> str:
    return "first-token" if first_token else "normal"


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None
