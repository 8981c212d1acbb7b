"""Measure what an edit did: target probabilities, edit metrics, perplexity."""

from .isolated import RowUpdates
from .metrics import UNSEEN, EditMetrics, distractors, evaluate, intervals, summarise
from .perplexity import edited_perplexities, sentence_perplexity
from .resampling import Interval, bootstrap
from .scoring import Completion, Score, complete, greedy_completion, score

__all__ = [
    "UNSEEN",
    "Completion",
    "EditMetrics",
    "Interval",
    "RowUpdates",
    "Score",
    "bootstrap",
    "complete",
    "distractors",
    "edited_perplexities",
    "evaluate",
    "greedy_completion",
    "intervals",
    "score",
    "sentence_perplexity",
    "summarise",
]
