"""Keep edits in a folder of their own, and make a model of all that is in it, again and again."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, RomeFastError
from .edit import parsed_settings
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
    from ..ledger import Entry, Ledger
    from ..report.edit_data import EditRun
    from ..result import EditResult
    from ..weights import OnRead

NAME = "ledger"
SUMMARY = "keep edits in a folder: add, replace, remove, and write a model with all of them"
EXAMPLE = "rome-fast ledger create ./facts ./model && rome-fast ledger add ./facts --edits edits.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], what: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=what, description=what)
        # Wherever it stands.
        sub.add_argument("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="the report as JSON")
        sub.add_argument("ledger", type=Path, help="folder of the ledger")
        sub.set_defaults(act=run)
        return sub

    sub = action("create", _create, "make an empty ledger for a base model, and settle how it is edited")
    sub.add_argument("model", help="directory or hub id of the base model")
    sub.add_argument("--statistics", type=Path, help="folder of statistics (default: the cache)")
    sub.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    method_argument(sub, "dual")
    layers_argument(sub, "edit layers (default: below that of rome-fast tune, or by model)")
    sub.add_argument("--layer", type=int, help="a single one")
    sub.add_argument("--guard", choices=("raise", "warn", "skip", "off"), default="raise")
    sub.add_argument("--unconverged", choices=("skip", "write", "raise"), default="skip")
    sub.add_argument("--seed", type=int, default=0, help="seed of the prefix contexts")
    sub.add_argument("--contexts", type=Path, metavar="FILE", help="prefix contexts (default: sampled)")
    sub.add_argument("--settings", nargs="+", metavar="KEY=VALUE", help="of the search of values")
    _memory(sub)
    device_argument(sub)
    dtype_argument(sub)
    trust_argument(sub)
    for name, run, what in (
        ("add", _add, "find the values of new edits and put them in"),
        ("replace", _replace, "put edits in the place of those with the same prompt and subject"),
    ):
        sub = action(name, run, what)
        edits_arguments(sub, duplicates="error")
        chat_arguments(sub)
        sub.add_argument("--tags", nargs="+", metavar="TAG", help="to find them by")
        sub.add_argument(
            "--on",
            choices=("base", "edited"),
            default="base",
            help="what values are found on: the base model, or that with all edits that are in the ledger",
        )
        _said(sub)
        _on_model(sub, statistics=True)
    sub = action("remove", _remove, "take entries out")
    sub.add_argument("ids", nargs="*", metavar="ID", help="or its first characters")
    _conditions(sub)
    _said(sub)
    sub = action("list", _list, "what is in it, an entry a line")
    _conditions(sub)
    _at(sub)
    sub = action("show", _show, "everything about one entry")
    sub.add_argument("id", metavar="ID", help="or its first characters")
    _at(sub)
    action("log", _log, "its events, the oldest first")
    sub = action("diff", _diff, "how it differs from another ledger, or from itself after an event")
    sub.add_argument("other", help="folder of the other one, or the number of an event")
    sub = action("merge", _merge, "take over what another ledger of the same base has")
    sub.add_argument("other", type=Path, help="folder of the other one")
    sub.add_argument("--prefer", choices=("mine", "theirs"), help="whose target, where both ask the same")
    _said(sub)
    sub = action("write", _write, "write the model with all edits in it, or an update by itself")
    target = sub.add_mutually_exclusive_group()
    target.add_argument("--out", type=Path, help="new directory for the edited checkpoint")
    target.add_argument("--in-place", action="store_true", help="change the base's directory; revert leads back to it")
    target.add_argument("--lora", type=Path, metavar="DIR", help="new directory for an adapter of PEFT")
    sub.add_argument("--rank", type=int, metavar="N", help="of --lora: at most so much, as near as that can be")
    target.add_argument("--delta", type=Path, metavar="FILE", help="the update alone, for evaluate --delta")
    sub.add_argument("--tags", nargs="+", metavar="TAG", help="only entries with one of these")
    sub.add_argument("--link", choices=("copy", "hard"), default="copy", help="shards that stay as they are")
    sub.add_argument("--report", type=Path, metavar="DIR", help="new folder for a page on every edit, with its data")
    _at(sub)
    _on_model(sub, statistics=True)
    sub = action("compact", _compact, "forget events and values that are no longer in use")
    _said(sub)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    act: Callable[[argparse.Namespace], dict[str, Any]] = arguments.act
    return act(arguments)


def _said(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--who", metavar="TEXT", help="for the log")
    sub.add_argument("--why", metavar="TEXT", help="for the log")


def _at(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--at", type=int, metavar="N", help="as it was after event N")


def _conditions(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--text", help="those with this in prompt or target")
    sub.add_argument("--subject", help="those of this subject")
    sub.add_argument("--tags", nargs="+", metavar="TAG", help="those with one of these")


def _on_model(sub: argparse.ArgumentParser, statistics: bool) -> None:
    sub.add_argument("--model", help="the base model (default: where it was when the ledger was made)")
    if statistics:
        sub.add_argument("--statistics", type=Path, help="their folder (default: as at the beginning, or the cache)")
    _memory(sub)
    device_argument(sub)
    trust_argument(sub)


def _memory(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--memory", help="how much of the model may be in memory, as 8GiB (default: what is free)")


def _create(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.identity and arguments.statistics:
        raise ArgumentError("statistics: got both --statistics and --identity, wanted one of them")
    changes = parsed_settings(arguments.settings or [])
    contexts = read_contexts(arguments.contexts) if arguments.contexts else None
    from ..ledger import Ledger
    from ..opening.defaults import explain_layer
    from ..runs.terminal import say

    ledger = Ledger.create(
        arguments.ledger,
        arguments.model,
        statistics="identity" if arguments.identity else _statistics(arguments),
        method=arguments.method,
        layer=arguments.layer,
        layers=arguments.layers,
        contexts=contexts,
        settings=changes,
        guard=arguments.guard,
        unconverged=arguments.unconverged,
        seed=arguments.seed,
        memory=arguments.memory,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    base = ledger.base
    say(f"{ledger.folder}: an empty ledger for {arguments.model} ({base.fingerprint}, {base.dtype})")
    say(explain_layer(base.layers, base.layer_source, arguments.model))
    return {"ledger": str(ledger.folder), "id": base.id, "layers": list(base.layers), "method": base.method.name}


def _add(arguments: argparse.Namespace) -> dict[str, Any]:
    return _put(arguments, lambda ledger: ledger.add)


def _replace(arguments: argparse.Namespace) -> dict[str, Any]:
    return _put(arguments, lambda ledger: ledger.replace)


def _put(arguments: argparse.Namespace, method: Callable[["Ledger"], Callable[..., list[str]]]) -> dict[str, Any]:
    from ..runs.terminal import say

    _model_of(arguments)
    edits = as_asked(read_edits(arguments), arguments)
    tags = {} if arguments.tags is None else {"tags": arguments.tags}
    with progress("values", "edits") as (advance, reading):
        ledger = _opened(arguments, reading)
        before = {entry.edit.question: entry for entry in ledger.entries()}
        said = {"who": arguments.who, "why": arguments.why, "on": arguments.on}
        ids = method(ledger)(edits, progress=advance, **said, **tags)
    for id, edit in zip(ids, edits, strict=True):
        old = before.get(edit.question)
        was = f" (was {old.edit.target!r})" if old is not None and old.id != id else ""
        say(f"{ledger.entry(id)}{was}")
    say(f"{ledger.folder}: {len(ledger)} edits")
    return {**_about(ledger), "ids": ids}


def _remove(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    conditions = {name: getattr(arguments, name) for name in ("text", "subject", "tags")}
    removed = ledger.remove(arguments.ids or None, **conditions, who=arguments.who, why=arguments.why)
    for entry in removed:
        say(f"removed {entry}")
    say(f"{ledger.folder}: {len(ledger)} edits")
    return {**_about(ledger), "removed": [entry.id for entry in removed]}


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    found = ledger.entries(text=arguments.text, subject=arguments.subject, tags=arguments.tags, at=arguments.at)
    for entry in found:
        say(_line(entry))
    return {**_about(ledger), "entries": [_entry(entry) for entry in found]}


def _show(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    entry = ledger.entry(arguments.id, at=arguments.at)
    shown = _entry(entry)
    say(str(entry))
    for name, value in shown.items():
        if name not in ("id", "edit"):
            say(f"{name}: {value}")
    return {**_about(ledger), "entry": shown}


def _log(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    events = ledger.log()
    for event in events:
        said = "".join(f"  {text}" for text in (event.who, event.why) if text)
        say(f"{event.number}  {event.time}  {event.kind}  +{len(event.added)} -{len(event.removed)}{said}")
    return {**_about(ledger), "events": [event.to_json() for event in events]}


def _diff(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    other = arguments.other
    found = ledger.diff(int(other) if other.isdecimal() and not Path(other).exists() else other)
    for sign, entries in (("-", found.only_there), ("+", found.only_here)):
        for entry in entries:
            say(f"{sign} {entry}")
    for here, there in found.differing:
        say(f"- {there}")
        say(f"+ {here}")
    return {
        **_about(ledger),
        "only_here": [_entry(entry) for entry in found.only_here],
        "only_there": [_entry(entry) for entry in found.only_there],
        "differing": [[_entry(entry) for entry in pair] for pair in found.differing],
    }


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    taken = ledger.merge(arguments.other, prefer=arguments.prefer, who=arguments.who, why=arguments.why)
    for entry in taken:
        say(f"taken {entry}")
    say(f"{ledger.folder}: {len(ledger)} edits")
    return {**_about(ledger), "taken": [entry.id for entry in taken]}


def _write(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..opening.defaults import explain_layer
    from ..opening.opening import Destination
    from ..records import report_json
    from ..report import edit_table
    from ..report.edit import REPORT_FILE, write_run
    from ..runs.terminal import say, show
    from ..weights import explain_rates

    if not (arguments.out or arguments.in_place or arguments.lora or arguments.delta):
        raise ArgumentError("out: got None, wanted --out, --in-place, --lora or --delta")
    if arguments.rank is not None and not arguments.lora:
        raise ArgumentError("rank: got one without --lora, wanted both or none")
    Destination(arguments.out, arguments.in_place, arguments.lora).check()
    model = _model_of(arguments)
    runs: list[EditRun] = []
    asking = None if arguments.report is None else _asking(arguments, runs)
    ledger = _opened(arguments)
    chosen = {"tags": arguments.tags, "at": arguments.at}
    if arguments.lora:
        delta = ledger.to_lora(arguments.lora, rank=arguments.rank, **chosen)
        where = f"adapter: {arguments.lora}, for {model} as it is"
    elif arguments.delta:
        delta = ledger.close(**chosen)
        delta.save(arguments.delta)
        where = f"update: {arguments.delta}, for {model} as it is"
    else:
        target = {"out": arguments.out, "in_place": arguments.in_place, "link": arguments.link}
        delta = ledger.write(model, **target, report=asking, **chosen)
        edited = arguments.out or model
        where = f"edited checkpoint: {edited}" + (f" (undo with: rome-fast revert {edited})" if delta.updates else "")
    if delta.report.get("edits"):
        show(edit_table(delta.report["edits"]))
        say(explain_layer(ledger.base.layers, ledger.base.layer_source, model))
    if nll := delta.report.get("context_nll"):
        say(f"mean NLL of the contexts: {nll['before']:.3f} → {nll['after']:.3f} nats a token")
    if rates := delta.report.get("streaming"):
        say(explain_rates(rates))
    for name, about in delta.report.get("truncation", {}).items():
        outputs = "" if about["output_error"] is None else f", {about['output_error']:.1%} of its outputs"
        say(f"{name}: rank {about['rank']} of {about['of']}, off by {about['error']:.1%} of the update{outputs}")
    say(where)
    report = {"edits": [], **report_json(delta.report)}
    report |= {**_about(ledger), **chosen, "entries": report.get("ledger", {}).get("entries", [])}
    for run in runs:
        try:
            write_run(arguments.report, run)
        except RomeFastError as error:
            raise Unreported(str(error), report) from error
        say(f"report: {arguments.report / REPORT_FILE}")
    if arguments.report and not runs:
        say("report: none, as no edit is in the update")
    return report


def _asking(arguments: argparse.Namespace, runs: list["EditRun"]) -> Callable[["EditResult"], None]:
    """What asks the edited model for its report, and puts that behind `runs`; ArgumentError where none can be had."""
    from ..ledger import Ledger
    from ..report.edit import check_new_report
    from ..report.edit_data import asked_run

    if not (arguments.out or arguments.in_place):
        raise ArgumentError("report: got it without --out or --in-place, wanted a model that can be asked")
    source = Path(arguments.model)
    places = ("the model", source if source.exists() else None), ("that of --out", arguments.out)
    check_new_report(arguments.report, *places, ("the ledger", arguments.ledger))
    named = ("model", "ledger", "tags", "at", "out", "in_place", "memory")
    given = {name: getattr(arguments, name) for name in named}
    about = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    edits = [entry.edit for entry in Ledger.open(arguments.ledger).entries(tags=arguments.tags, at=arguments.at)]

    def ask(result: "EditResult") -> None:
        with progress("asking", "questions") as (advance, _):
            runs.append(asked_run(result, edits, about, advance))

    return ask


def _compact(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..ledger import Ledger
    from ..runs.terminal import say

    ledger = Ledger.open(arguments.ledger)
    ledger.compact(who=arguments.who, why=arguments.why)
    say(f"{ledger.folder}: {len(ledger)} edits, without a past")
    return _about(ledger)


def _model_of(arguments: argparse.Namespace) -> str:
    """Where the base model is; kept in the arguments."""
    from ..ledger import Ledger

    if arguments.model is None:
        arguments.model = Ledger.open(arguments.ledger).base.model
        if not arguments.model:
            raise ArgumentError("model: got None, and the ledger does not say where its base was, wanted --model")
        if Path(arguments.model).is_absolute() and not Path(arguments.model).is_dir():
            raise ArgumentError(
                f"model: got None, and the base is no longer at {arguments.model}, where it was when the ledger was "
                "made; wanted --model"
            )
    return str(arguments.model)


def _opened(arguments: argparse.Namespace, on_read: "OnRead | None" = None) -> "Ledger":
    """The ledger with its base model."""
    from ..ledger import Ledger

    return Ledger.open(
        arguments.ledger,
        arguments.model,
        statistics=_statistics(arguments),
        memory=arguments.memory,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        on_read=on_read,
    )


def _statistics(arguments: argparse.Namespace) -> Any:
    from ..statistics import Statistics

    folder = getattr(arguments, "statistics", None)
    return None if folder is None else Statistics.load(folder)


def _about(ledger: "Ledger") -> dict[str, Any]:
    return {"ledger": str(ledger.folder), "edits_in_it": len(ledger)}


def _line(entry: "Entry") -> str:
    notes = [*entry.tags, *([] if entry.converged else ["no value was found"])]
    return str(entry) + (f"  [{', '.join(notes)}]" if notes else "")


def _entry(entry: "Entry") -> dict[str, Any]:
    return {**entry.to_json(), "text": entry.edit.text, "event": entry.event}
