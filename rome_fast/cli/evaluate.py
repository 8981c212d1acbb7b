"""Measure requests on a model."""

import argparse
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id of the model")
    edits_arguments(parser)
    chat_arguments(parser)
    parser.add_argument("--delta", type=Path, help="apply this delta in memory first")
    parser.add_argument("--force", action="store_true", help="also to weights that the delta was not made for")
    parser.add_argument("--perplexity", type=Path, metavar="FILE", help="sentences, one a line")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-evaluation-harness, before and after --delta")
    parser.add_argument("--task-files", type=Path, metavar="DIR", help="folder with task files (YAML) of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="of --tasks: the first N documents of each")
    parser.add_argument("--out", type=Path, help="folder of the run, an interrupted one goes on; and of its report")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..evaluation.command import run_evaluate

    edits = as_asked(read_edits(arguments), arguments)
    with progress("evaluating", "edits") as (advance, _):
        return run_evaluate(arguments, edits, advance)
