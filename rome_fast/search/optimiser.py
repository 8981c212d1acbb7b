"""Where the search for each δ stands, and what moves it: stop rule, Adam and clamp, without the host.

All of it is in tensors on the device, a row for each edit, and every function works on some of the rows at once: so a
step can be captured in a CUDA graph, and the host need not wait for it. What is done stays as it is.
"""

import math

import torch
from torch import Tensor

from .values import Value, ValueSettings

_MOVED_BY = 6  # evaluations, after which the loss of an edit has fallen, unless its decay holds it at zero


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
        self.losses, self.led = rows(settings.most), rows()
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
        decay, count, held = self.decay[edits], self.evaluations[edits], self.held[edits]
        loss = loss + decay * self.delta[edits].norm(dim=1)
        turn = ~(self.done[edits] | self.judged[edits])
        # Of an edit that is not judged, what is written is what was there.
        place = torch.where(turn, count, 0)
        self.losses[edits, place] = torch.where(turn, loss, self.losses[edits, place])
        count, held = count + 1, torch.where(led == 1, held + 1, 0)
        met = held > margin if own_rule else loss.double() < self.settings.stop_loss
        done = met | ~loss.isfinite() | (count >= most)
        for state, new in ((self.evaluations, count), (self.held, held), (self.led, led), (self.done, done)):
            state[edits] = torch.where(turn, new, state[edits])
        self.judged[edits] |= turn
        if own_rule:
            stuck = turn & ~done & (count == _MOVED_BY) & (loss >= self.losses[edits, 0])
            self.decay[edits] = torch.where(stuck, 0, decay)
            for moment in (self.first, self.second, self.steps):
                moment[edits] = torch.where(stuck.unsqueeze(1), 0, moment[edits])
        return self.done[edits]

    def move(self, edits: Tensor, gradient: Tensor) -> None:
        """One step of Adam (Kingma & Ba 2015) with the gradient (n, d) of the loss without decay, within the clamp."""
        turn = (self.judged[edits] & ~self.done[edits]).unsqueeze(1)
        delta, decay, limits = self.delta[edits], self.decay[edits], self.settings.clamp * self.v0_norms[edits]
        # The norm has no gradient at zero; autograd, which the released code uses, takes it as zero.
        norms = delta.norm(dim=1)
        gradient = gradient + torch.where(norms > 0, decay / norms, 0).unsqueeze(1) * delta
        steps = self.steps[edits] + 1
        first = self.first[edits].lerp(gradient, 0.1)
        second = self.second[edits] * 0.999 + 0.001 * gradient**2
        scale = second.sqrt() / (1 - 0.999**steps).sqrt().to(gradient.dtype) + 1e-8
        moved = delta - (self.settings.learning_rate / (1 - 0.9**steps)).to(gradient.dtype) * first / scale
        norms = moved.norm(dim=1)
        moved *= torch.where(norms > limits, limits / norms, 1).unsqueeze(1)
        new = ((self.delta, moved), (self.first, first), (self.second, second), (self.steps, steps))
        for state, value in new:
            state[edits] = torch.where(turn, value, state[edits])
        self.judged[edits] &= ~turn.squeeze(1)

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
