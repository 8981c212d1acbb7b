"""Where the search for each δ stands, and what moves it: stop rule, Adam and clamp, without the host.

All of it is in tensors on the device, a row for each edit, and every function works on some of the rows at once: so a
step can be captured in a CUDA graph, and the host need not wait for it. What is done stays as it is.
"""

import math

import torch
from torch import Tensor

from ..kernels import operators
from .values import Value, ValueSettings

_MOVED_BY = 6  # evaluations, after which the loss of an edit has fallen, unless its decay holds it at zero
_TINY = 1e-20  # in the place of a norm of zero


class State:
    """The state of every edit's search, and of one more that is done and stands in free slots.

    An edit is judged by a loss, then moved by its gradient; `judge` and `move` pass over those whose turn it is not.
    """

    def __init__(self, edits: int, d: int, settings: ValueSettings, dtype: torch.dtype, device: torch.device) -> None:
        def rows(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(edits + 1, *shape, dtype=dtype, device=device)

        self.settings, self.nobody = settings, edits
        self.v0_norms, self.decay = rows(), rows()
        self.delta, self.first, self.second = rows(d), rows(d), rows(d)  # δ and its moments
        # In fp32, 1 - 0.999 would be wrong by 5e-5 of itself, and every update with it.
        self.steps = rows(1, dtype=torch.float64)  # of Adam
        self.losses, self.led = rows(settings.most + 1), rows()
        self.evaluations, self.drafted = rows(dtype=torch.int64), rows(dtype=torch.int64)
        self.held = rows(dtype=torch.int64)  # evaluations, the last ones, in which the target led in every row
        self.done = torch.ones_like(self.held, dtype=torch.bool)  # with the rows it has
        self.judged = torch.zeros_like(self.done)  # at this δ, and not moved yet

    def enter(self, edits: Tensor, base_values: Tensor) -> None:
        """Begin with edits (n,) at δ = 0; `base_values` (n, d) are their v₀."""
        norms = base_values.to(self.delta.dtype).norm(dim=1)
        self.v0_norms[edits], self.decay[edits] = norms, self.settings.weight_decay / norms**2
        self.done.index_fill_(0, edits, False)

    def draft_ends(self, edits: Tensor) -> None:
        """Go on with edits (n,) on other rows."""
        self.drafted[edits] = self.evaluations[edits]
        for state in (self.held, self.done, self.judged):
            state.index_fill_(0, edits, 0)

    def judge(self, edits: Tensor, loss: Tensor, led: Tensor, most: int, margin: int, ended: Tensor) -> None:
        """Say in `ended` (n,) which of some edits (n,) are done, by loss without decay and share of rows that lead.

        An edit is when its stop rule holds (with "argmax", when the target has led in every row for `margin`
        evaluations after the first), when it has had `most` evaluations, and when the loss is no number.
        """
        operators.stop_rule_(
            ended,
            self.decay,
            self.steps,
            self.losses,
            self.led,
            self.evaluations,
            self.held,
            self.done,
            self.judged,
            self.delta,
            edits,
            loss,
            led,
            None if self.settings.stop == "argmax" else self.settings.stop_loss,
            most,
            margin,
            _MOVED_BY,
        )

    def move(self, edits: Tensor, gradient: Tensor) -> None:
        """One step of Adam (Kingma & Ba 2015) with the gradient (n, d) of the loss without decay, within the clamp."""
        operators.clamped_adam_(
            self.delta,
            self.first,
            self.second,
            self.steps,
            self.judged,
            self.done,
            self.decay,
            self.v0_norms,
            edits,
            gradient,
            self.settings.learning_rate,
            self.settings.clamp,
            _TINY,
        )

    def values(self) -> list[Value]:
        """What every edit has ended with."""
        columns = (self.evaluations, self.drafted, self.led)
        table = torch.cat([torch.stack([c.double() for c in columns], 1), self.losses.double()], 1)
        found = []
        for edit, (count, drafted, led, *losses) in enumerate(table[: self.nobody].tolist()):
            history = tuple(losses[: int(count)])
            finite = math.isfinite(history[-1])
            delta = self.delta[edit].clone() if finite else torch.zeros_like(self.delta[edit])
            found.append(Value(delta, history, int(drafted), led, finite))
        return found
