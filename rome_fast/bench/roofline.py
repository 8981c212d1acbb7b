"""The two rates that bound every figure, measured where and when the figure is: matrix products and copies."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

_MATRIX_SIZE = {"cuda": 8192}
_SMALL_MATRIX = 512  # some CPUs have no instruction for bf16 products and take a second for 1024
_COPY_BYTES = {"cuda": 4 << 30}
_SMALL_COPY = 128 << 20  # beyond the caches of a CPU


@dataclass(frozen=True)
class Roofline:
    """What a device does at best, with the sizes it was measured at."""

    matrix_rate: float  # FLOP/s of a square product of random matrices
    matrix_size: int
    matrix_dtype: str
    copy_bandwidth: float  # bytes/s read and written by a copy
    copy_bytes: int  # of the source

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """The least time that so much work takes."""
        return max(flops / self.matrix_rate, moved_bytes / self.copy_bandwidth)

    def to_json(self) -> dict[str, float | int | str]:
        return asdict(self)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Both rates: medians of several runs on random data; 8 GiB and a second on a GPU."""
    size = _MATRIX_SIZE.get(device.type, _SMALL_MATRIX)
    copied = _COPY_BYTES.get(device.type, _SMALL_COPY)
    name = str(dtype).removeprefix("torch.")
    return Roofline(matrix_rate(device, dtype, size), size, name, copy_bandwidth(device, copied), copied)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices."""
    generator = torch.Generator(device).manual_seed(0)
    # Zeros would run faster: they switch fewer transistors, and the clock stays up.
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=product), device)


def copy_bandwidth(device: torch.device, copied: int) -> float:
    """Bytes/s, read and written, of a copy of `copied` bytes."""
    source = torch.randn(copied // 4, device=device, generator=torch.Generator(device).manual_seed(0))
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 7, budget: float = 1.0) -> float:
    """Seconds of one run, the median of up to `repeats` runs in `budget` seconds after one that does not count.

    On a GPU it is the GPU's own time.
    """
    _once(run, device)
    times = [_once(run, device)]
    while len(times) < repeats and sum(times) < budget:
        times.append(_once(run, device))
    return statistics.median(times)


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        run()
        stop_event.record()
        stop_event.synchronize()
    return start_event.elapsed_time(stop_event) / 1e3
