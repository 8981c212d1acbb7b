"""Tasks of lm-evaluation-harness on a model before and after an edit: what else the edit changed.

Needs the optional extra `harness`. Scores are the harness's own, of its own model class around the model in memory.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError

_NAMES = ("lm_eval", "datasets")  # what the extra brings


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task."""

    value: float
    error: float | None  # its standard error, as the harness has it; None where it has none
    of_documents: dict[int, float]  # by number of the document; empty for metrics that are not a mean over documents


Scores = dict[tuple[str, str], TaskScore]
"""By task and metric, the latter with the harness's filter, as "acc,none"."""


@dataclass(frozen=True)
class TaskChange:
    """A metric of a task on a model, and what it was before an edit, if that was measured."""

    task: str
    metric: str
    after: TaskScore
    before: TaskScore | None = None

    @property
    def difference(self) -> float | None:
        return None if self.before is None else self.after.value - self.before.value

    @property
    def error(self) -> float | None:
        """Standard error of the difference, document by document: most of both scores' own errors is shared."""
        if self.before is None or len(self.before.of_documents) < 2:
            return None
        before, after = self.before.of_documents, self.after.of_documents
        if before.keys() != after.keys():
            return None
        differences = [after[i] - before[i] for i in before]
        return statistics.stdev(differences) / math.sqrt(len(differences))

    def to_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {"task": self.task, "metric": self.metric}
        own |= {"value": self.after.value, "error": self.after.error}
        if self.before is not None:
            own |= {"value_before": self.before.value, "error_before": self.before.error}
            own |= {"difference": self.difference, "error_of_difference": self.error}
        return own


def known_tasks(tasks: Sequence[str], task_files: Path | None = None) -> Any:
    """The harness's TaskManager; raises what `task_scores` does, in a moment."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] not in _NAMES:
            raise
        raise ArgumentError(
            "tasks: lm-evaluation-harness is not installed; install it with: pip install 'rome_fast[harness]'"
        ) from missing
    if task_files is not None and not task_files.is_dir():
        raise ArgumentError(f"task_files: {task_files} is no folder, wanted one with task files (YAML)")
    known = TaskManager(include_path=None if task_files is None else str(task_files))
    if unknown := [task for task in tasks if not known.match_tasks([task])]:
        where = "the harness" if task_files is None else f"the harness or {task_files}"
        raise ArgumentError(f"tasks: got {', '.join(map(repr, unknown))}, wanted tasks that {where} has")
    return known


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    task_files: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Scores:
    """Scores by task and metric, each as the harness's own command gives it for this model.

    `task_files` is a folder with task files (YAML) of your own; `limit` takes the first so many documents of each task.
    Raises ArgumentError where the harness is not installed and for a task that it does not know.
    """
    known = known_tasks(tasks, task_files)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=known, limit=limit, log_samples=True)
    scores: Scores = {}
    for task, figures in found["results"].items():
        documents = found["samples"].get(task, [])
        for name, value in figures.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            own = {d["doc_id"]: float(d[metric]) for d in documents if isinstance(d.get(metric), int | float)}
            # A metric that is no mean over documents has another form in each of them, or another value over all.
            mean = sum(own.values()) / len(own) if own else math.nan
            of_documents = own if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else {}
            scores[task, name] = TaskScore(float(value), error if isinstance(error, float) else None, of_documents)
    return scores


def task_changes(after: Scores, before: Scores | None = None) -> list[TaskChange]:
    """Every score, beside what it was before, if that is given."""
    return [TaskChange(*name, score, None if before is None else before.get(name)) for name, score in after.items()]
