"""Several computations on a model that is read while it runs, which share every reading of its weights.

Alone, each of them would read all weights anew: an answer of sixteen tokens reads a model sixteen times, and one text
more does so again. Here each has a thread, of which one runs at a time, until it wants weights other than those in
place; those that want the same are next. Every computation is to the bit what it is alone.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Task(NamedTuple):
    """A computation, and about how many bytes it holds on to from its first weights to its last."""

    nbytes: int
    run: Callable[[], None]


class _Cancelled(BaseException):
    """Ends a task because another one has failed."""


class Turns:
    """Runs tasks, as many at a time as hold on to `most` bytes, and at least one; `blocks` of weights come in turn."""

    def __init__(self, tasks: Sequence[Task], most: int, blocks: int) -> None:
        self._tasks, self._most, self._blocks = tasks, most, blocks
        self._go = [threading.Semaphore(0) for _ in tasks]
        self._back = threading.Semaphore(0)
        self._wanted: dict[int, int] = {}  # by task, the block that it waits for
        self._numbers: dict[int, int] = {}  # of tasks by their thread
        self._live: dict[int, threading.Thread] = {}
        self._error: BaseException | None = None
        self._cancelled = False

    def wait(self, block: int) -> None:
        """Called by a task that wants a block which is not in place; returns when it may take it."""
        number = self._numbers[threading.get_ident()]
        self._wanted[number] = block
        self._back.release()
        self._go[number].acquire()
        if self._cancelled:
            raise _Cancelled

    def run(self) -> None:
        """Until all have ended; raises what the first one raises that fails, when no task is left."""
        enabled = torch.is_grad_enabled()
        waiting, held, at = list(range(len(self._tasks)))[::-1], 0, 0
        threads = []
        try:
            while waiting or self._live:
                if waiting and (not self._live or held + self._tasks[waiting[-1]].nbytes <= self._most):
                    number = waiting.pop()
                    held += self._tasks[number].nbytes
                    self._live[number] = threading.Thread(target=self._work, args=(number, enabled), daemon=True)
                    threads.append(self._live[number])
                    self._live[number].start()
                else:
                    number = min(self._wanted, key=lambda n: ((self._wanted[n] - at) % self._blocks, n))
                    at = self._wanted.pop(number)
                    self._go[number].release()
                self._back.acquire()
                if number not in self._live:
                    held -= self._tasks[number].nbytes
                if self._error is not None:
                    raise self._error
        finally:
            self._cancelled = True
            for go in self._go:
                go.release()
            for thread in threads:
                thread.join()

    def _work(self, number: int, enabled: bool) -> None:
        self._numbers[threading.get_ident()] = number
        try:
            with torch.set_grad_enabled(enabled):
                self._tasks[number].run()
        except _Cancelled:
            pass
        except BaseException as error:  # handed to whoever waits for the tasks
            self._error = self._error or error
        finally:
            del self._live[number]
            self._back.release()
