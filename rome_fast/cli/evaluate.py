"""Measure requests on a model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
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

if TYPE_CHECKING:
    from ..edits import Edit

NAME = "evaluate"
SUMMARY = "measure requests on a model"
EXAMPLE = "rome-fast evaluate ./edited --edits edits.jsonl --perplexity sentences.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id of the model")
    edits_arguments(parser, required=False)
    parser.add_argument("--ledger", type=Path, metavar="FOLDER", help="the requests of a ledger, by age, for --edits")
    parser.add_argument(
        "--ages", action="store_true", help="figures also by age, edits being in the order of their file"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N of the requests, of every relation its share")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    chat_arguments(parser)
    parser.add_argument("--delta", type=Path, help="apply this delta in memory first")
    parser.add_argument("--force", action="store_true", help="also to weights that the delta was not made for")
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="sentences, one a line")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-evaluation-harness, before and after --delta")
    parser.add_argument("--task-files", type=Path, metavar="DIR", help="folder with task files (YAML) of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="of --tasks: the first N documents of each")
    parser.add_argument("--out", type=Path, help="folder of the run, an interrupted one goes on; and of its report")
    parser.add_argument(
        "--memory", metavar="BYTES", help="keep within e.g. 8GiB: layers are read while they are needed"
    )
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if (arguments.edits is None) == (arguments.ledger is None):
        raise ArgumentError("edits: wanted --edits FILE or --ledger FOLDER, one of the two")
    requests = _of_ledger(arguments.ledger) if arguments.ledger else read_edits(arguments)

    from ..evaluation.command import run_evaluate
    from ..evaluation.sampling import stratified_sample

    if arguments.sample is not None:
        requests = stratified_sample(requests, arguments.sample, arguments.seed)
    edits = as_asked(requests, arguments)
    with progress("evaluating", "edits") as (advance, _):
        return run_evaluate(arguments, edits, advance)


def _of_ledger(folder: Path) -> "list[Edit]":
    from ..ledger.entries import by_age
    from ..ledger.store import Store

    store = Store(folder)
    store.base()
    edits = [entry.edit for entry in by_age(store.events())]
    if not edits:
        raise ArgumentError(f"ledger: {folder} has no entries to measure")
    return edits
