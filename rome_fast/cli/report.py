"""Write the page of an edit run anew."""

import argparse
from pathlib import Path
from typing import Any

NAME = "report"
SUMMARY = "write the page of an edit run anew, from the folder that edit --report made"
EXAMPLE = "rome-fast report report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="folder that rome-fast edit --report wrote")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..report.edit import write_report
    from ..runs.terminal import say

    written = write_report(arguments.directory)
    say(f"report: {written}")
    return {"report": str(written)}
