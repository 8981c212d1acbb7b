"""The guard's limit, found in measured edits: which ‖Δ‖ / ‖W‖, or which denominator, tells those that collapse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Judged:
    """How a limit does on some edits."""

    edits: int
    collapsed: int
    precision: float | None  # share of the alarms that were right; None without an alarm
    recall: float | None  # share of the collapses that were found; None without a collapse
    false_alarms: float | None  # share of the healthy edits with an alarm; None without a healthy edit


def fit_limit(figures: Sequence[float], collapsed: Sequence[bool]) -> float | None:
    """The limit with the fewest errors when larger figures (all > 0) mean a collapse; None unless there are both kinds.

    Of several with as few, the one in the middle of the widest gap, on a logarithmic scale.
    """
    if len(set(collapsed)) < 2:
        return None
    pairs = sorted(zip(figures, collapsed, strict=True))
    # An edit whose update is not finite needs no limit to be found.
    logs = [math.log(figure) if math.isfinite(figure) else math.inf for figure, _ in pairs]
    errors = sum(not c for _, c in pairs)  # with every edit above the limit
    best: tuple[int, float, float] | None = None
    for i in range(len(pairs) - 1):
        errors += 1 if pairs[i][1] else -1
        gap = logs[i + 1] - logs[i]
        if gap > 0 and math.isfinite(logs[i]) and (best is None or (errors, -gap) < best[:2]):
            middle = (logs[i] + logs[i + 1]) / 2 if math.isfinite(gap) else logs[i] + 1
            best = (errors, -gap, math.exp(middle))
    return None if best is None else best[2]


def judge_limit(limit: float, figures: Sequence[float], collapsed: Sequence[bool]) -> Judged:
    """An alarm is a figure above the limit, or none at all (NaN)."""
    alarms = [not figure <= limit for figure in figures]
    found = sum(a and c for a, c in zip(alarms, collapsed, strict=True))
    bad = sum(collapsed)
    healthy = len(figures) - bad
    return Judged(
        edits=len(figures),
        collapsed=bad,
        precision=found / sum(alarms) if any(alarms) else None,
        recall=found / bad if bad else None,
        false_alarms=(sum(alarms) - found) / healthy if healthy else None,
    )
