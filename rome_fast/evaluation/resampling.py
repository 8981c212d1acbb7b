"""How far a mean may be off because other requests could have been asked."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

_RESAMPLES = 4000
_LEVEL = 0.95
_ELEMENTS = 1 << 24  # of resampled values at a time


class Interval(NamedTuple):
    """A mean, and where those of 95 % of as many requests drawn from the same lie."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float]) -> Interval:
    """The percentile bootstrap (Efron & Tibshirani 1993, chapter 13) of a mean, with a seed of its own.

    Values that are all the same have no width, however few they are. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("values: got none, wanted at least one")
    given = torch.tensor(values, dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    count = len(given)
    means = []
    at_once = max(1, _ELEMENTS // count)
    for start in range(0, _RESAMPLES, at_once):
        size = (min(at_once, _RESAMPLES - start), count)
        means.append(given[torch.randint(count, size, generator=generator, device="cpu")].mean(1))
    tail = (1 - _LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")
    low, high = torch.quantile(torch.cat(means), ends).tolist()
    return Interval(float(given.mean()), low, high)
