"""Restore an edited checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from .shared import progress

NAME = "revert"
SUMMARY = "undo the last edit of a checkpoint, or all of them, to the byte"
EXAMPLE = "rome-fast revert ./edited"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path)
    parser.add_argument("--all", action="store_true", help="undo every edit, not only the last one")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..runs.terminal import say
    from ..updates import chains

    with progress("restoring", "checkpoint") as (advance, _):
        names = chains.revert(arguments.directory, all=arguments.all)
        advance(1, 1)
    left = len(chains.edits_of(arguments.directory))
    say(f"{arguments.directory}: restored {', '.join(names) or 'by the revert that was cut short'}")
    if left:
        say(f"edits before that one: {left}; undo them with: rome-fast revert {arguments.directory} --all")
    return {"directory": str(arguments.directory), "restored": names, "edits_left": left}
