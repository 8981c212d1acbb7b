"""Edit a checkpoint into a new copy, or in place."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, CollapseError, ConvergenceError, RomeFastError
from .shared import (
    Unreported,
    as_asked,
    chat_arguments,
    device_argument,
    dtype_argument,
    edits_arguments,
    layers_argument,
    method_argument,
    progress,
    read_contexts,
    read_edits,
    trust_argument,
)

if TYPE_CHECKING:
    from ..edits import Edit
    from ..result import EditResult

NAME = "edit"
SUMMARY = "edit facts into a new copy of a checkpoint, or in place"
EXAMPLE = "rome-fast edit ./model --edits edits.jsonl --layers 3-9 --out ./edited"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id of the model; only read, unless --in-place")
    edits_arguments(parser, duplicates="error")
    chat_arguments(parser)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", type=Path, help="new directory for the edited checkpoint")
    target.add_argument("--in-place", action="store_true", help="change MODEL itself; a kill leaves it old or new")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="new directory for the edit as an adapter of PEFT")
    parser.add_argument("--link", choices=("copy", "hard"), default="copy", help="shards that stay as they are")
    parser.add_argument("--statistics", type=Path, help="folder of statistics (default: the cache)")
    parser.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    method_argument(parser, "dual")
    layers_argument(parser, "edit layers (default: below that of rome-fast tune, or by model)")
    parser.add_argument("--layer", type=int, help="a single one")
    parser.add_argument("--schedule", choices=("joint", "sequential"), default="joint")
    parser.add_argument("--batch-size", type=int, default=1, help="edits at a time when sequential (default: 1)")
    parser.add_argument("--rounds", type=int, default=1, help="searches of values, all but one on the edited model")
    parser.add_argument("--guard", choices=("raise", "warn", "skip", "off"), default="raise")
    parser.add_argument("--unconverged", choices=("skip", "write", "raise"), default="skip")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prefix contexts")
    parser.add_argument(
        "--contexts", type=Path, metavar="FILE", help="prefix contexts, one a line, or a JSON list (default: sampled)"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="KEY=VALUE",
        help="of the search of values, as steps=30 lr=0.3 (default: of rome-fast tune, or by model)",
    )
    parser.add_argument("--no-measure", action="store_true", help="leave probabilities before and after out")
    parser.add_argument("--report", type=Path, metavar="DIR", help="new folder for a page on every edit, with its data")
    parser.add_argument("--memory", help="how much of the model may be in memory, as 8GiB (default: what is free)")
    parser.add_argument("--plan", action="store_true", help="say what would be kept in memory and read, and stop")
    device_argument(parser)
    dtype_argument(parser)
    trust_argument(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    if not (arguments.plan or arguments.out or arguments.lora or arguments.in_place):
        raise ArgumentError(
            "out: got None, wanted --out or --lora with a new directory, or --in-place, which changes MODEL itself"
        )
    if arguments.identity and arguments.statistics:
        raise ArgumentError("statistics: got both --statistics and --identity, wanted one of them")
    changes = parsed_settings(arguments.settings or [])
    contexts = read_contexts(arguments.contexts) if arguments.contexts else None

    from ..runs.processes import own_device

    edits = as_asked(read_edits(arguments), arguments)
    # What a plan and an edit have in common.
    options: dict[str, Any] = {
        "method": arguments.method,
        "layer": arguments.layer,
        "layers": arguments.layers,
        "schedule": arguments.schedule,
        "contexts": contexts,
        "settings": changes,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "measure": not arguments.no_measure,
        "memory": arguments.memory,
        "device": own_device(arguments.device),
        "dtype": arguments.dtype,
        "trust_remote_code": arguments.trust_remote_code,
    }
    return _plan(arguments, edits, options) if arguments.plan else _edit(arguments, edits, options)


def _edit(arguments: argparse.Namespace, edits: list["Edit"], options: dict[str, Any]) -> dict[str, Any] | None:
    from ..editor import RESUME, apply_edits
    from ..opening.defaults import explain_layer
    from ..report import edit_table
    from ..runs.processes import joined, launched_together
    from ..runs.terminal import say, show
    from ..statistics import Statistics
    from ..weights import explain_rates

    if arguments.report:
        _check_report(arguments)
    statistics = Statistics.load(arguments.statistics) if arguments.statistics else None
    together = launched_together()
    with ExitStack() as stack:
        first = not together or stack.enter_context(joined(options["device"], RESUME)).rank == 0
        advance, reading = stack.enter_context(progress("values", "edits")) if first else (None, None)
        try:
            result = apply_edits(
                arguments.model,
                edits,
                statistics="identity" if arguments.identity else statistics,
                guard=arguments.guard,
                unconverged=arguments.unconverged,
                seed=arguments.seed,
                out=arguments.out,
                in_place=arguments.in_place,
                link=arguments.link,
                lora=arguments.lora,
                distributed=together,
                progress=advance,
                on_read=reading,
                **options,
            )
        except (CollapseError, ConvergenceError) as error:
            if first and arguments.report:
                _report_failure(arguments, edits, error)
            raise
    if not first:
        return None
    show(edit_table(result.records))
    say(explain_layer(result.records[0].layers, result.layer_source, arguments.model))
    if result.context_nll is not None:
        nll = result.context_nll
        say(f"mean NLL of the contexts: {nll.before:.3f} → {nll.after:.3f} nats a token")
    if result.streaming is not None:
        say(explain_rates(result.streaming))
    if arguments.lora:
        say(f"adapter: {arguments.lora}, for {arguments.model} as it is")
    edited = arguments.model if arguments.in_place else arguments.out
    if edited:
        say(f"edited checkpoint: {edited} (undo with: rome-fast revert {edited})")
    if arguments.report:
        try:
            _report(arguments, edits, result)
        except RomeFastError as error:
            raise Unreported(str(error), result.report()) from error
    return result.report()


def _check_report(arguments: argparse.Namespace) -> None:
    from ..report.edit import check_new_report

    source = Path(arguments.model)
    check_new_report(
        arguments.report,
        ("the model", source if source.exists() else None),
        ("that of --out", arguments.out),
        ("that of --lora", arguments.lora),
    )


def _report(arguments: argparse.Namespace, edits: list["Edit"], result: "EditResult") -> None:
    from ..report.edit import REPORT_FILE, write_run
    from ..report.edit_data import asked_run
    from ..runs.terminal import say

    about = _about(arguments, *_GIVEN)
    with progress("asking", "questions") as (advance, _):
        run = asked_run(result, edits, about, advance)
    write_run(arguments.report, run)
    say(f"report: {arguments.report / REPORT_FILE}")


_GIVEN = ("model", "edits", "out", "in_place", "lora", "guard", "unconverged", "seed", "chat", "system", "memory")


def _about(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _report_failure(arguments: argparse.Namespace, edits: list["Edit"], error: RomeFastError) -> None:
    """The report of a run that wrote nothing; where it cannot be written either, what went wrong first counts."""
    from ..report.edit import REPORT_FILE, write_run
    from ..report.edit_data import failed_run
    from ..runs.terminal import tell

    about = _about(arguments, *_GIVEN, "method", "layer", "layers", "schedule", "settings")
    try:
        write_run(arguments.report, failed_run(error, edits, about))
        tell(f"report: {arguments.report / REPORT_FILE}")
    except RomeFastError as other:
        tell(f"the report could not be written: {other}")


def _plan(arguments: argparse.Namespace, edits: list["Edit"], options: dict[str, Any]) -> dict[str, Any]:
    from ..planning import plan
    from ..runs.terminal import say

    made = plan(arguments.model, edits, statistics="identity" if arguments.identity else None, **options)
    say(str(made))
    return made.to_json()


_SHORT = {"lr": "learning_rate"}


def parsed_settings(given: Sequence[str]) -> dict[str, Any]:
    """Fields of ValueSettings from texts of the form key=value; ArgumentError that lists every fault."""
    if not given:
        return {}
    from ..search.values import ValueSettings

    defaults = ValueSettings()
    kinds = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    found: dict[str, Any] = {}
    faults = []
    for text in given:
        key, equals, value = text.partition("=")
        name = _SHORT.get(key, key)
        if not equals or name not in kinds:
            faults.append(f"{text!r} is no key=value of a known key")
        elif name in found:
            faults.append(f"{name} is given twice")
        else:
            try:
                found[name] = kinds[name](value)
                ValueSettings(**{name: found[name]})
            except ArgumentError as error:
                faults.append(str(error).removeprefix("settings: "))
            except ValueError:
                faults.append(f"{text!r} has no {'whole ' if kinds[name] is int else ''}number")
    if faults:
        raise ArgumentError(f"settings: {'; '.join(faults)}; the keys are {', '.join(kinds)}")
    return found
