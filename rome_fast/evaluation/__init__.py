"""Measure what an edit did: target probabilities, edit metrics, perplexity."""

from .isolated import RowUpdates
from .metrics import EditMetrics, evaluate, summarise
from .perplexity import edited_perplexities, sentence_perplexity
from .scoring import Completion, Score, complete, greedy_completion, score

__all__ = [
    "Completion",
    "EditMetrics",
    "RowUpdates",
    "Score",
    "complete",
    "edited_perplexities",
    "evaluate",
    "greedy_completion",
    "score",
    "sentence_perplexity",
    "summarise",
]
