"""Several processes on one machine share a list of tasks: each takes the next one that nobody has taken yet.

Imports nothing heavy, so that a new process soon begins with what it is there for.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

_SPAWN = get_context("spawn")  # a fork after torch has started threads may hang


class Turns:
    """0, 1, 2, …, each given once, to whichever process asks first."""

    def __init__(self) -> None:
        self._next = _SPAWN.Value("q", 0)

    def __call__(self) -> int:
        with self._next.get_lock():
            turn = self._next.value
            self._next.value += 1
        return turn


@contextmanager
def helped(count: int, work: Callable[..., None], *arguments: Any) -> Iterator[list[int]]:
    """`count` more processes call `work` during the block, which then waits for them; their exit statuses, if not 0.

    `work` and its arguments are pickled. The processes never outlive this one, however it ends.
    """
    processes = [_SPAWN.Process(target=_help, args=(work, *arguments), daemon=True) for _ in range(count)]
    failed: list[int] = []
    try:
        for process in processes:
            process.start()
        yield failed
        for process in processes:
            process.join()
            if process.exitcode:
                failed.append(process.exitcode)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _help(work: Callable[..., None], *arguments: Any) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    work(*arguments)
