"""What several verbs share: arguments, progress, reading contexts."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, EditError, RomeFastError
from ..runs.texts import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..edits import Edit

DTYPES = ("float32", "bfloat16", "float16")

METHODS = (
    "rome",
    "c-rome-released",
    "c-rome",
    "p-rome",
    "dual",
    "emmet",
    "memit",
    "memit-history",
    "encore",
    "alphaedit",
)
"""Those of `rome_fast.methods`, which takes torch to be imported."""

_MOST_LISTED = 10


class Unreported(RomeFastError):
    """All was done, but not all could be written that was to be said of it; `report` is what --json gets."""

    def __init__(self, message: str, report: dict[str, Any] | None) -> None:
        super().__init__(message)
        self.report = report


def measured(sub: argparse.ArgumentParser, count: int | None) -> None:
    """What to measure, for the verbs that do."""
    sub.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    sub.add_argument("--shape", help="random weights of a real model's sizes instead, as llama-2-7b; never stops early")
    edits_arguments(sub, required=False, what="requests (default: a small built-in set)")
    how_many = f"how many of them (default: {count or 'all, or one batch for a shape'}; a shape repeats them)"
    sub.add_argument("--count", type=int, default=count, help=how_many)
    sub.add_argument("--statistics", type=Path, help="folder of statistics (default: the demo's, or the cache)")
    sub.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    method_argument(sub, "c-rome")
    layers_argument(sub, "edit layers (default: those that an edit by this method takes)")
    sub.add_argument("--layer", type=int, help="a single one")
    compute = "of products while values are searched (default: auto)"
    sub.add_argument("--compute-dtype", choices=("auto", *DTYPES), default="auto", help=compute)
    device_argument(sub)
    trust_argument(sub)
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def edits_arguments(
    sub: argparse.ArgumentParser,
    required: bool = True,
    what: str = "JSON lines of prompt, subject, target_new, or a data set's file",
    duplicates: str | None = None,
) -> None:
    """An edits file and how to take it, for the verbs that read one."""
    sub.add_argument("--edits", type=Path, required=required, help=what)
    sub.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="what a faulty record does (default: raise)"
    )
    default = "" if duplicates is None else f" (default: {duplicates})"
    sub.add_argument(
        "--duplicates",
        choices=("error", "first", "last"),
        default=duplicates,
        help=f"which of the requests for one prompt and subject to keep{default}",
    )


def read_edits(arguments: argparse.Namespace) -> "list[Edit]":
    """The edits file of `edits_arguments`, its chats through the template of the model's tokenizer."""
    from ..edits import load_edits

    tokenizer = _tokenizer(arguments) if _may_have_chats(arguments.edits) else None
    return load_edits(arguments.edits, arguments.on_error, arguments.duplicates, tokenizer=tokenizer)


def _may_have_chats(file: Path) -> bool:
    if file.exists() and not file.is_file():
        return True  # a pipe can be read only once
    try:
        return b'"messages"' in file.read_bytes()
    except (OSError, ValueError):  # which reading the edits will say
        return False


def _tokenizer(arguments: argparse.Namespace) -> "PreTrainedTokenizerBase":
    from ..opening.checkpoints import load_tokenizer, resolve

    code = arguments.trust_remote_code
    return load_tokenizer(resolve(arguments.model, code=code), trust_remote_code=code)


def method_argument(sub: argparse.ArgumentParser, default: str) -> None:
    others = ", ".join(name for name in METHODS if name != default)
    sub.add_argument("--method", default=default, metavar="NAME", help=f"{default} (default), {others}")


def layers_argument(sub: argparse.ArgumentParser, what: str) -> None:
    """Layers, as 3 5 7 or 3-9."""
    sub.add_argument(
        "--layers", type=_layers, action=_Joined, nargs="+", metavar="LAYERS", help=f"{what}, as 3 5 or 3-9"
    )


def _layers(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted numbers of layers, as 9 or 3-9")
    return list(range(int(first), int(last if dash else first) + 1))


class _Joined(argparse.Action):
    """Several lists in one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [each for part in values or () for each in part])


def device_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="where the model runs (default: cuda where torch finds a GPU, else cpu)")


def dtype_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dtype", choices=DTYPES, help="of the weights in memory (default: as stored)")


def trust_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--trust-remote-code", action="store_true", help="let code in the model's directory run")


def chat_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--chat", action="store_true", help="ask every prompt through the tokenizer's chat template")
    sub.add_argument("--system", metavar="TEXT", help="of --chat: the system prompt (default: the template's own)")


def as_asked(edits: Sequence["Edit"], arguments: argparse.Namespace) -> list["Edit"]:
    """The edits as they are, or with --chat as the user's part of a chat, where they are no chat already.

    EditError names those that cannot be.
    """
    if not arguments.chat:
        if arguments.system is not None:
            raise ArgumentError("system: got a system prompt without --chat, wanted both or none")
        return list(edits)
    tokenizer = _tokenizer(arguments)
    asked, faults = [], []
    for index, edit in enumerate(edits):
        try:
            asked.append(edit if edit.user_at is not None else edit.as_chat(tokenizer, arguments.system))
        except EditError as error:
            faults.append(f"edits[{index}]: {error}")
    if faults:
        more = [f"and {len(faults) - _MOST_LISTED} more"] if len(faults) > _MOST_LISTED else []
        raise EditError("\n".join([*faults[:_MOST_LISTED], *more]))
    return asked


def read_contexts(file: Path) -> list[str]:
    """Contexts from a file: a line each, or a JSON list of texts; ArgumentError names what could not be one."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ArgumentError(f"contexts: {file} begins as a JSON list but is none ({error})") from error
        places = [f"item {i}" for i in range(1, len(found) + 1)]
    else:
        found = text.rstrip("\n").split("\n") if text.strip() else []
        places = [f"line {i}" for i in range(1, len(found) + 1)]
    bad = [
        f"{place}: got {context!r}"
        for place, context in zip(places, found, strict=True)
        if not isinstance(context, str) or not context.strip() or not context[-1].isspace()
    ]
    if bad or not found:
        listed = "; ".join(bad[:_MOST_LISTED]) + (f"; and {len(bad) - _MOST_LISTED} more" * (len(bad) > _MOST_LISTED))
        raise ArgumentError(
            f"contexts: {file}, {listed or 'which is empty'}, wanted texts that are not blank and end in a space, as "
            "'It rained. '"
        )
    return found


@contextmanager
def progress(stage: str, unit: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, float], None]]]:
    """A bar on standard error: a function to say what is done of how much, and one for (bytes read, bytes a second)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from ..runs.terminal import PlainConsole, visible

    class Rate(ProgressColumn):
        """How many a second, measured over the last of them."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 10 else "")

    console = PlainConsole(file=sys.stderr)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(visible(unit), markup=False),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[reading]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(visible(stage), total=None, reading="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def reading(count: int, rate: float) -> None:
            bar.update(task, reading=f"{count / 1e9:.1f} GB read, {rate / 1e9:.2f} GB/s")

        with warnings.catch_warnings():
            # Above the bar.
            warnings.showwarning = lambda message, *_args, **_kwargs: console.print(
                f"warning: {message}", soft_wrap=True
            )
            yield advance, reading
