"""Which layer and settings to edit a model with."""

import argparse
from pathlib import Path
from typing import Any

from .shared import (
    device_argument,
    dtype_argument,
    edits_arguments,
    layers_argument,
    method_argument,
    progress,
    trust_argument,
)

NAME = "tune"
SUMMARY = "find the layer and settings that edit a model best, and keep them with its statistics"
EXAMPLE = "rome-fast tune ./model --corpus text.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    edits_arguments(parser, required=False, what="requests (default: a small built-in set)")
    parser.add_argument("--count", type=int, default=16, help="how many of them (default: 16)")
    layers_argument(parser, "to try, one at a time (default: up to 12 of the lower half)")
    parser.add_argument("--weight-decay", type=float, nargs="+", help="to try (default: 0.001 0.5 20)")
    parser.add_argument("--clamp", type=float, nargs="+", help="to try (default: the model's)")
    parser.add_argument("--perplexity-limit", type=float, default=1.01, help="mean ratio at most (default: 1.01)")
    method_argument(parser, "c-rome")
    parser.add_argument("--statistics", type=Path, help="folder of statistics (default: the cache)")
    parser.add_argument("--corpus", type=Path, nargs="+", help="text for the statistics of layers that have none")
    parser.add_argument("--tokens", type=int, help="of it (default: 10 per dimension of the keys)")
    parser.add_argument("--sentences", type=Path, help="sentences for perplexity, one a line (default: the demo's)")
    parser.add_argument("--out", type=Path, default=Path("tune"), help="folder; an interrupted run goes on")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..runs.terminal import say
    from ..tune.command import run_tune

    with progress("tuning", "edits") as (advance, _):
        return run_tune(arguments, advance, say)
