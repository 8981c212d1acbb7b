"""Which hidden states carry what a model says of a subject.

`causal` traces one prompt, `average` sums up over prompts, `command` is the verb.
"""

from .average import ROLES, Average, average, roles_of
from .causal import KINDS, Kind, Traced, causal_trace, draw_noise, embedding_deviation

__all__ = [
    "KINDS",
    "ROLES",
    "Average",
    "Kind",
    "Traced",
    "average",
    "causal_trace",
    "draw_noise",
    "embedding_deviation",
    "roles_of",
]
