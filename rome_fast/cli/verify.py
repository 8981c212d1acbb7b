"""Check a checkpoint to the last byte."""

import argparse
from pathlib import Path
from typing import Any

NAME = "verify"
SUMMARY = "read a checkpoint to the last byte and check it, and what rome-fast needs to undo its edit"
EXAMPLE = "rome-fast verify ./edited"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..runs.terminal import say
    from ..updates import chains

    report = chains.verify(arguments.directory)
    say(f"{arguments.directory}: {report['tensors']} tensors, {report['bytes']:,} bytes, all in order")
    for edit in report["chain"]:
        count = f"{edit['requests']} request{'s' * (edit['requests'] != 1)}"
        say(f"{edit['place']}: {count}, {edit['method']}: {', '.join(edit['edited'])}")
    if report["edited"]:
        say(f"edited: {', '.join(report['edited'])}; the original bytes are there")
    return report
