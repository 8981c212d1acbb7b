"""The values of edits: δ, found by gradient descent on the layers above the edit layer, many edits at once.

loss = mean NLL of the target over the rows + kl_factor · KL(after ‖ before) of the next token at the end of the
subject + weight_decay · ‖δ‖ / ‖v₀‖²   (ROME, Meng et al. 2022, equation 4, with the released code's weight decay)

The decay has a slope at δ = 0: where that of the NLL is smaller there, the edit stays where it is for ever. So our own
stop rule drops the decay of an edit that has not moved after a few steps.

Only what δ can change is computed: layers above the edit layer, positions from the subject's last token on, logits
where a target token or the KL term needs them. The edits of a batch are independent; one that is done leaves it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.batches import free_memory
from ..models.products import multiplies_fast
from ..models.rows import Row
from ..models.runner import Runner
from .objective import scored_rows

Stop = Literal["argmax", "loss"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

_SHARE_OF_COPIES = 0.25  # of the free memory, which converted weights may take


@dataclass(frozen=True)
class ValueSettings:
    """How δ is optimised; the defaults are the released ones for most models, but for the stop rule."""

    steps: int = 20  # loss evaluations at most, but see extra_steps; the last one is not followed by an update
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0  # ‖δ‖ stays within clamp · ‖v₀‖
    kl_factor: float = 0.0625
    stop: Stop = "argmax"  # "argmax": the target leads in every row; "loss": the released rule
    stop_loss: float = 0.05  # of stop="loss"
    margin: int = 4  # further steps after the target first leads
    extra_steps: int = 15  # of stop="argmax": at most this many more evaluations, for an edit that is not done by then
    draft_rows: int = 5  # of stop="argmax": first steps on as many rows, the last ones on all; 0 for all from the start
    # Of the products with weights while δ is optimised; δ, its optimiser and the loss are in fp32. "auto": bfloat16 for
    # an fp32 model where the device multiplies it fast; else as everywhere (see `rome_fast.models.products`).
    compute_dtype: ComputeDtype = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "margin", "extra_steps", "draft_rows"):
            if type(getattr(self, name)) is not int:
                raise ArgumentError(f"settings: got {name} {getattr(self, name)!r}, wanted a whole number")
        for name in ("learning_rate", "weight_decay", "clamp", "kl_factor", "stop_loss"):
            value = getattr(self, name)
            # A loss that is never reached never stops.
            least = -math.inf if name == "stop_loss" else 0
            if type(value) not in (int, float) or not (math.isfinite(value) and value >= least):
                raise ArgumentError(f"settings: got {name} {value!r}, wanted a finite number, not below 0")
        if self.steps < 1 or min(self.margin, self.extra_steps, self.draft_rows) < 0:
            got = f"steps {self.steps}, margin {self.margin}, extra_steps {self.extra_steps}"
            raise ArgumentError(f"settings: got {got}, draft_rows {self.draft_rows}, wanted at least 1, 0, 0 and 0")
        if self.stop not in ("argmax", "loss"):
            raise ArgumentError(f"settings: got stop {self.stop!r}, wanted 'argmax' or 'loss'")
        if self.compute_dtype not in get_args(ComputeDtype):
            wanted = ", ".join(map(repr, get_args(ComputeDtype)))
            raise ArgumentError(f"settings: got compute_dtype {self.compute_dtype!r}, wanted one of {wanted}")

    @property
    def most(self) -> int:
        """Evaluations of the loss that an edit may take."""
        return self.steps + (self.extra_steps if self.stop == "argmax" else 0)


@dataclass(frozen=True)
class Value:
    """The optimised δ of one edit and how it got there."""

    delta: Tensor  # (d,) fp32, or fp64 for an fp64 model
    losses: tuple[float, ...]
    drafted: int  # how many of the losses, the first ones, are over some of the rows only
    led: float  # share of the rows in which every target token is the most probable one
    finite: bool  # false where the loss became NaN or infinite; δ is then zero


def compute_dtype(runner: Runner, settings: ValueSettings) -> torch.dtype:
    """In which dtype products with weights are taken while a δ is optimised."""
    if settings.compute_dtype != "auto":
        return getattr(torch, settings.compute_dtype)
    if runner.dtype == torch.float32 and multiplies_fast(runner.device, torch.bfloat16):
        return torch.bfloat16
    return runner.compute_dtype


def search_runner(runner: Runner, settings: ValueSettings) -> Runner:
    """What runs the layers that only the search for values sees; the weights must not change while it is used.

    It keeps converted weights where the memory allows it, since every step uses all of them.
    """
    dtype = compute_dtype(runner, settings)
    size = sum(p.numel() for p in runner.model.parameters()) * dtype.itemsize
    fits = runner.stream is None and size <= _SHARE_OF_COPIES * free_memory(runner.device)
    return runner.computing_in(dtype, keep=fits)


def draft_rows(rows: Sequence[Row], settings: ValueSettings) -> list[int]:
    """Which of an edit's rows the first steps are taken on; none for all.

    They are evenly spaced; the first row (unprefixed in some methods) and an essence row are among them.
    """
    scored = scored_rows(rows)
    drafted = settings.draft_rows if settings.stop == "argmax" and settings.most > 1 else 0
    if not 0 < drafted < scored:
        return []
    return [i * scored // drafted for i in range(drafted)] + list(range(scored, len(rows)))
