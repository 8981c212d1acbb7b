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
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.batches import free_memory
from ..models.products import multiplies_fast
from ..models.rows import Row
from ..models.runner import Runner, frozen_weights
from .keys import RowStates
from .objective import Objective, scored_rows
from .optimiser import Adam

Stop = Literal["argmax", "loss"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

_MOVED_BY = 6  # evaluations, after which the loss of an edit has fallen, unless its decay holds it at zero
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


@dataclass(frozen=True)
class Value:
    """The optimised δ of one edit and how it got there."""

    delta: Tensor  # (d,) fp32, or fp64 for an fp64 model
    losses: tuple[float, ...]
    drafted: int  # how many of the losses, the first ones, are over some of the rows only
    led: float  # share of the rows in which every target token is the most probable one
    finite: bool  # false where the loss became NaN or infinite; δ is then zero


def optimise_values(
    runner: Runner,
    rows: Sequence[Sequence[Row]],
    states: RowStates,
    base_values: Tensor,
    layer: int,
    settings: ValueSettings,
) -> list[Value]:
    """Find δ for every edit of a batch, by a runner of `search_runner`.

    `rows[e]` are the rows of edit e, last of them the one that the KL term is taken in, if that is one without a target
    (an essence row); otherwise it is taken in the first row. All edits have the same number of rows with a target;
    `states` holds all rows, one edit after the other. `base_values` (edits, d) are the v₀.
    """
    wide = torch.promote_types(runner.dtype, torch.float32)
    search = _Search(base_values.to(wide), settings)
    most = settings.steps + (settings.extra_steps if settings.stop == "argmax" else 0)
    edits = list(range(len(rows)))
    drafted = [draft_rows(group, settings) for group in rows]
    before = None
    with frozen_weights(runner.model):
        if drafted[0]:
            starts = accumulate(map(len, rows[:-1]), initial=0)
            places = [start + i for start, chosen in zip(starts, drafted, strict=True) for i in chosen]
            some = [[group[i] for i in chosen] for group, chosen in zip(rows, drafted, strict=True)]
            chosen_states = states.rows(torch.tensor(places, device=runner.device))
            draft = Objective(runner, layer, chosen_states, some, settings.kl_factor)
            search.run(draft, edits, most - 1, settings.margin, settle=False)
            before = draft.initial
            del draft, chosen_states
        batch = Objective(runner, layer, states, rows, settings.kl_factor, before)
        # A draft has had its margin of steps.
        search.run(batch, edits, most, 0 if drafted[0] else settings.margin, settle=True)
    return search.values


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
    drafted = settings.draft_rows if settings.stop == "argmax" and settings.steps + settings.extra_steps > 1 else 0
    if not 0 < drafted < scored:
        return []
    return [i * scored // drafted for i in range(drafted)] + list(range(scored, len(rows)))


class _Search:
    """Where the optimisation of every edit stands."""

    def __init__(self, base_values: Tensor, settings: ValueSettings) -> None:
        self.settings = settings
        self.v0_norms = base_values.norm(dim=1)
        self.decay = settings.weight_decay / self.v0_norms**2
        self.delta = torch.zeros_like(base_values)
        self.adam = Adam(self.delta, settings.learning_rate)
        self.losses: list[list[float]] = [[] for _ in base_values]
        self._drafted = [0] * len(base_values)
        self._values: list[Value | None] = [None] * len(base_values)

    @property
    def values(self) -> list[Value]:
        return [value for value in self._values if value is not None]

    def run(self, batch: Objective, edits: list[int], most: int, margin: int, *, settle: bool) -> None:
        """Take steps with the edits of a batch until each is done, or has had `most` evaluations in all.

        An edit is done when its stop rule holds; with "argmax", when the target has led in every row of the batch for
        `margin` evaluations after the first. `settle` makes what it has then its result.
        """
        own_rule = self.settings.stop == "argmax"
        held = dict.fromkeys(edits, 0)
        alive = torch.tensor(edits, device=self.delta.device)
        while edits:
            delta, v0_norms, decay = self.delta[alive], self.v0_norms[alive], self.decay[alive]
            loss_of_rows, led, gradient_of_rows = batch.evaluate(delta)
            norms = delta.norm(dim=1)
            # One transfer for both: on a GPU each one waits for everything before it.
            losses, shares = torch.stack([loss_of_rows + decay * norms, led]).tolist()
            keep = []
            for place, (edit, loss) in enumerate(zip(edits, losses, strict=True)):
                self.losses[edit].append(loss)
                held[edit] = held[edit] + 1 if shares[place] == 1 else 0
                finite = math.isfinite(loss)
                met = held[edit] > margin if own_rule else loss < self.settings.stop_loss
                if not met and finite and len(self.losses[edit]) < most:
                    keep.append(place)
                    if own_rule and len(self.losses[edit]) == _MOVED_BY and loss >= self.losses[edit][0]:
                        self.decay[edit] = decay[place] = 0
                        self.adam.forget(edit)
                elif settle:
                    found = delta[place].clone() if finite else torch.zeros_like(delta[place])
                    history = tuple(self.losses[edit])
                    self._values[edit] = Value(found, history, self._drafted[edit], shares[place], finite)
                else:
                    self._drafted[edit] = len(self.losses[edit])
            if not keep:
                return
            # The norm has no gradient at zero; autograd, which the released code uses, takes it as zero.
            gradient = gradient_of_rows()
            gradient += torch.where(norms > 0, decay / norms, torch.zeros_like(norms)).unsqueeze(1) * delta
            left = len(keep) < len(edits)
            if left:
                # Only then, since a GPU is waited for whenever numbers come from the host.
                kept = torch.tensor(keep, device=self.delta.device)
                alive, delta, gradient, v0_norms = (t[kept] for t in (alive, delta, gradient, v0_norms))
            moved = delta + self.adam.step(alive, gradient)
            norms, limits = moved.norm(dim=1), self.settings.clamp * v0_norms
            moved *= torch.where(norms > limits, limits / norms, torch.ones_like(norms)).unsqueeze(1)
            self.delta[alive] = moved
            if left:
                edits = [edits[place] for place in keep]
                batch.keep(kept)
