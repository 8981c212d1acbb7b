"""Where the time of an edit goes."""

import argparse
from pathlib import Path
from typing import Any

from .shared import DTYPES, measured

NAME = "profile"
SUMMARY = "trace a few edits and set every stage and operator against what the device does at best"
EXAMPLE = "rome-fast profile ./model --edits edits.jsonl --count 4 --out profile"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    measured(parser, count=4)
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    parser.add_argument("--out", type=Path, default=Path("profile"), help="folder for the files (default: profile)")
    parser.set_defaults(sentences=None, no_quality=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..bench.profile import run_profile

    return run_profile(arguments)
