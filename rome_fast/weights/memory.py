"""What this process holds of the machine's memory, and how it lets go of it."""

import ctypes
from collections.abc import Callable
from functools import cache


def anonymous_bytes() -> int:
    """What this process holds by now; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0


def give_back() -> None:
    """Return what is free between tensors in use to the system.

    The allocator of glibc keeps it, and cannot use it for a tensor that is larger than a hole: each layer leaves some
    of its keys, values and hidden states behind, in what was room for the next layer. Elsewhere this does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
