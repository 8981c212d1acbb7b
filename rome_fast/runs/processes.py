"""Several processes that share one piece of work: who takes what, and how their parts come together.

They meet over gloo whatever the devices are, and wait for each other in Python: inside a wait of NCCL or gloo no signal
is heard, and torchrun, which ends the others when one has died, would have to kill them before they could say why.
"""

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ArgumentError, DistributedError

_Item = TypeVar("_Item")

# A process may have to wait for the slowest one's last batch or snapshot; a dead one is noticed without this.
_PATIENCE = timedelta(days=1)
_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    rank: int = 0
    count: int = 1
    resume: str = ""  # what to do when one of them has died
    group: Any = None  # of torch.distributed, over gloo; None for the default one

    @classmethod
    def of_default_group(cls, resume: str = "") -> "Processes":
        """Those of torch.distributed; ArgumentError where it is not initialised. All of them have to call this."""
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError("distributed: wanted an initialised torch.distributed; call init_process_group first")
        group = None if "gloo" in str(dist.get_backend()) else dist.new_group(backend="gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), resume, group)

    def takes(self, number: int) -> bool:
        """Whether a numbered part of the work is for this process."""
        return number % self.count == self.rank

    def gather(self, item: _Item) -> list[_Item]:
        """What every process gives, in their order; DistributedError where one of them has died."""
        if self.count == 1:
            return [item]
        self.wait()
        out: list[Any] = [None] * self.count
        with self._all_alive():
            dist.all_gather_object(out, item, group=self.group)
        return out

    def agree(self, what: str, text: str) -> None:
        """Raise ArgumentError in every process, with their ranks, unless all of them give the same text."""
        digests = self.gather(hashlib.sha256(text.encode()).hexdigest())
        if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            ranks = ", ".join(map(str, others))
            raise ArgumentError(f"{what}: process(es) {ranks} of {self.count} got others than process 0; give all of "
                                "them the same")  # fmt: skip

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes; DistributedError where one of them has died."""
        if self.count == 1:
            return
        self.wait()
        with self._all_alive():
            for tensor in tensors:
                work = dist.all_reduce(tensor, group=None if tensor.is_cuda else self.group, async_op=True)
                _finish(work)
                if tensor.is_cuda:
                    torch.cuda.synchronize(tensor.device)

    def wait(self) -> None:
        """Until all processes are here; DistributedError where one of them has died."""
        if self.count > 1:
            with self._all_alive():
                _finish(dist.all_reduce(torch.zeros(1, device="cpu"), group=self.group, async_op=True))

    @contextmanager
    def _all_alive(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DistributedError(
                f"process {self.rank} of {self.count}: another one has ended early ({reason}); {self.resume}"
            ) from error


ALONE = Processes()


def _finish(work: Any) -> None:
    while not work.is_completed():
        time.sleep(_POLL_SECONDS)
    work.wait()


def launched_together() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: str | torch.device | None = None) -> str:
    """The device asked for; by default a GPU where torch finds one, else the CPU.

    Of several processes that torchrun started on a machine, each has a GPU of its own.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else str(device)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and launched_together() else name


@contextmanager
def joined(device: str, resume: str) -> Iterator[Processes]:
    """The processes that torchrun started, joined for the length of the block: NCCL for GPUs, gloo for CPUs.

    When another one of them has ended early, torchrun ends this one, which becomes a DistributedError that ends with
    `resume` here.
    """

    def ended(_signal: int, _frame: FrameType | None) -> None:
        raise DistributedError(f"stopped, since another process of the run has ended early; {resume}")

    before = signal.signal(signal.SIGTERM, ended)
    try:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=_PATIENCE, device_id=torch.device(device))
        else:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Processes.of_default_group(resume)
        finally:
            dist.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)
