"""Which edits would collapse a model."""

import argparse
from pathlib import Path
from typing import Any

from .shared import device_argument, dtype_argument, edits_arguments, progress, trust_argument

NAME = "study"
SUMMARY = "which edits would collapse this model, why, and what cures it"
EXAMPLE = "rome-fast study ./model --edits edits.jsonl --sample 100 --out study"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    edits_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; an interrupted one goes on")
    parser.add_argument("--statistics", type=Path, help="folder of statistics (default: the demo's, or the cache)")
    parser.add_argument("--methods", nargs="+", help="default: rome c-rome-released c-rome p-rome dual")
    parser.add_argument("--sample", type=int, help="requests besides the first-token ones (default: all)")
    parser.add_argument("--layer", type=int, help="where to edit, by any method (default: each at its usual layers)")
    parser.add_argument("--sentences", type=Path, help="sentences for perplexity, one a line (default: the demo's)")
    parser.add_argument("--batch", type=int, default=8, help="requests measured, and kept, at a time (default: 8)")
    parser.add_argument("--processes", type=int, help="to share the requests (default: on a CPU one a core)")
    parser.add_argument("--threads", type=int, help="CPU threads of each process (default: the cores, shared out)")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..runs.terminal import say
    from ..study import run_study

    with progress("studying", "requests") as (advance, _):
        return run_study(arguments, advance, say)
