"""What a long run will take, said before it starts: FLOPs by formula, and how many a second this machine does."""

import time
from datetime import timedelta

import torch

from ..models.runner import Runner, evaluating

_ROWS, _TIME = 8, 32  # of the pass that is timed
_REPEATS = 3


def layer_flops(runner: Runner) -> float:
    """Of one token through one layer, the mean over layers: 2 per weight, attention's scores not counted."""
    sizes = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in runner.layers]
    return 2 * sum(sizes) / len(sizes)


@torch.no_grad()
def flops_per_second(runner: Runner) -> float:
    """Measured on a short pass through all layers, the fastest of three: others may have to read, or share a core."""
    ids = torch.zeros(_ROWS, _TIME, dtype=torch.int64, device=runner.device)
    seconds = []
    with evaluating(runner.model):
        hidden = runner.embed(ids)
        for _ in range(_REPEATS):
            start = time.perf_counter()
            # Its last number is asked for, so that a GPU has done its work.
            float(runner.run(hidden, 0, len(runner.layers))[-1, -1, -1])
            seconds.append(time.perf_counter() - start)
    return layer_flops(runner) * ids.numel() * len(runner.layers) / min(seconds)


def about(seconds: float) -> str:
    """A time to two digits or so, as h:mm:ss."""
    step = 1 if seconds < 60 else 10 if seconds < 600 else 60
    return str(timedelta(seconds=max(1, round(seconds / step)) * step))
