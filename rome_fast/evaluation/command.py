"""What the arguments of `rome-fast evaluate` mean, and the run itself."""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..edits import Edit
from ..models.runner import Runner
from ..opening import checkpoints
from ..report import metrics_table, summary_table, tasks_table
from ..runs.parts import Parts
from ..runs.processes import own_device
from ..runs.terminal import say, show
from ..runs.texts import read_sentences
from ..updates import chains
from ..updates.chains import tensor_sha256
from ..updates.delta import Delta
from .harness import Scores, known_tasks, task_changes, task_scores
from .metrics import UNSEEN, EditMetrics, distractors, evaluate, intervals, summarise
from .perplexity import sentence_perplexity

_TOGETHER = 8

Advance = Callable[[int, int], None]


def run_evaluate(arguments: argparse.Namespace, edits: Sequence[Edit], advance: Advance) -> dict[str, Any]:
    """Measure requests, in parts where there is an --out to go on from; returns the report."""
    sentences = read_sentences(arguments.perplexity) if arguments.perplexity else []
    if arguments.tasks:
        known_tasks(arguments.tasks, arguments.task_files)
    model, tokenizer, directory = checkpoints.load(
        arguments.model,
        device=own_device(arguments.device),
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    # Those of the last edit.
    contexts: list[str] = next((r.get("contexts", []) for r in reversed(chains.records(directory))), [])

    def scores_of_tasks() -> Scores:
        return task_scores(model, tokenizer, arguments.tasks, task_files=arguments.task_files, limit=arguments.limit)

    before: Scores | None = None
    if arguments.delta:
        delta = Delta.load(arguments.delta)
        before = scores_of_tasks() if arguments.tasks else None
        delta.apply(model, force=arguments.force)
        contexts = json.loads(delta.metadata.get("contexts", "[]"))
    runner = Runner(model)
    place = _place(arguments.out, runner, edits, contexts, sentences) if arguments.out else None
    leading_away = distractors(edits)
    metrics: list[EditMetrics] = []
    for start in range(0, len(edits), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        found = None if place is None else place.get(f"{start:06d}")
        if found is None:
            own = evaluate(
                model,
                tokenizer,
                edits[some],
                contexts,
                unseen_contexts=UNSEEN,
                distracting=leading_away[some],
            )
            found = [m.to_json() for m in own]
            if place is not None:
                place.keep(f"{start:06d}", found)
        metrics += [EditMetrics(**each) for each in found]
        advance(len(metrics), len(edits))
    of_all = intervals(metrics)
    report: dict[str, Any] = {
        "model": arguments.model,
        "edits": [m.to_json() for m in metrics],
        "summary": summarise(metrics),
        "intervals": {name: [interval.low, interval.high] for name, interval in of_all.items()},
    }
    if arguments.perplexity:
        report["perplexity"] = sentence_perplexity(runner, tokenizer, sentences)
    if arguments.tasks:
        changes = task_changes(scores_of_tasks(), before)
        report["tasks"] = [change.to_json() for change in changes]
    show(metrics_table(metrics))
    show(summary_table(of_all, len(metrics)))
    if "perplexity" in report:
        say(f"perplexity {report['perplexity']:.2f}")
    if arguments.tasks:
        show(tasks_table(changes))
    if place is not None:
        say(f"wrote {place.write('evaluate.json', report)}")
    return report


def _place(
    folder: Path, runner: Runner, edits: Sequence[Edit], contexts: Sequence[str], sentences: Sequence[str]
) -> Parts:
    """The folder of this very run. Figures do not say which weights they are of, so that the conditions have to."""
    digests = [name + tensor_sha256(p.detach().cpu()) for name, p in runner.model.named_parameters()]
    conditions = {
        "weights_sha256": _hash(digests),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": runner.device.type,
        "requests": len(edits),
        "edits_sha256": _hash([json.dumps(asdict(edit)) for edit in edits]),
        "contexts_sha256": _hash([*contexts, *UNSEEN]),
        "sentences_sha256": _hash(sentences),
    }
    return Parts(folder, "evaluate", conditions)


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
