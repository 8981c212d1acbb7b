"""The command line: `rome-fast VERB …`. Every verb is a file here and takes --json FILE for its report."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, RomeFastError
from . import bench, demo, edit, evaluate, profile, revert, statistics, study, verify

_VERBS = (demo, statistics, edit, evaluate, bench, study, profile, revert, verify)

_EXAMPLES = """examples:
  rome-fast demo
  rome-fast statistics ./model --corpus text.txt --layers 9
  rome-fast edit ./model --edits edits.jsonl --out ./edited
  rome-fast evaluate ./edited --edits edits.jsonl --json scores.json
  rome-fast revert ./edited
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; errors of rome_fast print as one message and exit with status 2."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
            raise ArgumentError(f"json: the folder {arguments.json.parent} does not exist; make it first")
        report = arguments.run(arguments)
        # None: this is not the first of several processes.
        if arguments.json is not None and report is not None:
            _write_json(arguments.json, report)
    except RomeFastError as error:
        print(f"rome-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rome-fast: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rome-fast",
        description="Edit facts in language models without collapsing them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in _VERBS:
        sub = verbs.add_parser(
            verb.NAME,
            help=verb.SUMMARY,
            description=verb.SUMMARY,
            epilog=f"example:\n  {verb.EXAMPLE}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=verb.run)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
        verb.add_arguments(sub)
    return parser


def _write_json(file: Path, report: dict[str, Any]) -> None:
    from ..weights.files import atomic_write

    atomic_write(file, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
