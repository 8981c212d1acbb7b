"""What several verbs share: arguments, progress, reading text."""

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArgumentError

DTYPES = ("float32", "bfloat16", "float16")


def measured(sub: argparse.ArgumentParser, count: int | None) -> None:
    """What to measure, for the verbs that do."""
    sub.add_argument("model", nargs="?", help="directory or hub id of the model (default: the demo's)")
    sub.add_argument("--shape", help="random weights of a real model's sizes instead, as llama-2-7b; never stops early")
    sub.add_argument("--edits", type=Path, help="requests (default: a small built-in set)")
    how_many = f"how many of them (default: {count or 'all, or one batch for a shape'}; a shape repeats them)"
    sub.add_argument("--count", type=int, default=count, help=how_many)
    sub.add_argument("--statistics", type=Path, help="folder of statistics (default: the demo's, or the cache)")
    sub.add_argument("--identity", action="store_true", help="edit with C = I instead of statistics")
    sub.add_argument("--method", default="c-rome")
    sub.add_argument("--layer", type=int)
    compute = "of products while values are searched (default: auto)"
    sub.add_argument("--compute-dtype", choices=("auto", *DTYPES), default="auto", help=compute)
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


@contextmanager
def progress(stage: str, unit: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int, float], None]]]:
    """A bar on standard error: a function to say what is done of how much, and one for (bytes read, bytes a second)."""
    from rich.console import Console
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

    class Rate(ProgressColumn):
        """How many a second, measured over the last of them."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 10 else "")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[reading]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage, total=None, reading="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def reading(count: int, rate: float) -> None:
            bar.update(task, reading=f"{count / 1e9:.1f} GB read, {rate / 1e9:.2f} GB/s")

        with warnings.catch_warnings():
            # A warning is one line for the reader, not a line of our source.
            warnings.showwarning = lambda message, *_args, **_kwargs: console.print(f"warning: {message}")
            yield advance, reading


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: is not UTF-8 text (byte {error.start}); convert it") from error
