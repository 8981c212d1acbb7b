"""Measure what an edit did: target probabilities, edit metrics, perplexity."""

from .metrics import EditMetrics, evaluate, summarise
from .perplexity import sentence_perplexity
from .scoring import Score, greedy_completion, score

__all__ = [
    "EditMetrics",
    "Score",
    "evaluate",
    "greedy_completion",
    "score",
    "sentence_perplexity",
    "summarise",
]
