"""Retention: the figures of edits by their age, the first of them to the last."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import ArgumentError
from .metrics import EditMetrics, intervals
from .resampling import Interval

_GROUPS = 5


@dataclass(frozen=True)
class AgeGroup:
    """Edits that were made one after another, and the means of their figures."""

    first: int  # number of the first of them, from 1 on
    last: int
    figures: dict[str, Interval]

    def to_json(self) -> dict[str, Any]:
        figures = {name: interval._asdict() for name, interval in self.figures.items()}
        return {"first": self.first, "last": self.last, "figures": figures}


def by_age(metrics: Sequence[EditMetrics], groups: int = _GROUPS) -> list[AgeGroup]:
    """The edits, in the order in which they were made, in as many groups of like size, the oldest first.

    With fewer edits than groups, each is a group. Raises ArgumentError for no group.
    """
    if groups < 1:
        raise ArgumentError(f"groups: got {groups}, wanted at least 1")
    groups = min(groups, len(metrics))
    ends = [len(metrics) * i // max(groups, 1) for i in range(groups + 1)]
    return [AgeGroup(a + 1, b, intervals(metrics[a:b])) for a, b in pairwise(ends)]
