"""How many edits to optimise at once: as many as the memory at hand holds, and no out-of-memory error."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

from ..errors import ModelError
from .runner import Runner

# Share of the free memory that a batch may plan for; the estimate below is of the larger tensors only.
_SHARE = 0.5
# More positions than this at a time do not make the products of a CPU faster, and leave its caches.
_MOST_POSITIONS = {"cpu": 1024}
_ENOUGH_POSITIONS = 16_384
# What a step costs whatever a batch holds, in positions: the weights are read for few as for many. On a CPU measured: a
# product with M rows takes the time of M + 21, and all of a step some more. On a GPU from its ratio of arithmetic to
# bandwidth, not measured.
_FIXED_POSITIONS = {"cpu": 30.0, "cuda": 500.0}
# Most steps are taken on some of the rows only.
_SHARE_OF_ROWS = 0.5
# Requests that are looked at to find the next batch. On an H200, with 64 and 10 GiB, 11 edits of llama-2-7b ran at once
# and took 0.296 s each; 35 took 0.218; by the default rule 35 took 0.080 and 66 took 0.068.
_PLANNED = 256

# Of an edit's keys and values where slots are refilled: in two phases' slots, found ahead, and between the phases.
_COPIES = 4

# In a plain RuntimeError: of the CPU allocator, of the CUDA runtime, and of libraries that allocate for themselves.
_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


class Shaped(Protocol):
    """What is asked of a request: how many rows, `scored` of them with a target, and positions of the longest one.

    Those are counted before and from the subject's last token on; of those before, `middle` are its own and the others
    its contexts'.
    """

    @property
    def rows(self) -> Sequence[object]: ...
    @property
    def scored(self) -> int: ...
    @property
    def suffix(self) -> int: ...
    @property
    def before(self) -> int: ...
    @property
    def middle(self) -> int: ...


class BatchSizer:
    """Chooses batch sizes; a batch that does not fit after all is halved and tried again."""

    def __init__(self, runner: Runner, layer: int, *, whole: bool = False, apart: bool = False) -> None:
        """`whole`: rows are run from their first token on, and share no past; `apart`: it is read where it lies."""
        self.runner, self.layer, self.whole, self.apart = runner, layer, whole, apart
        self.layers = len(runner.layers) - layer - 1
        self.limit: int | None = None
        self._needed = 0  # bytes, of the batch chosen last
        self._just_failed = False

    def choose(self, waiting: Sequence[Shaped]) -> int:
        """How many of the waiting requests, in their order, to take into the next batch; at least one.

        All requests of a batch have the same number of rows with a target. Among the ways of parting the requests into
        such batches, the one that costs least is taken: large batches pad, small ones read the weights more often.
        """
        budget, planned = self._budget(), self._planned(waiting)
        fixed = _FIXED_POSITIONS.get(_kind(self.runner.device), _FIXED_POSITIONS["cpu"])
        costs = [0.0] * (len(planned) + 1)  # of all requests from a place on, at best
        sizes = [1] * len(planned)
        for place in reversed(range(len(planned))):
            costs[place] = math.inf
            for size, positions in enumerate(self._fitting(planned[place:], budget), 1):
                cost = fixed + _SHARE_OF_ROWS * positions + costs[place + size]
                if cost < costs[place]:
                    costs[place], sizes[place] = cost, size
        self._needed = self._bytes(planned[: sizes[0]])
        return sizes[0]

    def share(self, waiting: Sequence[Shaped]) -> tuple[int, int]:
        """How many of the waiting requests, in their order, are to take turns in the same slots, and in how many.

        Of the ways of parting the requests by their length, the one that costs least is taken, as by `choose`; but here
        slots are as many as fit at most, and are given to as many requests as there are.
        """
        budget, planned = self._budget(), self._planned(waiting)
        fixed = _FIXED_POSITIONS.get(_kind(self.runner.device), _FIXED_POSITIONS["cpu"])
        # Where the length changes, and the end.
        ends = [i for i in range(1, len(planned)) if planned[i].suffix != planned[i - 1].suffix] + [len(planned)]
        best = {len(planned): (0.0, 0, 0)}  # by the first request: cost of all from there on, count and slots
        for start in reversed([0, *ends[:-1]]):
            found = []
            for end in (end for end in ends if end > start):
                room, positions = self._room(planned[start:end], budget)
                cost = fixed * -(-(end - start) // room) + _SHARE_OF_ROWS * positions * (end - start)
                found.append((cost + best[end][0], end - start, room))
            best[start] = min(found)
        _, count, room = best[0]
        self._needed = self._bytes(planned[:count], copies=_COPIES) // count
        return count, room

    def fits(self, request: Shaped) -> bool:
        """Whether a request is not too large for a batch of its own."""
        return self._bytes([request]) <= self._budget()

    def _room(self, some: Sequence[Shaped], budget: float) -> tuple[int, int]:
        """How many slots for requests like these fit, as many as there are at most, and positions of one, padded."""
        suffix, before, middle = (max(getattr(r, name) for r in some) for name in ("suffix", "before", "middle"))
        rows = max(len(request.rows) for request in some)
        positions = rows * (before + suffix if self.whole else suffix)
        most = _MOST_POSITIONS.get(_kind(self.runner.device), _ENOUGH_POSITIONS)
        fit = min(budget / (rows * self._row_bytes(suffix, before, middle, _COPIES)), most / positions, len(some))
        return max(1, int(fit) if self.limit is None else min(int(fit), self.limit)), positions

    def _budget(self) -> float:
        """Bytes."""
        device, spare = self.runner.device, self.runner.spare_bytes
        if self._just_failed and device.type == "cuda":
            # Not where it failed: the tensors of the failed batch were still referred to by its error.
            torch.cuda.empty_cache()
        self._just_failed = False
        return _SHARE * free_memory(device) if spare is None else spare

    def _planned(self, waiting: Sequence[Shaped]) -> list[Shaped]:
        return [request for request in waiting[:_PLANNED] if request.scored == waiting[0].scored]

    def _fitting(self, waiting: Sequence[Shaped], budget: float) -> Iterator[int]:
        """Positions, padded, of a batch of the first request, of the first two and so on, as long as it fits."""
        most = _MOST_POSITIONS.get(_kind(self.runner.device), _ENOUGH_POSITIONS)
        rows = suffix = before = middle = 0
        for size, request in enumerate(waiting, 1):
            suffix, before = max(suffix, request.suffix), max(before, request.before)
            middle = max(middle, request.middle)
            rows += len(request.rows)
            needed = rows * self._row_bytes(suffix, before, middle)
            positions = rows * (before + suffix if self.whole else suffix)
            too_many = positions > most or needed > budget or (self.limit is not None and size > self.limit)
            if size > 1 and too_many:
                return
            yield positions

    def _bytes(self, batch: Sequence[Shaped], copies: int = 1) -> int:
        suffix, before, middle = (max(getattr(r, name) for r in batch) for name in ("suffix", "before", "middle"))
        return sum(len(request.rows) for request in batch) * self._row_bytes(suffix, before, middle, copies)

    @contextmanager
    def halving(self, size: int) -> Iterator[None]:
        """Swallow an out-of-memory error of the block, so that the caller tries again with half as many.

        Raises ModelError, saying what is needed, when a single edit does not fit.
        """
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                device = self.runner.device
                raise ModelError(
                    f"one edit does not fit: it wants about {self._needed / 2**30:.2f} GiB, and "
                    f"{free_memory(device) / 2**30:.2f} GiB are free ({str(error) or 'out of memory'}); free memory on "
                    f"{device}, use fewer contexts, or load the model in bfloat16"
                ) from error
            self.limit, self._just_failed = size // 2, True

    def _row_bytes(self, suffix: int, before: int, middle: int, copies: int = 1) -> int:
        """Activations kept for the backward pass, and attention keys and values with their working copies.

        Those of the row's own middle are there so many times.
        """
        if self.whole:
            suffix, before, middle = before + suffix, 0, 0
        config = self.runner.model.config.get_text_config()
        hidden, key_size = self.runner.weight(self.layer).shape
        heads = getattr(config, "num_attention_heads", None) or 1
        shared = getattr(config, "num_key_value_heads", None) or heads
        past = 2 * hidden * shared // heads
        # A layer sees the keys and values of all positions, and may repeat them for every head.
        # (What is planned for a streamed model does not know of `apart`, and must hold.)
        joined = suffix if self.apart and self.runner.spare_bytes is None else before + suffix
        running = suffix * (10 * hidden + 5 * key_size) + joined * (2 * hidden + 2 * past)
        size = self.runner.dtype.itemsize
        if self.runner.spare_bytes is None:
            return self.layers * size * (running + copies * middle * past)
        # Of a streamed model the input of every layer is kept and the past; more only of the layer that runs.
        return size * (running + self.layers * (suffix * hidden + middle * past))


def in_order(group: Sequence[Shaped]) -> list[int]:
    """Places in the group, so that requests of like shape, which share a batch with little padding, are neighbours."""
    return sorted(range(len(group)), key=lambda i: (group[i].scored, group[i].suffix, group[i].before))


def in_turn(sizer: BatchSizer, group: Sequence[Shaped]) -> Iterator[tuple[list[int], int]]:
    """Places in the group of requests that take turns in the same slots, and how many of these there are.

    What `halving` found too many comes again, with fewer slots.
    """
    order = in_order(group)
    start = 0
    while start < len(order):
        count, room = sizer.share([group[i] for i in order[start:]])
        yield order[start : start + count], room
        if sizer.limit is None or room <= sizer.limit:
            start += count


def in_batches(sizer: BatchSizer, group: Sequence[Shaped]) -> Iterator[list[int]]:
    """Places in the group, batch by batch; a batch that `halving` found too large comes again, smaller."""
    order = in_order(group)
    start = 0
    while start < len(order):
        size = sizer.choose([group[i] for i in order[start:]])
        yield order[start : start + size]
        if sizer.limit is None or size <= sizer.limit:
            start += size


@contextmanager
def standing_for(kind: str, free: int) -> Iterator[None]:
    """In this block, the meta device stands for one of another kind, with so many bytes free."""
    token = _STOOD_FOR.set((kind, free))
    try:
        yield
    finally:
        _STOOD_FOR.reset(token)


_STOOD_FOR = ContextVar("stood_for", default=("meta", 0))


def _kind(device: torch.device) -> str:
    return _STOOD_FOR.get()[0] if device.type == "meta" else device.type


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device, what torch holds in reserve included."""
    if device.type == "meta":
        return _STOOD_FOR.get()[1]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: half of the physical memory is the best guess
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which torch and its libraries say in several ways, some of them a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _SIGNS)
