"""Everything that the command line prints goes through here: text of users acts on no terminal and ends no run.

Text is shown as it is: nothing in it is markup, what would steer a terminal is spelled out, and so is what the
encoding of the stream does not have. A stream that takes no more is left alone, since what was asked for matters more
than what is said about it.
"""

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

# C0 and C1 controls but for tab and newline, marks and overrides of direction, halves of surrogate pairs.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, encoding: str = "utf-8") -> str:
    """The text with what would steer a terminal, and what `encoding` does not have, spelled out, as `\\x1b`."""
    spelled = _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    try:
        spelled.encode(encoding)
    except UnicodeEncodeError:
        return spelled.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return spelled.encode("ascii", "backslashreplace").decode("ascii")
    return spelled


def one_line(text: str) -> str:
    """The same on one line, for a cell of a table."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


class PlainConsole(Console):
    """A console of rich for which every string is text: no markup, no emoji codes, nothing that steers a terminal."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **keywords)

    def render_str(self, text: str, **keywords: Any) -> Text:
        return super().render_str(visible(text, self.encoding), **keywords)


def say(line: str) -> None:
    """Print a line on standard output, at once."""
    _print(line, sys.stdout)


def tell(line: str) -> None:
    """Print a line on standard error."""
    _print(line, sys.stderr)


def show(renderable: RenderableType) -> None:
    """Print a table of rich at the terminal's width, or wide enough for every column where there is none."""
    console = PlainConsole(file=sys.stdout)
    if not console.is_terminal:
        console = PlainConsole(file=sys.stdout, width=160)
    console.print(renderable)


def _print(line: str, stream: TextIO | None) -> None:
    # Closed before the program began.
    if stream is not None:
        print(visible(line, getattr(stream, "encoding", None) or "utf-8"), file=stream, flush=True)


class _Patient:
    """A text stream whose failures end nothing: after the first one, what is written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        try:
            self._try(lambda: self._stream.write(text))
        except UnicodeEncodeError as error:
            spelled = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            self._try(lambda: self._stream.write(spelled))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:  # the latter of a stream that is closed
            self.failure = error
            # What is left in its buffer would end the interpreter with an error.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextmanager
def patient_streams() -> Iterator[Callable[[], str | None]]:
    """In this block standard output and standard error fail nobody, and a warning is one line on standard error.

    Yields a function that says why standard output took not all that was printed; None where it did, or where its
    reader wanted no more (`| head`).
    """
    streams = sys.stdout, sys.stderr
    out, err = (None if stream is None else _Patient(stream) for stream in streams)

    def failure() -> str | None:
        if out is None:
            return None
        out.flush()
        if out.failure is None or getattr(out.failure, "errno", None) == errno.EPIPE:
            return None
        return getattr(out.failure, "strerror", None) or str(out.failure)

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        sys.stdout, sys.stderr = out, err
        try:
            yield failure
        finally:
            for stream in (out, err):
                if stream is not None:
                    stream.flush()
            sys.stdout, sys.stderr = streams


def _show_warning(message: Warning | str, *_args: Any, **_keywords: Any) -> None:
    """In place of `warnings.showwarning`: one line for the reader, not a line of our source."""
    tell(f"warning: {message}")
