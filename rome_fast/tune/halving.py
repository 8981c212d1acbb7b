"""Successive halving (Jamieson & Talwalkar 2016): all candidates on few requests, the better half on twice as many."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .measure import Candidate
from .objective import PERPLEXITY_LIMIT, Figures, rank

_FINALISTS = 3  # at least, on all requests: a choice of one would not say how sure it is

Measure = Callable[[Candidate, int, int], Sequence[Figures]]
"""Figures of a candidate on requests start .. stop - 1."""


@dataclass(frozen=True)
class Ranking:
    """Figures of every candidate on the requests it was measured on, the best first."""

    candidates: list[Candidate]
    figures: dict[Candidate, list[Figures]]
    requests: int

    @property
    def finalists(self) -> list[Candidate]:
        """Those that were measured on all requests."""
        return [c for c in self.candidates if len(self.figures[c]) == self.requests]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def rounds(candidates: int, requests: int) -> list[tuple[int, int]]:
    """(candidates, requests) of each round: a quarter of the requests, a half, all of them."""
    sizes = sorted({max(1, math.ceil(requests / 4)), max(1, math.ceil(requests / 2)), requests})
    plan = []
    for size in sizes:
        plan.append((candidates, size))
        candidates = min(candidates, max(_FINALISTS, math.ceil(candidates / 2)))
    return plan


def edits_in(candidates: int, requests: int) -> int:
    """How many edits the rounds make at most, with one candidate that always goes on."""
    done, total = 0, 0
    for count, size in rounds(candidates, requests):
        total += min(candidates, count + (count < candidates)) * (size - done)
        done = size
    return total


def halve(
    candidates: Sequence[Candidate],
    requests: int,
    measure: Measure,
    keep: Candidate,
    limit: float = PERPLEXITY_LIMIT,
) -> Ranking:
    """Rank candidates, all on the same requests in each round; `keep` goes on to the end whatever it does."""
    figures: dict[Candidate, list[Figures]] = {candidate: [] for candidate in candidates}
    order = list(candidates)
    for count, size in rounds(len(order), requests):
        going_on = order[:count] if keep in order[:count] else [*order[:count], keep]
        rest = [candidate for candidate in order if candidate not in going_on]
        # By layer, so that what is loaded for one of them is loaded once.
        for candidate in sorted(going_on):
            figures[candidate] += measure(candidate, len(figures[candidate]), size)
        order = sorted(going_on, key=lambda candidate: rank(figures[candidate], limit), reverse=True) + rest
    return Ranking(order, figures, requests)
