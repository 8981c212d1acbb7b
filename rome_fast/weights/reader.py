"""Reading blocks of weights ahead of their use, by a thread of its own, into one reused buffer."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import os_errors
from .header import Header
from .plan import ALIGNMENT, Block, Part, Piece

OnRead = Callable[[int, float], None]
"""Called with (bytes read so far, bytes per second of reading), from the reading thread."""

_STAGING_BYTES = 16 << 20  # of a slot from which copies are made
_TIMED_BYTES = 1 << 20  # least of what a copy is timed on
# What is in the system's cache is copied faster by two threads than by one; a GPU takes it in faster than two copy it.
_READERS, _STAGING_READERS, _PART_BYTES = 2, 8, 16 << 20
_MAX_VECTORS = 1024  # IOV_MAX of Linux


class Files:
    """The shards of a checkpoint, open for reading; they stay what they were even if their names are replaced."""

    def __init__(self, headers: Iterable[Header]) -> None:
        self._descriptors: dict[Path, int] = {}
        try:
            for header in headers:
                self._open(header)
        except BaseException:
            self.close()
            raise

    def _open(self, header: Header) -> None:
        with os_errors(f"opening {header.path}"):
            descriptor = self._descriptors[header.path] = os.open(header.path, os.O_RDONLY)
            wanted = header.data_start + max((entry.end for entry in header.tensors.values()), default=0)
            if os.fstat(descriptor).st_size != wanted:
                raise CheckpointError(f"{header.path}: it changed after it was opened; run again")

    def read(self, header: Header, begin: int, targets: Sequence[memoryview]) -> None:
        """Fill the targets, one after the other, from byte `begin` of the data on; raises CheckpointError."""
        position = header.data_start + begin
        waiting = deque(target for target in targets if len(target))
        with os_errors(f"reading {header.path}"):
            while waiting:
                some = [waiting[i] for i in range(min(len(waiting), _MAX_VECTORS))]
                got = os.preadv(self._descriptors[header.path], some, position)
                if not got:
                    raise CheckpointError(f"{header.path}: it ends at byte {position:,}; it was cut after opening")
                position += got
                while got:
                    first = waiting.popleft()
                    if got < len(first):
                        waiting.appendleft(first[got:])
                        break
                    got -= len(first)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def view(memory: Tensor, piece: Piece) -> Tensor:
    """The tensor of a piece in the memory (bytes) of its block.

    It has a version counter of its own, as what `.data` gives does. The counter that views share rises whenever another
    block is copied into the same memory, and autograd would take a weight for changed that is not.
    """
    return memory[piece.offset : piece.offset + piece.nbytes].view(piece.dtype).reshape(piece.shape).data


def buffer_on(device: torch.device, size: int) -> Tensor:
    """(size,) uint8 that begins at an aligned address."""
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


class Transfers:
    """Copies from the host to a GPU on a stream of their own, and all the ways in which they and others wait.

    Nothing but these methods orders the two streams and the host, so that a test can put other queues in their place.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def staging(self, size: int) -> Tensor:
        """(size,) uint8 on the host, from where a copy is made while the host goes on."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; until it is done the source must stay as it is."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Any:
        """The end of the copies queued so far."""
        return self._stream.record_event()

    def computed(self) -> Any:
        """The end of the work that this thread has queued so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy_after(self, event: Any) -> None:
        """Have copies that are queued from now on wait."""
        self._stream.wait_event(event)

    def compute_after(self, event: Any) -> None:
        """Have the work that this thread queues from now on wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def wait(self, event: Any) -> None:
        """Have the host wait."""
        event.synchronize()


def transfers_to(device: torch.device) -> Transfers | None:
    """What a device needs to be filled; None where files are read right into its memory."""
    return Transfers(device) if device.type == "cuda" else None


class Loader:
    """Moves blocks from files to a device.

    On their way to a GPU, several threads read parts of a block into slots of pinned memory, two for each, and queue
    the copies; a slot is read into again once the copies from it have ended. Slots as large as a layer were ruled out:
    small ones stay in the processor's cache (from the system's cache, by two threads on two busy cores of an AMD EPYC:
    15 to 16 GB/s into slots of 16 MiB, 9 to 13 into two of 270 MB).
    """

    def __init__(self, files: Files, device: torch.device) -> None:
        self.files, self.device = files, device
        self.transfers = transfers_to(device)
        readers = _READERS
        # In turn; each with the end of the copies that were made from it last.
        self._slots: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        if self.transfers is not None:
            readers = max(_READERS, min(_STAGING_READERS, len(os.sched_getaffinity(0))))
            for _ in range(2 * readers):
                self._slots.put((self.transfers.staging(_STAGING_BYTES), None))
        self._readers = ThreadPoolExecutor(readers, "rome-fast-part")
        self.rates = Rates(readers)

    def load(self, block: Block) -> Tensor:
        """New memory (bytes on the device) that holds a block as soon as `finish` returns."""
        memory = buffer_on(self.device, block.size)
        if self.transfers is not None:
            # Work that is still queued may have given this memory back.
            self.transfers.copy_after(self.transfers.computed())
        self.fill(memory, block)
        return memory

    def fill(self, memory: Tensor, block: Block) -> None:
        """Read a block into its memory (bytes on the device); with `transfers` the last copies are still under way."""
        parts = list(_all_parts(block, min(_PART_BYTES, _STAGING_BYTES)))
        # All of them are waited for, also behind one that fails: the memory may be used for something else then.
        done, _ = wait([self._readers.submit(self._fill, memory, part) for part in parts])
        for each in done:
            each.result()
        if self.transfers is not None and not self.rates.copied_bytes and block.size >= _TIMED_BYTES:
            self._time_copy(self.transfers, memory, max(parts, key=lambda part: part.size))

    def _fill(self, memory: Tensor, part: "_FilePart") -> None:
        """In a thread of the pool."""
        if self.transfers is not None:
            self._stage(self.transfers, memory, part)
            return
        start, raw = time.perf_counter(), memory.numpy().data
        self.files.read(part.header, part.begin, [raw[place] for place in part.places])
        self.rates.read(part.size, time.perf_counter() - start)

    def finish(self) -> None:
        """Wait until every copy is made."""
        if self.transfers is not None:
            self.transfers.wait(self.transfers.copied())

    def close(self) -> None:
        """End the threads, once every copy is made."""
        self._readers.shutdown()
        self.finish()

    def _stage(self, transfers: Transfers, memory: Tensor, part: "_FilePart") -> None:
        """Read a part into the slot whose turn it is, and queue the copies of it."""
        slot, copied = self._slots.get()
        try:
            if copied is not None:
                transfers.wait(copied)
            start = time.perf_counter()
            self.files.read(part.header, part.begin, [slot.numpy().data[: part.size]])
            self.rates.read(part.size, time.perf_counter() - start)
            self._copy(transfers, memory, part, slot)
        finally:
            self._slots.put((slot, transfers.copied()))

    def _copy(self, transfers: Transfers, memory: Tensor, part: "_FilePart", slot: Tensor) -> None:
        at = 0
        for place in part.places:
            count = place.stop - place.start
            transfers.copy(memory[place], slot[at : at + count])
            at += count

    def _time_copy(self, transfers: Transfers, memory: Tensor, part: "_FilePart") -> None:
        """Read and copy a part once more by itself, with nothing else under way, which takes some milliseconds."""
        slot, _ = self._slots.get()
        try:
            transfers.wait(transfers.copied())
            self.files.read(part.header, part.begin, [slot.numpy().data[: part.size]])
            start = time.perf_counter()
            self._copy(transfers, memory, part, slot)
            transfers.wait(transfers.copied())
            self.rates.copied_bytes, self.rates.seconds_copying = part.size, time.perf_counter() - start
        finally:
            self._slots.put((slot, transfers.copied()))


class Rates:
    """How fast a loader's source and its copies are, each by itself."""

    def __init__(self, threads: int) -> None:
        self.threads = threads  # that read
        self.read_bytes = 0
        self.seconds_reading = 0.0  # of all threads together
        self.copied_bytes = 0  # in a copy that was timed; none where nothing is copied
        self.seconds_copying = 0.0
        self._lock = threading.Lock()

    def read(self, size: int, seconds: float) -> None:
        """Add what a thread has read."""
        with self._lock:
            self.read_bytes += size
            self.seconds_reading += seconds

    @property
    def reading(self) -> float | None:
        """Bytes per second that the threads get from the files, be they on a disk or in the system's cache."""
        return self.threads * self.read_bytes / self.seconds_reading if self.seconds_reading else None

    @property
    def copying(self) -> float | None:
        """Bytes per second of copies from pinned memory."""
        return self.copied_bytes / self.seconds_copying if self.seconds_copying else None


@dataclass
class _Loaded:
    block: Block
    memory: Tensor
    begin: int
    ready: bool = False
    error: BaseException | None = None
    copied: Any = None  # the end of the copies that bring it, where it is copied


class ReadAhead:
    """Hands out blocks in the order announced by `expect`, read while the one before is in use.

    The buffer is a ring: blocks are placed behind one another, and a block gives its place back when the next one is
    taken. Taking a block that is not the expected one is right as well, and costs a wait.
    """

    def __init__(self, loader: Loader, size: int, on_read: OnRead | None = None) -> None:
        self._loader, self._size, self._on_read = loader, size, on_read
        self._ring = buffer_on(loader.device, size)
        self._state = threading.Condition()
        # In order of use, the one in use first. What is dropped while it is being read needs no care: the thread
        # places nothing before it has finished.
        self._loaded: deque[_Loaded] = deque()
        self._taken: _Loaded | None = None
        self._order: Iterator[Block] = iter(())
        self._next: Block | None = None
        # Copies wait for what may still use the place of the block they overwrite: at first, whose memory the ring was.
        self._free = loader.transfers.computed() if loader.transfers is not None else None
        self._closed = False
        self.bytes_read = 0
        self.seconds_reading = 0.0
        self.seconds_waited = 0.0
        self._thread = threading.Thread(target=self._work, name="rome-fast-reader", daemon=True)
        self._thread.start()

    def expect(self, order: Iterable[Block]) -> None:
        """Say which blocks will be taken from now on; what is read already and still expected is kept."""
        with self._state:
            order = iter(order)
            following = next(order, None)
            kept: deque[_Loaded] = deque()
            if self._taken is not None:
                kept.append(self._loaded.popleft())
                if following is self._taken.block:
                    following = next(order, None)
            while self._loaded and self._loaded[0].block is following and self._loaded[0].error is None:
                kept.append(self._loaded.popleft())
                following = next(order, None)
            self._loaded = kept
            self._next, self._order = following, order
            self._state.notify_all()

    def take(self, block: Block, then: Callable[[], Iterable[Block]]) -> Tensor:
        """The memory (bytes) of a block, valid until another is taken. Raises CheckpointError where reading fails.

        `then()` are the blocks to expect behind it where it was not expected itself.
        """
        start, transfers = time.perf_counter(), self._loader.transfers
        with self._state:
            while self._loaded and self._loaded[0].block is not block:
                self._loaded.popleft()
            if transfers is not None:
                # What was used until now may be overwritten once the work queued so far is done.
                self._free = transfers.computed()
            if not self._loaded and self._next is not block:
                self._next, self._order = block, iter(then())
            self._taken = None
            self._state.notify_all()
            while not self._loaded or not self._loaded[0].ready:
                self._state.wait()
            first = self._loaded[0]
            if first.error is not None:
                self._loaded.clear()
                self._next = None
                raise first.error
            self._taken = first
            self.seconds_waited += time.perf_counter() - start
        if transfers is not None:
            transfers.compute_after(first.copied)
        return first.memory

    def close(self) -> None:
        """End the thread; the buffer is free once nothing refers to what was taken."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join()
        # What was read ahead may still be on its way into memory that others get now.
        self._loader.finish()
        self._loaded.clear()
        self._taken = None
        self._ring = self._ring.new_empty(0)

    def _place(self, size: int) -> int | None:
        """Where in the ring there is room for `size` bytes behind the last block."""
        if not self._loaded:
            return 0
        oldest = self._loaded[0].begin
        last = self._loaded[-1]
        end = last.begin + last.block.size
        if end > oldest:
            if end + size <= self._size:
                return end
            return 0 if size <= oldest else None
        return end if end + size <= oldest else None

    def _work(self) -> None:
        transfers = self._loader.transfers
        while True:
            with self._state:
                while not self._closed and (self._next is None or self._place(self._next.size) is None):
                    self._state.wait()
                if self._closed or self._next is None:
                    return
                begin = self._place(self._next.size) or 0
                block = self._next
                loaded = _Loaded(block, self._ring[begin : begin + block.size], begin)
                self._loaded.append(loaded)
                self._next = next(self._order, None)
                free = self._free
            start = time.perf_counter()
            try:
                if transfers is not None:
                    transfers.copy_after(free)
                self._loader.fill(loaded.memory, block)
                if transfers is not None:
                    loaded.copied = transfers.copied()
                self.bytes_read += block.size
                self.seconds_reading += time.perf_counter() - start
                if self._on_read is not None:
                    self._on_read(self.bytes_read, self.bytes_read / self.seconds_reading)
            except BaseException as error:  # raised again in the thread that waits for the block
                loaded.error = error
            with self._state:
                loaded.ready = True
                self._state.notify_all()


class _FilePart(NamedTuple):
    """Bytes that follow one another in a file, and where in the memory of their block they belong."""

    header: Header
    begin: int  # in the data of the file
    places: tuple[slice, ...]

    @property
    def size(self) -> int:
        return sum(place.stop - place.start for place in self.places)


def _all_parts(block: Block, most: int) -> Iterator[_FilePart]:
    """What to read of a block, at most so many bytes at a time."""
    for header, pieces in _runs(block.parts):
        yield from _parts(header, pieces, most)


def _parts(header: Header, pieces: Sequence[Part], most: int) -> Iterator[_FilePart]:
    """What to read at a time of a run of pieces."""
    places: list[slice] = []
    begin = at = pieces[0].entry.begin
    for piece in pieces:
        start, stop = piece.offset, piece.offset + piece.entry.end - piece.entry.begin
        while stop - start > (room := begin + most - at):
            yield _FilePart(header, begin, (*places, slice(start, start + room)))
            places, start, begin = [], start + room, begin + most
            at = begin
        places.append(slice(start, stop))
        at += stop - start
    yield _FilePart(header, begin, tuple(places))


def _runs(pieces: Sequence[Part]) -> Iterator[tuple[Header, list[Part]]]:
    """Pieces that follow one another without a gap in one file."""
    run: list[Part] = []
    for piece in pieces:
        if run and (run[-1].header is not piece.header or run[-1].entry.end != piece.entry.begin):
            yield run[0].header, run
            run = []
        run.append(piece)
    if run:
        yield run[0].header, run
