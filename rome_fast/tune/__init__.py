"""Which layer and settings to edit a model with, found by editing it.

`objective` says what is better, `halving` spends the edits where they count, `measure` makes and measures them,
`command` is the verb, which keeps the choice with the statistics.
"""

from .halving import Ranking, halve, rounds
from .measure import Candidate, Sweep
from .objective import Difference, Figures, compare, rank, score

__all__ = [
    "Candidate",
    "Difference",
    "Figures",
    "Ranking",
    "Sweep",
    "compare",
    "halve",
    "rank",
    "rounds",
    "score",
]
