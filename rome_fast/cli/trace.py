"""Which states of a model carry a fact."""

import argparse
from pathlib import Path
from typing import Any

from .shared import device_argument, dtype_argument, edits_arguments, progress, trust_argument

NAME = "trace"
SUMMARY = "causal tracing: which layers and tokens carry what the model says of a subject"
EXAMPLE = "rome-fast trace ./model --edits edits.jsonl --out trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    edits_arguments(parser, required=False, what="requests (default: a small built-in set)")
    parser.add_argument("--out", type=Path, default=Path("trace"), help="folder; an interrupted run goes on")
    parser.add_argument("--count", type=int, default=10, help="how many that the model answers rightly (default: 10)")
    parser.add_argument("--samples", type=int, default=3, help="of the noise, for each (default: 3; published: 10)")
    parser.add_argument("--noise", type=float, default=3.0, help="in standard deviations of embeddings (default: 3)")
    parser.add_argument("--window", type=int, default=10, help="layers restored together (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..runs.terminal import say
    from ..trace.command import run_trace

    with progress("tracing", "requests") as (advance, _):
        return run_trace(arguments, advance, say)
