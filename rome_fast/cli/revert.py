"""Restore an edited checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from .shared import progress

NAME = "revert"
SUMMARY = "restore an edited checkpoint to its original bytes"
EXAMPLE = "rome-fast revert ./edited"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from .. import checkpoints
    from ..terminal import say

    with progress("restoring", "checkpoint") as (advance, _):
        names = checkpoints.revert(arguments.directory)
        advance(1, 1)
    say(f"{arguments.directory}: restored {', '.join(names) or 'by the revert that was cut short'}")
    return {"directory": str(arguments.directory), "restored": names}
