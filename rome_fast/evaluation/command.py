"""What the arguments of `rome-fast evaluate` mean, and the run itself."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..edits import Edit
from ..errors import ArgumentError, CheckpointError
from ..models.runner import Runner
from ..opening import checkpoints
from ..opening.opening import Opened, open_to_read
from ..report import ages_table, metrics_table, summary_table, tasks_table
from ..runs.parts import Parts
from ..runs.terminal import say, show
from ..runs.texts import read_sentences
from ..updates import chains
from ..updates.chains import tensor_sha256
from ..updates.delta import Delta
from ..weights import explain_rates
from .ages import by_age
from .harness import Scores, known_tasks, task_changes, task_scores
from .metrics import UNSEEN, EditMetrics, distractors, intervals, measure, summarise
from .perplexity import sentence_perplexity

_TOGETHER = 32  # requests that are measured at a time, and kept together with --out

Advance = Callable[[int, int], None]


def run_evaluate(arguments: argparse.Namespace, edits: Sequence[Edit], advance: Advance) -> dict[str, Any]:
    """Measure requests, in parts where there is an --out to go on from; returns the report."""
    sentences = read_sentences(arguments.perplexity) if arguments.perplexity else []
    if arguments.tasks and arguments.memory is not None:
        raise ArgumentError("tasks: got them with --memory, wanted a model in memory, which the harness runs itself")
    if arguments.tasks:
        known_tasks(arguments.tasks, arguments.task_files)
    delta = Delta.load(arguments.delta) if arguments.delta else None
    with ExitStack() as stack:
        resolved = checkpoints.resolve(arguments.model, code=arguments.trust_remote_code)
        originals = _overwritten(resolved) if delta is None else {}
        opened = open_to_read(
            stack,
            resolved,
            changed=originals if delta is None else delta.updates,
            memory=arguments.memory,
            device=arguments.device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
        return _measured(arguments, edits, sentences, opened, delta, originals, advance)


def _measured(
    arguments: argparse.Namespace,
    edits: Sequence[Edit],
    sentences: Sequence[str],
    opened: Opened,
    delta: Delta | None,
    originals: Mapping[str, Tensor],
    advance: Advance,
) -> dict[str, Any]:
    runner, tokenizer = opened.runner, opened.tokenizer

    def scores_of_tasks() -> Scores:
        return task_scores(
            runner.model, tokenizer, arguments.tasks, task_files=arguments.task_files, limit=arguments.limit
        )

    before: Scores | None = None
    if delta is not None:
        before = scores_of_tasks() if arguments.tasks else None
        delta.apply(runner.model, force=arguments.force)
        contexts = json.loads(delta.metadata.get("contexts", "[]"))
        originals = delta.originals
    else:
        records = chains.records(opened.source or arguments.model)
        # Those of the last edit.
        contexts = next((r.get("contexts", []) for r in reversed(records)), [])
    unedited = _before(runner, originals)
    place = None
    if arguments.out:
        place = _place(arguments.out, runner, edits, contexts, sentences, unedited or {})
    leading_away = distractors(edits)
    metrics: list[EditMetrics] = []
    for start in range(0, len(edits), _TOGETHER):
        some = slice(start, start + _TOGETHER)
        found = None if place is None else place.get(f"{start:06d}")
        if found is None:
            own = measure(
                runner,
                tokenizer,
                edits[some],
                contexts,
                unseen_contexts=UNSEEN,
                distracting=leading_away[some],
                unedited=unedited,
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
    groups = by_age(metrics) if arguments.ages or arguments.ledger else []
    if groups:
        report["ages"] = [group.to_json() for group in groups]
    if arguments.perplexity:
        report["perplexity"] = sentence_perplexity(runner, tokenizer, sentences)
    if arguments.tasks:
        changes = task_changes(scores_of_tasks(), before)
        report["tasks"] = [change.to_json() for change in changes]
    if runner.stream is not None:
        report["streaming"] = runner.stream.rates
    show(metrics_table(metrics))
    show(summary_table(of_all, len(metrics)))
    if groups:
        show(ages_table(groups))
    if "perplexity" in report:
        say(f"perplexity {report['perplexity']:.2f}")
    if arguments.tasks:
        show(tasks_table(changes))
    if runner.stream is not None:
        say(explain_rates(report["streaming"]))
    if place is not None:
        # The same after a kill, which rates are not.
        figures = {name: value for name, value in report.items() if name != "streaming"}
        say(f"wrote {place.write('evaluate.json', figures)}")
    return report


def _overwritten(directory: Path) -> dict[str, Tensor]:
    """What the edits of a checkpoint overwrote; nothing where that is not what was before the weights that it has."""
    try:
        return chains.originals_of(directory)
    except CheckpointError as error:
        say(f"essence is left out, as the weights before the edits are not known: {error}")
        return {}


def _before(runner: Runner, originals: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """The weights before the edit, by parameter; None where there was no edit, or they are stored otherwise."""
    own = dict(runner.model.named_parameters())
    fit = all(name in own and own[name].shape == weight.shape for name, weight in originals.items())
    if originals and not fit:
        say("essence is left out: the checkpoint stores the weights before its edits otherwise than the model has them")
    return originals if originals and fit else None


def _place(
    folder: Path,
    runner: Runner,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    sentences: Sequence[str],
    unedited: Mapping[str, Tensor],
) -> Parts:
    """The folder of this very run. Figures do not say which weights they are of, so that the conditions have to."""
    conditions = {
        "weights_sha256": _hash([name + tensor_sha256(p.detach().cpu()) for name, p in runner.parameters()]),
        "unedited_sha256": _hash([name + tensor_sha256(unedited[name].detach().cpu()) for name in sorted(unedited)]),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": runner.device.type,
        "requests": len(edits),
        "at_a_time": _TOGETHER,
        "streamed": runner.stream is not None,
        "edits_sha256": _hash([json.dumps(asdict(edit)) for edit in edits]),
        "contexts_sha256": _hash([*contexts, *UNSEEN]),
        "sentences_sha256": _hash(sentences),
    }
    return Parts(folder, "evaluate", conditions)


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
