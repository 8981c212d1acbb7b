"""The command line: `rome-fast VERB …`. Every verb is a file here and takes --json FILE for its report."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ArgumentError, RomeFastError
from ..runs.terminal import patient_streams, tell, visible
from . import bench, demo, edit, evaluate, ledger, profile, report, revert, statistics, study, trace, tune, verify
from .shared import Unreported

_VERBS = (demo, statistics, edit, report, ledger, evaluate, tune, trace, bench, study, profile, revert, verify)

_EXAMPLES = """examples:
  rome-fast demo
  rome-fast statistics ./model --corpus text.txt
  rome-fast edit ./model --edits edits.jsonl --out ./edited
  rome-fast evaluate ./edited --edits edits.jsonl --json scores.json
  rome-fast revert ./edited
"""


class _Parser(argparse.ArgumentParser):
    """Repeats what it was given without letting it act on the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    That is 0 where what was asked for was done, also where it could not be printed; 2 with one message for an error
    of rome_fast or wrong usage; 3 where all was done but a report of it; 130 for an interrupt.
    """
    with patient_streams() as unprinted:
        return _run(_parser().parse_args(argv), unprinted)


def _run(arguments: argparse.Namespace, unprinted: Callable[[], str | None]) -> int:
    try:
        if arguments.json is not None:
            _check_report(arguments)
        made, status = arguments.run(arguments), 0
    except Unreported as error:
        tell(f"rome-fast: all was done, but its report could not be written: {error}")
        made, status = error.report, 3
    except (RomeFastError, Warning) as error:  # the latter where Python was told to raise them
        tell(f"rome-fast: {error}")
        return 2
    except KeyboardInterrupt:
        tell("rome-fast: interrupted; nothing half-written is left behind")
        return 130
    if reason := unprinted():
        tell(f"rome-fast: all was done, but standard output did not take what was to be said of it ({reason})")
    # None: this is not the first of several processes.
    if arguments.json is not None and made is not None:
        try:
            _write_json(arguments.json, made)
        except RomeFastError as error:
            tell(f"rome-fast: all was done, but its report could not be written: {error}")
            return 3
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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


def _check_report(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError for a report that could not be written later, or would be in place of something else."""
    file: Path = arguments.json
    if not file.absolute().parent.is_dir():
        raise ArgumentError(f"json: the folder {file.parent} does not exist; make it first")
    if file.is_dir():
        raise ArgumentError(f"json: {file} is a folder, wanted the name of a file")
    from ..weights.files import check_writable

    try:
        check_writable(file.absolute().parent)
    except RomeFastError as error:
        raise ArgumentError(f"json: {error}; choose another place") from error
    for name, value in vars(arguments).items():
        for other in value if isinstance(value, list) else [value]:
            if name != "json" and isinstance(other, Path) and file.resolve() == other.resolve():
                raise ArgumentError(f"json: {file} is what {name} names; choose another name")
    model = getattr(arguments, "model", None) or getattr(arguments, "directory", None)
    # Both have JSON files of their own.
    for what, folder in (("model", model), ("ledger", getattr(arguments, "ledger", None))):
        if folder and file.exists() and Path(folder).resolve() in file.resolve().parents:
            raise ArgumentError(f"json: {file} is a file of the {what} {folder}; choose another name")


def _write_json(file: Path, report: dict[str, Any]) -> None:
    from ..weights.files import atomic_write

    # Halves of surrogate pairs, as in names that are no UTF-8, become JSON's own escapes.
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    atomic_write(file, text.encode("utf-8", "backslashreplace"))
