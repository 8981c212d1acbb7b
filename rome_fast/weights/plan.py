"""Which weights stay in memory under a budget, and which are read from the checkpoint each time they are needed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import ArgumentError
from .header import Header, TensorEntry

# torch aligns its own tensors so, and the results of some CPU kernels depend on it.
ALIGNMENT = 64
# Share of the budget that hidden states, attention keys and values and the gradients of one layer may take.
_ACTIVATIONS = 8
# They may take as much in any case: a small batch is not worth splitting, and splitting it changes the rounding.
_LEAST_ACTIVATIONS = 128 << 20

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(memory: int | str) -> int:
    """A number of bytes from 8589934592, "8GiB", "8 GB" or "500MB"; raises ArgumentError."""
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", memory) if isinstance(memory, str) else None
    if match is None or match[2].lower() not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2].lower()])):
        raise ArgumentError(f"memory: got {memory!r}, wanted a number of bytes such as '8GiB', '500MB' or 8589934592")
    return size


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Part:
    """One tensor of the files: where it lies in its file, and where in memory."""

    header: Header
    entry: TensorEntry
    offset: int


@dataclass(frozen=True, eq=False)
class Piece:
    """One parameter, most often a single tensor of the files: of what it is made, and where it lies in memory."""

    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.entry.end - part.entry.begin for part in self.parts)

    def moved(self, offset: int) -> "Piece":
        """The same elsewhere in memory."""
        parts = tuple(replace(part, offset=part.offset - self.offset + offset) for part in self.parts)
        return replace(self, parts=parts, offset=offset)


@dataclass(frozen=True, eq=False)
class Block:
    """Weights that are needed at the same time and read together: those of a layer, or of the head."""

    name: str
    pieces: tuple[Piece, ...]
    parts: tuple[Part, ...]  # of all of them, in the order of the files

    @classmethod
    def of(cls, name: str, found: Sequence[Piece]) -> "Block":
        def place(part: Part) -> tuple[str, int]:
            return str(part.header.path), part.entry.begin

        offset, pieces = 0, []
        for piece in sorted(found, key=lambda piece: min(map(place, piece.parts))):
            pieces.append(piece.moved(offset))
            offset += aligned(piece.nbytes)
        parts = sorted((part for piece in pieces for part in piece.parts), key=place)
        return cls(name, tuple(pieces), tuple(parts))

    @property
    def size(self) -> int:
        """Bytes in memory, gaps for alignment included."""
        return sum(aligned(piece.nbytes) for piece in self.pieces)


@dataclass(frozen=True)
class Placement:
    """Where the blocks are while a model is edited."""

    resident: frozenset[int]  # indices of layers; the index after the last layer is the head
    buffer_bytes: int  # read-ahead buffer of the other blocks
    activation_bytes: int
    budget_bytes: int


def place(
    blocks: Sequence[Block], layer: int, budget: int, always: int, occupied: int, *, above: bool = True
) -> Placement:
    """Share `budget` bytes out; `blocks` are the layers and, last, the head; `layer` is the edit layer.

    Without `above`, what is above that layer is run once only, to check the model, and none of it is kept.

    `always` bytes of weights stay in memory, and the largest block must fit beside them. What else there is (the
    process itself, statistics, hidden states) is taken off the budget as far as that only costs resident layers:
    `occupied` bytes and an eighth. Layers above the edit layer stay first, because they are needed twice a step.
    Raises ArgumentError, naming the least that is enough, where one block does not fit.
    """
    activations = budget // _ACTIVATIONS
    largest = max(blocks, key=lambda block: block.size)
    if always + largest.size > budget:
        raise ArgumentError(
            f"memory: got {budget:,} bytes, wanted at least {always + largest.size:,}: {largest.name}, the "
            "largest part of the model, is used as a whole"
        )
    room = budget - always
    head = len(blocks) - 1
    options = []
    for kept in ([], [head]) if above else ([],):
        streamed = [block.size for index, block in enumerate(blocks) if index not in kept]
        buffer = min(max(max(streamed), 2 * max(b.size for b in blocks[:head])), room)
        left = room - buffer - sum(blocks[index].size for index in kept)
        if left < 0:
            continue
        left = max(0, left - activations - occupied)
        resident = set(kept)
        for group in (range(layer + 1, head if above else layer + 1), range(layer + 1)):
            fitting = 0
            sizes = [blocks[index].size for index in group]
            while fitting < len(sizes) and sum(sizes[: fitting + 1]) <= left:
                fitting += 1
            # Evenly spread, so that reading goes on while resident layers run.
            chosen = [group[i * len(sizes) // fitting] for i in range(fitting)] if fitting else []
            while sum(blocks[index].size for index in chosen) > left:
                chosen.pop()
            resident.update(chosen)
            left -= sum(blocks[index].size for index in chosen)
        # One step of a value goes forward and backward through the layers above, and once through the head.
        step = 2 * sum(blocks[i].size for i in range(layer + 1, head) if i not in resident)
        step += 0 if head in resident else blocks[head].size
        options.append((step, Placement(frozenset(resident), buffer, max(activations, _LEAST_ACTIVATIONS), budget)))
    return min(options, key=lambda option: option[0])[1]
