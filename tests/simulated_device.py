"""A device in the host's memory whose copies or computation run behind the host, as late as they are allowed to."""

import threading
from collections.abc import Callable
from typing import Literal

import torch


class Queue:
    """What is queued runs in its order: at once, or where it is `late`, when something waits for it."""

    def __init__(self, *, late: bool) -> None:
        self.late, self.queued, self.done = late, [], 0

    def add(self, work: Callable[[], None]) -> None:
        self.queued.append(work)
        if not self.late:
            self.run(len(self.queued))

    def run(self, stop: int) -> None:
        while self.done < stop:
            self.done += 1
            self.queued[self.done - 1]()


Event = tuple[Queue, int]


class Simulated:
    """In place of `rome_fast.weights.reader.Transfers`.

    With late copies, whoever does not wait for one sees old bytes, and a source that is changed meanwhile brings wrong
    ones. With late work, a copy that does not wait for it overwrites what it has still to see. A method named in
    `forgets` does nothing, to show that it would be missed.
    """

    def __init__(self, late: Literal["copies", "work"], forgets: str | None = None) -> None:
        self.copies, self.work = Queue(late=late == "copies"), Queue(late=late == "work")
        self.forgets = forgets
        self.lock = threading.RLock()

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self.lock:
            self.copies.add(lambda: target.copy_(source))

    def compute(self, work: Callable[[], None]) -> None:
        """Queue something that uses the device's memory."""
        with self.lock:
            self.work.add(work)

    def copied(self) -> Event:
        with self.lock:
            return self.copies, len(self.copies.queued)

    def computed(self) -> Event:
        with self.lock:
            return self.work, len(self.work.queued)

    def copy_after(self, event: Event) -> None:
        self._order("copy_after", self.copies, event)

    def compute_after(self, event: Event) -> None:
        self._order("compute_after", self.work, event)

    def wait(self, event: Event) -> None:
        queue, stop = event
        with self.lock:
            if self.forgets != "wait":
                queue.run(stop)

    def _order(self, name: str, queue: Queue, event: Event) -> None:
        other, stop = event
        with self.lock:
            if self.forgets != name:
                queue.add(lambda: other.run(stop))
