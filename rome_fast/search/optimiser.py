"""Where the search for each δ stands, and what moves it: stop rule, Adam and clamp, without the host.

All of it is in tensors on the device, a row for each edit, and every function works on some of the rows at once: so a
step can be captured in a CUDA graph, and the host need not wait for it. What is done stays as it is.
"""

import math

import torch
from torch import Tensor

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

    def judge(self, edits: Tensor, loss: Tensor, led: Tensor, most: int, margin: int) -> Tensor:
        """Whether each of some edits (n,) is done, by its loss without decay and the share of rows that lead.

        It is when its stop rule holds (with "argmax", when the target has led in every row for `margin` evaluations
        after the first), when it has had `most` evaluations, and when the loss is no number.
        """
        own_rule = self.settings.stop == "argmax"
        done, decay, count, held = self.done[edits], self.decay[edits], self.evaluations[edits], self.held[edits]
        loss = loss + decay * self.delta[edits].norm(dim=1)
        turn = ~(done | self.judged[edits])
        # Of an edit whose turn it is not, behind what is its history.
        self.losses[edits, torch.where(turn, count, self.settings.most)] = loss
        count = count + turn
        held = torch.where(turn, (held + 1) * (led == 1), held)
        going = held <= margin if own_rule else loss.double() >= self.settings.stop_loss
        going = going & (loss.abs() < math.inf) & (count < most)
        done = done | (turn & ~going)
        self.evaluations[edits], self.held[edits], self.done[edits] = count, held, done
        self.led[edits] = torch.where(turn, led, self.led[edits])
        self.judged.index_fill_(0, edits, True)
        if own_rule:
            moves = ~(turn & going & (count == _MOVED_BY) & (loss >= self.losses[edits, 0]))
            self.decay[edits] = decay * moves
            self.steps[edits] = self.steps[edits] * moves.unsqueeze(1)
        return done

    def move(self, edits: Tensor, gradient: Tensor) -> None:
        """One step of Adam (Kingma & Ba 2015) with the gradient (n, d) of the loss without decay, within the clamp."""
        judged, done = self.judged[edits], self.done[edits]
        delta, steps = self.delta[edits], self.steps[edits]
        # The norm has no gradient at zero; autograd, which the released code uses, takes it as zero.
        pull = self.decay[edits] / delta.norm(dim=1).clamp_min(_TINY)
        gradient = torch.addcmul(gradient, pull.unsqueeze(1), delta)
        begun = (steps > 0).to(delta.dtype)  # otherwise its moments are those of nothing, whatever is there
        first, second = self.first[edits], self.second[edits]
        new_first = (first * begun).lerp(gradient, 0.1)
        new_second = (second * (0.999 * begun)).addcmul(gradient, gradient, value=0.001)
        later = steps + 1
        scale = new_second.sqrt() / (1 - 0.999**later).sqrt().to(delta.dtype) + 1e-8
        moved = delta - (self.settings.learning_rate / (1 - 0.9**later)).to(delta.dtype) * new_first / scale
        limits = self.settings.clamp * self.v0_norms[edits] / moved.norm(dim=1).clamp_min(_TINY)
        moved = moved * limits.clamp_max(1).unsqueeze(1)
        turn = (judged & ~done).unsqueeze(1)
        self.delta[edits] = torch.where(turn, moved, delta)
        self.first[edits] = torch.where(turn, new_first, first)
        self.second[edits] = torch.where(turn, new_second, second)
        self.steps[edits] = torch.where(turn, later, steps)
        self.judged[edits] = judged & done

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
