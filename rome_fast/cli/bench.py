"""Measure edit throughput."""

import argparse
from pathlib import Path
from typing import Any

from .shared import DTYPES, measured

NAME = "bench"
SUMMARY = "measure edit throughput, and against an editor written the usual way"
EXAMPLE = "rome-fast bench --baseline --count 8 --threads 1 --json bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measured(parser, count=None)
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", help="of the weights; several in turn (default: as stored)"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="edits per call; several in turn (default: 16)")
    parser.add_argument("--baseline", action="store_true", help="also make the edits as the released editors do")
    parser.add_argument("--sentences", type=Path, help="sentences for perplexity, one a line (default: the demo's)")
    parser.add_argument("--no-quality", action="store_true", help="leave quality figures out")
    parser.add_argument(
        "--keep", type=Path, help="keep each batch's figures in this file; a batch in it is not run again"
    )
    parser.add_argument(
        "--predict", metavar="GPU", help="instead, say what a shape's edits would take on a GPU that is not here (h200)"
    )
    parser.add_argument(
        "--steps", type=int, help="of --predict: steps by the default rule, all but one on some rows (default: 16)"
    )
    parser.add_argument("--csv", type=Path, help="append a row for each batch size and dtype to this CSV file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw where the time goes, as .png, .svg or .pdf")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..bench.command import run_bench

    return run_bench(arguments)
