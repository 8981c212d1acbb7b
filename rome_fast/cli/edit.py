"""Edit a checkpoint into a new copy, or in place."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .shared import progress

NAME = "edit"
SUMMARY = "edit facts into a new copy of a checkpoint, or in place"
EXAMPLE = "rome-fast edit ./model --edits edits.jsonl --method c-rome --out ./edited"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="directory or hub id of the model; only read, unless --in-place")
    parser.add_argument("--edits", type=Path, required=True, help="JSON lines of prompt, subject, target_new")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", type=Path, help="new directory for the edited checkpoint")
    target.add_argument("--in-place", action="store_true", help="change MODEL itself; a kill leaves it old or new")
    parser.add_argument("--link", choices=("copy", "hard"), default="copy", help="shards that stay as they are")
    parser.add_argument("--statistics", type=Path, help="folder of statistics (default: the cache)")
    parser.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    parser.add_argument("--method", default="c-rome", help="c-rome (default), dual, rome, c-rome-released, p-rome")
    parser.add_argument("--layer", type=int, help="edit layer (default: by model)")
    parser.add_argument("--schedule", choices=("joint", "sequential"), default="joint")
    parser.add_argument("--guard", choices=("raise", "warn", "skip", "off"), default="raise")
    parser.add_argument("--unconverged", choices=("skip", "write", "raise"), default="skip")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prefix contexts")
    parser.add_argument("--memory", help="how much of the model may be in memory, as 8GiB (default: what is free)")
    parser.add_argument("--plan", action="store_true", help="say what would be kept in memory and read, and stop")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code in the model's directory run")


def run(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from ..editor import RESUME, apply_edits
    from ..edits import load_edits
    from ..processes import joined, launched_together, own_device
    from ..report import edit_table, print_table
    from ..statistics import Statistics

    if arguments.plan:
        return _plan(arguments)
    edits = load_edits(arguments.edits)
    if arguments.identity and arguments.statistics:
        raise ArgumentError("statistics: got both --statistics and --identity, wanted one of them")
    statistics = Statistics.load(arguments.statistics) if arguments.statistics else None
    device, together = own_device(arguments.device), launched_together()
    with ExitStack() as stack:
        first = not together or stack.enter_context(joined(device, RESUME)).rank == 0
        advance, reading = stack.enter_context(progress("values", "edits")) if first else (None, None)
        result = apply_edits(
            arguments.model,
            edits,
            statistics="identity" if arguments.identity else statistics,
            method=arguments.method,
            layer=arguments.layer,
            schedule=arguments.schedule,
            guard=arguments.guard,
            unconverged=arguments.unconverged,
            seed=arguments.seed,
            out=arguments.out,
            in_place=arguments.in_place,
            link=arguments.link,
            memory=arguments.memory,
            device=device,
            trust_remote_code=arguments.trust_remote_code,
            distributed=together,
            progress=advance,
            on_read=reading,
        )
    if not first:
        return None
    print_table(edit_table(result.records))
    edited = arguments.model if arguments.in_place else arguments.out
    print(f"edited checkpoint: {edited} (undo with: rome-fast revert {edited})")
    return result.report()


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..edits import load_edits
    from ..planning import plan

    made = plan(
        arguments.model,
        load_edits(arguments.edits),
        statistics="identity" if arguments.identity else None,
        method=arguments.method,
        layer=arguments.layer,
        schedule=arguments.schedule,
        memory=arguments.memory,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(made)
    return made.to_json()
