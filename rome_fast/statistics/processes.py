"""Several processes that share one corpus: who takes which batch, and the sum over all of them."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, StatisticsError

_RESUME = "run the same command with as many processes again: each of them goes on from its last snapshot"
# A process may have to wait for the slowest one's last batch or snapshot; a dead one is noticed without this.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process among those that collect together."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_default_group(cls) -> "Processes":
        """Those of torch.distributed; ArgumentError where it is not initialised."""
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError("distributed: wanted an initialised torch.distributed; call init_process_group first")
        return cls(dist.get_rank(), dist.get_world_size())

    def takes(self, batch: int) -> bool:
        """Whether a batch of the corpus is for this process."""
        return batch % self.count == self.rank

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes; StatisticsError where one of them has died."""
        if self.count > 1:
            with self._all_alive():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def wait(self) -> None:
        """Until all processes are here; StatisticsError where one of them has died."""
        if self.count > 1:
            with self._all_alive():
                dist.barrier()

    @contextmanager
    def _all_alive(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise StatisticsError(
                f"process {self.rank} of {self.count}: another one has ended early ({reason}); {_RESUME}"
            ) from error


def launched_together() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined for the length of the block: NCCL for GPUs, gloo for CPUs.

    When another one of them has ended early, torchrun ends this one, which becomes a StatisticsError here.
    """

    def ended(_signal: int, _frame: FrameType | None) -> None:
        raise StatisticsError(f"stopped, since another process of the run has ended early; {_RESUME}")

    before = signal.signal(signal.SIGTERM, ended)
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=_PATIENCE, device_id=torch.device(device))
        else:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Processes.of_default_group()
        finally:
            dist.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)
