"""Where the library is faster than our kernels, as measured once for each architecture.

Milliseconds of an NVIDIA H200 (torch 2.11.0+cu130, triton 3.6.0, commit a54236d, 2026-11-28), from
`benchmarks/results/gpu_ops.csv`: ours, and those of the library's way to the same promise, in `library.py`. What is not
measured is decided as the measured size that is nearest to it by ratio; an architecture that is not here takes our
kernels.

Not here: `rank_update_` of several ranks, where `addmm_` takes 0.8 times as long once the factors have been rounded to
the weight's dtype, which is not what the op promises and was not counted; `prefixed_solve` of several edits, which is
the library's anyhow but for the means.
"""

import math
from typing import NamedTuple


class Milliseconds(NamedTuple):
    """Of one call, by both."""

    ours: float
    library: float


# By compute capability, op and size: d of a second moment of 16-bit rows, d_ff of the others.
MEASURED: dict[int, dict[str, dict[int, Milliseconds]]] = {
    90: {
        # 16,384 rows
        "second_moment_": {
            1536: Milliseconds(0.2054, 0.1164),
            4096: Milliseconds(0.6564, 0.7144),
            11008: Milliseconds(3.299, 5.262),
            14336: Milliseconds(5.182, 8.919),
        },
        # one edit, with the inverse in fp32
        "prefixed_solve": {
            1536: Milliseconds(0.0939, 0.0205),
            4096: Milliseconds(0.0351, 0.0353),
            11008: Milliseconds(0.1351, 0.1518),
            14336: Milliseconds(0.2135, 0.2210),
        },
        # 64 edits in bf16, 4096 rows; hidden sizes 576 and 4096
        "low_rank_apply_": {
            1536: Milliseconds(0.1331, 0.0675),
            4096: Milliseconds(0.0256, 0.1727),
            11008: Milliseconds(0.1207, 0.3837),
            14336: Milliseconds(0.0535, 0.4419),
        },
    }
}


def library_is_faster(op: str, size: int, architecture: int) -> bool:
    """Whether an op of this size is left to the library on an architecture (`configs.architecture`)."""
    sizes = MEASURED.get(architecture, {}).get(op, {})
    if not sizes or size < 1:
        return False
    nearest = sizes[min(sizes, key=lambda known: abs(math.log(known / size)))]
    return nearest.library < nearest.ours
