"""How many edits to optimise at once: as many as the memory at hand holds, and no out-of-memory error."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from .errors import ModelError
from .runner import Runner

# Share of the free memory that a batch may plan for; the estimate below is of the larger tensors only.
_SHARE = 0.5
# More positions than this at a time do not make the products of a CPU faster, and leave its caches.
_MOST_POSITIONS = {"cpu": 1024}
_ENOUGH_POSITIONS = 16_384
# Share of the positions that may be padding.
_MOST_PADDING = 0.1


class Shaped(Protocol):
    """What is asked of a request: how many rows, and positions before and from the subject's last token on.

    Of those before, `middle` are its own and the others its contexts'.
    """

    @property
    def rows(self) -> Sequence[object]: ...
    @property
    def suffix(self) -> int: ...
    @property
    def before(self) -> int: ...
    @property
    def middle(self) -> int: ...


class BatchSizer:
    """Chooses batch sizes; a batch that does not fit after all is halved and tried again."""

    def __init__(self, runner: Runner, layer: int) -> None:
        self.runner = runner
        self.layers = len(runner.layers) - layer - 1
        self.limit: int | None = None

    def choose(self, waiting: Sequence[Shaped]) -> int:
        """How many of the waiting requests, in their order, to take into the next batch; at least one.

        All requests of a batch have the same number of rows.
        """
        spare = self.runner.spare_bytes
        budget = _SHARE * free_memory(self.runner.device) if spare is None else spare
        most = _MOST_POSITIONS.get(self.runner.device.type, _ENOUGH_POSITIONS)
        size, suffix, before, middle, used = 0, 0, 0, 0, 0
        for request in waiting:
            suffix, before = max(suffix, request.suffix), max(before, request.before)
            middle = max(middle, request.middle)
            used += request.suffix
            rows = (size + 1) * len(request.rows)
            padded = used < (1 - _MOST_PADDING) * (size + 1) * suffix
            other = len(request.rows) != len(waiting[0].rows)
            needed = rows * self._row_bytes(suffix, before, middle)
            if size and (other or padded or rows * suffix > most or needed > budget):
                break
            size += 1
        return size if self.limit is None else min(size, self.limit)

    @contextmanager
    def halving(self, size: int) -> Iterator[None]:
        """Swallow an out-of-memory error of the block, so that the caller tries again with half as many.

        Raises ModelError, saying what is needed, when a single edit does not fit.
        """
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if size == 1:
                raise ModelError(
                    f"one edit does not fit: {error}; free memory on {self.runner.device}, use fewer contexts, or load "
                    "the model in bfloat16"
                ) from error
            self.limit = size // 2
        if self.runner.device.type == "cuda" and self.limit is not None:
            torch.cuda.empty_cache()

    def _row_bytes(self, suffix: int, before: int, middle: int) -> int:
        """Activations kept for the backward pass, and attention keys and values with their working copies."""
        config = self.runner.model.config
        hidden, key_size = self.runner.weight(0).shape
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        past = 2 * hidden * shared // heads
        # A layer sees the keys and values of all positions, and may repeat them for every head.
        running = suffix * (10 * hidden + 5 * key_size) + (before + suffix) * (2 * hidden + 2 * past)
        size = self.runner.dtype.itemsize
        if self.runner.spare_bytes is None:
            return self.layers * size * (running + middle * past)
        # Of a streamed model the input of every layer is kept and the past; more only of the layer that runs.
        return size * (running + self.layers * (suffix * hidden + middle * past))


def in_batches(sizer: BatchSizer, group: Sequence[Shaped]) -> Iterator[list[int]]:
    """Places in the group, batch by batch; a batch that `halving` found too large comes again, smaller."""
    # Requests of like shape share a batch with little padding.
    order = sorted(range(len(group)), key=lambda i: (len(group[i].rows), group[i].suffix, group[i].before))
    start = 0
    while start < len(order):
        size = sizer.choose([group[i] for i in order[start:]])
        yield order[start : start + size]
        if sizer.limit is None or size <= sizer.limit:
            start += size


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device, what torch holds in reserve included."""
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


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
