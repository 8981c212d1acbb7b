"""Commands that end with all that they have started: in their time, or when whoever started them is asked to end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_running: set[int] = set()
"""Process groups, by number."""


def run_group(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Status and output of a command; after so many seconds it is killed, and all that it started: status 124.

    A child that lives on, as that of compute-sanitizer does, would keep the GPU. It may be called from threads.
    """
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        _running.add(process.pid)
        try:
            text, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            _kill(process.pid)
            if isinstance(error, subprocess.TimeoutExpired):
                return 124, f"stopped after {seconds:.0f} s"
            raise
        finally:
            _running.discard(process.pid)
        return process.returncode, text


@contextmanager
def ending_in_order() -> Iterator[None]:
    """In this block SIGTERM kills what `run_group` has started, in whichever thread, and raises SystemExit."""

    def end(_number: int, _frame: object) -> None:
        for group in list(_running):
            _kill(group)
        sys.exit(1)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
