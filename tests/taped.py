"""A stand-in for CUDA graphs on a CPU: what was launched is launched again, on the same tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a GPU would be waited for: numbers that the host asks for or hands over, and results of a size that depends on
# what tensors hold.
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "lift_fresh", "equal", "unique", "_unique2")


class HostWaits(AssertionError):
    """No RuntimeError, which a capture may fail with."""


def tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Notes operators with their tensors, and what tensors held before they were changed."""

    def __init__(self):
        super().__init__()
        self.calls, self.held = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors(args[1:2]))
        if name in WAITS or by_mask:
            raise HostWaits(name)
        if func._schema.is_mutable:
            for x in tensors((args, kwargs)):
                self.held.setdefault(storage(x), (x.untyped_storage(), x.untyped_storage().clone()))
        out = func(*args, **kwargs)
        own = {storage(x) for x in tensors((args, kwargs))}
        # What is new, and not a view of what was there.
        made = [x if storage(x) not in own else None for x in tensors(out)]
        self.calls.append((func, args, kwargs, made))
        return out

    def undo(self):
        for held, was in self.held.values():
            held.copy_(was)

    def play(self):
        for func, args, kwargs, made in self.calls:
            for x, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                if x is not None:
                    x.copy_(new)


class Taped:
    """In place of `rome_fast.search.capture.CudaRecorder`.

    Nothing is changed by what is captured, as on a GPU; played, it sees nothing but what its tensors hold by then.
    """

    def __init__(self):
        self.captured, self.played = 0, 0

    def warm_up(self, work: Callable) -> Callable:
        return work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        tape = Tape()
        with tape:
            work()
        tape.undo()

        def play():
            self.played += 1
            with torch.no_grad():
                tape.play()

        return play
