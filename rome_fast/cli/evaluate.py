"""Measure requests on a model."""

import argparse
import json
from pathlib import Path
from typing import Any

from .shared import (
    as_asked,
    chat_arguments,
    device_argument,
    dtype_argument,
    edits_arguments,
    progress,
    read_edits,
    trust_argument,
)

NAME = "evaluate"
SUMMARY = "measure requests on a model"
EXAMPLE = "rome-fast evaluate ./edited --edits edits.jsonl --perplexity sentences.txt"

_EVALUATED_TOGETHER = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id of the model")
    edits_arguments(parser)
    chat_arguments(parser)
    parser.add_argument("--delta", type=Path, help="apply this delta in memory first")
    parser.add_argument("--force", action="store_true", help="also to weights that the delta was not made for")
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="sentences, one a line")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation import evaluate, sentence_perplexity, summarise
    from ..models.runner import Runner
    from ..opening import checkpoints
    from ..report import metrics_table
    from ..runs.processes import own_device
    from ..runs.terminal import say, show
    from ..runs.texts import read_sentences
    from ..updates import chains
    from ..updates.delta import Delta

    edits = read_edits(arguments)
    sentences = read_sentences(arguments.perplexity) if arguments.perplexity else []
    model, tokenizer, directory = checkpoints.load(
        arguments.model,
        device=own_device(arguments.device),
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    edits = as_asked(edits, arguments)
    # Those of the last edit.
    contexts: list[str] = next((r.get("contexts", []) for r in reversed(chains.records(directory))), [])
    if arguments.delta:
        delta = Delta.load(arguments.delta)
        delta.apply(model, force=arguments.force)
        contexts = json.loads(delta.metadata.get("contexts", "[]"))
    metrics = []
    with progress("evaluating", "edits") as (advance, _):
        for start in range(0, len(edits), _EVALUATED_TOGETHER):
            metrics += evaluate(model, tokenizer, edits[start : start + _EVALUATED_TOGETHER], contexts)
            advance(len(metrics), len(edits))
    report: dict[str, Any] = {
        "model": arguments.model,
        "edits": [m.to_json() for m in metrics],
        "summary": summarise(metrics),
    }
    if arguments.perplexity:
        report["perplexity"] = sentence_perplexity(Runner(model), tokenizer, sentences)
    show(metrics_table(metrics))
    say("  ".join(f"{name} {value:.3f}" for name, value in report["summary"].items()))
    if "perplexity" in report:
        say(f"perplexity {report['perplexity']:.2f}")
    return report
