"""What makes one layer better than another.

Of each request, edited alone, four figures from 0 to 1 are asked for: P(target) behind the bare prompt, P(target)
behind texts that the edit was not made with, the share of paraphrases in which the target beats the true answer, and
the share of neighbouring prompts, about other subjects, in which it does not. A request's score is their mean (of those
that it has), a candidate's score the mean over requests. Among candidates whose edits raise perplexity to at most
`limit` times the unedited model's, in the mean over requests, the highest score is best; any of them is better than one
that does not keep to the limit, of which the one that comes nearest to it is best.

P(target) stands for efficacy because P(target) > P(true answer) holds for nearly every edit at nearly every layer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..evaluation.resampling import bootstrap

PERPLEXITY_LIMIT = 1.01
"""Mean ratio of perplexity, with one edit over without, up to which a layer is eligible."""

SCORED = ("probability", "probability_behind", "paraphrase", "neighborhood")


@dataclass(frozen=True)
class Figures:
    """What one edit did. None where the request has nothing to measure it with."""

    probability: float  # of the target behind the bare prompt
    probability_behind: float  # mean behind contexts that the edit was not made with
    argmax: float  # 1 where the target leads behind the bare prompt
    efficacy: float | None  # P(target) > P(true answer)
    efficacy_behind: float | None
    paraphrase: float | None
    neighborhood: float | None
    perplexity_ratio: float  # with the edit over without
    update_ratio: float  # ‖Δ‖ / ‖W‖

    @property
    def score(self) -> float:
        found = [getattr(self, name) for name in SCORED]
        known = [value for value in found if value is not None]
        return sum(known) / len(known)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score(figures: Sequence[Figures]) -> float:
    return sum(each.score for each in figures) / len(figures)


def perplexity_ratio(figures: Sequence[Figures]) -> float:
    return sum(each.perplexity_ratio for each in figures) / len(figures)


def rank(figures: Sequence[Figures], limit: float = PERPLEXITY_LIMIT) -> tuple[bool, float]:
    """Of two candidates on the same requests, the one with the larger rank is better."""
    ratio = perplexity_ratio(figures)
    # Also false for NaN, as a model that is ruined may give.
    return (True, score(figures)) if ratio <= limit else (False, -ratio)


@dataclass(frozen=True)
class Difference:
    """How much better one candidate scored than another on the same requests."""

    mean: float
    low: float  # 95 % interval of the mean, by resampling requests
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether other requests of the same kind would hardly reverse it."""
        return self.low > 0 or self.high < 0


def compare(better: Sequence[Figures], other: Sequence[Figures]) -> Difference:
    """Score of `better` less that of `other`, request by request, with a bootstrap interval (seeded)."""
    return Difference(*bootstrap([a.score - b.score for a, b in zip(better, other, strict=True)]))
