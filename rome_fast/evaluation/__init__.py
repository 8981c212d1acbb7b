"""Measure what an edit did: target probabilities, edit metrics, perplexity."""

from .ages import AgeGroup, by_age
from .isolated import RowUpdates
from .metrics import UNSEEN, EditMetrics, distractors, evaluate, intervals, summarise
from .perplexity import edited_perplexities, sentence_perplexity
from .resampling import Interval, bootstrap
from .sampling import stratified_sample
from .scoring import Completion, Score, complete, greedy_completion, score

__all__ = [
    "UNSEEN",
    "AgeGroup",
    "Completion",
    "EditMetrics",
    "Interval",
    "RowUpdates",
    "Score",
    "bootstrap",
    "by_age",
    "complete",
    "distractors",
    "edited_perplexities",
    "evaluate",
    "greedy_completion",
    "intervals",
    "score",
    "sentence_perplexity",
    "stratified_sample",
    "summarise",
]
