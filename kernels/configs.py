"""Fixed tile sizes per architecture; nothing is tuned when a user calls an op.

An architecture is named by its compute capability (80, 90, 100); every other GPU from 8.0 on takes the entry
`OTHER`, whose tiles fit the smallest shared memory among them (99 KiB).
"""

from dataclasses import dataclass

import torch

OTHER = 0
PROCESSORS = {80: 108, 90: 132, 100: 148, OTHER: 84}
"""Multiprocessors of the largest common part. A constant, so that the split of a sum never depends on the machine."""


@dataclass(frozen=True)
class Tile:
    """One block of XᵀX: `rows` x `columns` of the result, `tokens` rows of X per step."""

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int
    descriptors: bool  # load through tensor descriptors (the bulk copy engine of sm_90 and later)


SECOND_MOMENT = {
    80: Tile(128, 256, 32, warps=8, stages=4, descriptors=False),
    90: Tile(128, 256, 64, warps=8, stages=4, descriptors=True),
    100: Tile(128, 256, 64, warps=8, stages=4, descriptors=True),
    OTHER: Tile(64, 64, 64, warps=4, stages=3, descriptors=False),
}
"""For every dtype: what is not 16 bit is split into 16-bit pieces first."""

SUPER_TILE = 1024
"""Edge of the square group of tiles that run one after another and so share their columns of X in the L2 cache."""

CHAIN_TOKENS = 8192
"""Longest run of tokens summed in one fp32 accumulator; longer inputs become several partial sums."""

SPLIT_TOKENS = 512
"""Shortest run of tokens worth a partial sum of its own."""

WORKSPACE_BYTES = 1 << 30
"""Soft limit for each of the two workspaces of a second moment; more tokens mean more launches, not more memory."""

# The other ops are bound by bandwidth: the tile only has to keep enough loads in flight, on any architecture.
ADD_BLOCK = (8, 256)
PREPARE_BLOCK = (8, 256)
RANK_UPDATE_BLOCK = (16, 512)
RANK_CHUNKS = (1, 4)
MEAN_BLOCK = 512
INVERSE_BLOCK = (8, 1024)
LOW_RANK_BLOCK = 1024
LOW_RANK_PROGRAMS = 512

# A suffix is a few queries behind some tens of keys: the tiles are as small as the matrix unit takes them.
SUFFIX_KEYS = 16
SUFFIX_TILE_BYTES = 4096
"""Of a tile of queries, unless it takes more for 16 of them."""
SUFFIX_HEAD_BYTES = 512
"""Largest head, padded to a power of two, that does not spill; above half of that with twice the warps."""


# Between the products of a layer: what a program takes at once, in elements.
NORM_WIDTH = 16384
"""Widest row that one program takes."""
ROTATED_BLOCK = 1024
GATED_BLOCK = 1024

# Of a row of logits, and of that of an edit's state, at a time.
LOGITS_BLOCK = 4096
STATE_BLOCK = 2048


def architecture(device: torch.device) -> int:
    """The key of `SECOND_MOMENT` for a device; OTHER for a CPU, where only the interpreter runs."""
    if device.type != "cuda":
        return OTHER
    major, minor = torch.cuda.get_device_capability(device)
    if major == 10:
        return 100
    capability = 10 * major + minor
    return capability if capability in SECOND_MOMENT else OTHER
