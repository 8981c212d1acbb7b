"""The demo: a fact change, ROME's collapse and its cure."""

import argparse
from pathlib import Path
from typing import Any

from .shared import device_argument

NAME = "demo"
SUMMARY = "show a fact change, ROME's collapse and its cure in a small real model"
EXAMPLE = "rome-fast demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    device_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..demo import run_demo

    return run_demo(arguments.out, arguments.device)
