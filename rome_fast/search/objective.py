"""The loss of the edits of a batch, and its gradient at a δ of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..models.past import attention_mask
from ..models.rows import Row
from ..models.runner import Runner
from .keys import RowStates

_HEAD_ELEMENTS = 1 << 25  # logits at a time, which bounds the memory of the head
_HEAD_ROWS = 8  # at least; with fewer, 1e-4 of a gradient was rounding


@dataclass(frozen=True)
class _Targets:
    """Which positions of which rows are scored, for which token, with which share in which edit's loss."""

    row: Tensor  # (n,)
    time: Tensor
    label: Tensor
    share: Tensor
    edit: Tensor


def scored_rows(rows: Sequence[Row]) -> int:
    """How many of an edit's rows have a target: all of them, or all but the last."""
    return len(rows) if rows[-1].labels else len(rows) - 1


def _targets(rows: Sequence[Sequence[Row]], dtype: torch.dtype, device: torch.device) -> _Targets:
    columns: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
    shares: list[float] = []
    at = 0
    for edit, group in enumerate(rows):
        for row in group:
            for offset, label in enumerate(row.labels):
                entry = (at, row.target + offset - 1 - row.subject, label, edit)
                for column, value in zip(columns, entry, strict=True):
                    column.append(value)
                shares.append(1 / (len(row.labels) * scored_rows(group)))
            at += 1
    place, time, label_ids, edits = (torch.tensor(column, device=device) for column in columns)
    return _Targets(place, time, label_ids, torch.tensor(shares, device=device, dtype=dtype), edits)


class Objective:
    """The edits still being optimised: their frozen states, and loss and gradient at a δ."""

    def __init__(
        self,
        runner: Runner,
        layer: int,
        states: RowStates,
        rows: Sequence[Sequence[Row]],
        kl_factor: float,
        before: Tensor | None = None,
    ) -> None:
        self.runner, self.layer, self.kl_factor = runner, layer, kl_factor
        self.suffix, self.positions, self.past = states.suffix, states.positions, states.past
        self.at, self.entering = states.at, states.entering
        self.edits, self.scored = len(rows), scored_rows(rows[0])
        owner = [edit for edit, group in enumerate(rows) for _ in group]
        self.owner = torch.tensor(owner, device=runner.device)  # (rows,) the edit of each
        # (edits,) the row of each where the subject's last token stands behind nothing but the subject: its essence.
        starts = accumulate(map(len, rows[:-1]), initial=0)
        essence = [start + scored_rows(g) % len(g) for start, g in zip(starts, rows, strict=True)]
        self.essence = torch.tensor(essence, device=runner.device)
        self.targets = _targets(rows, torch.promote_types(runner.dtype, torch.float32), runner.device)
        self.targets.time.add_(self.at[self.targets.row])
        self.mask = self._mask(self.suffix.shape[1])
        # (edits, vocabulary) log-probabilities of the essence at δ = 0: of the edits left, and of all.
        self.before = self.initial = before
        # fp16 gradients of a loss spread over many rows would vanish.
        self.scale = 1024.0 if torch.float16 in (self.suffix.dtype, runner.compute_dtype) else 1.0

    def keep(self, kept: Tensor) -> None:
        """Go on with the edits at these places only."""
        place = _places(kept, self.edits)
        rows = (place[self.owner] >= 0).nonzero().squeeze(1)
        row_place = _places(rows, len(self.owner))
        old = self.targets
        stays = place[old.edit] >= 0
        row, edit = row_place[old.row[stays]], place[old.edit[stays]]
        self.targets = _Targets(row, old.time[stays], old.label[stays], old.share[stays], edit)
        self.edits, self.owner, self.essence = len(kept), place[self.owner[rows]], row_place[self.essence[kept]]
        self.at = self.at[rows]
        # Positions that no remaining edit has are dropped with the edits that had them.
        width = int(torch.cat([self.targets.time, self.at]).max()) + 1
        self.suffix = self.suffix[rows, :width]
        self.positions = None if self.positions is None else self.positions[rows, :width]
        self.past = None if self.past is None else self.past.rows(rows)
        self.entering = None if self.entering is None else self.entering[rows, :width]
        self.mask = self._mask(width)
        if self.before is not None:
            self.before = self.before[kept]

    def _mask(self, time: int) -> Tensor | None:
        return None if self.past is None else attention_mask(self.past.seen, time, self.suffix.dtype)

    def _with(self, added: Tensor) -> Tensor:
        """The edit layer's output (rows, time, d) with `added` (rows, d) in the values at the subject's last token."""
        if self.entering is not None:
            time = self.entering.shape[1]
            out = self.runner.run_adding(
                self.entering,
                self.layer,
                added,
                self.at,
                positions=None if self.positions is None else self.positions[:, :time],
                mask=self._mask(time),
                past=self.past,
            )
            return torch.cat([out, self.suffix[:, time:]], 1)
        if self.past is None:
            rows = torch.arange(len(added), device=added.device)
            return self.suffix.index_put((rows, self.at), added, accumulate=True)
        return torch.cat([self.suffix[:, :1] + added.unsqueeze(1), self.suffix[:, 1:]], 1)

    def evaluate(self, delta: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Loss without weight decay and share of rows that lead (edits,), and the gradient (edits, d) on call.

        The last evaluation of a batch needs no gradient, which is half of the work.
        """
        chosen_targets = self.targets
        with torch.enable_grad():
            delta = delta.detach().requires_grad_()
            added = delta.index_select(0, self.owner).to(self.suffix.dtype)
            hidden = self._with(added)
            top = len(self.runner.layers)
            hidden = self.runner.run(
                hidden, self.layer + 1, top, positions=self.positions, mask=self.mask, past=self.past
            )
            scored = hidden[chosen_targets.row, chosen_targets.time]
            essence = hidden[self.essence, self.at[self.essence]]
            loss, led, gradients = self._head(scored.detach(), essence.detach())

        def gradient() -> Tensor:
            return torch.autograd.grad([scored, essence], [delta], gradients)[0] / self.scale

        return loss, led, gradient

    def _head(self, scored: Tensor, essence: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss and its gradient at the positions that enter it, a bounded number of logits rows at a time."""
        t = self.targets
        loss = torch.zeros(self.edits, dtype=t.share.dtype, device=scored.device)
        leads = torch.ones_like(self.owner, dtype=loss.dtype)
        both = torch.cat([scored, essence])
        gradient = torch.empty_like(both)
        first: list[Tensor] = []
        rows = max(1, _HEAD_ELEMENTS // self.runner.vocab_size)
        for start in range(0, len(both), rows):
            hidden = both[start : start + rows].requires_grad_()
            logits = exact_head(self.runner, hidden)
            # Unlike log_softmax, logsumexp adds in pairs, which over a vocabulary is several times as exact.
            total = logits.logsumexp(1, keepdim=True)
            count = max(0, min(len(scored) - start, rows))  # of the rows here that have a target; an essence is behind
            part = slice(start, start + count)
            label = t.label[part].unsqueeze(1)
            nll = (total[:count] - logits[:count].gather(1, label)).squeeze(1) * t.share[part]
            after = logits[count:] - total[count:]
            part_of_essence = slice(start + count - len(scored), start + len(hidden) - len(scored))
            if self.before is None:
                first.append(after.detach())
            before = first[-1] if self.before is None else self.before[part_of_essence]
            divergence = (after.exp() * (after - before)).sum(1) * self.kl_factor
            (gradient[start : start + rows],) = torch.autograd.grad(
                (nll.sum() + divergence.sum()) * self.scale, [hidden]
            )
            loss.index_add_(0, t.edit[part], nll.detach())
            loss[part_of_essence] += divergence.detach()
            right = (logits[:count].argmax(1) == label.squeeze(1)).to(leads.dtype)
            leads.scatter_reduce_(0, t.row[part], right, "amin")
        if self.before is None:
            self.before = self.initial = torch.cat(first)
        # Of rows without a target each has one at most, its essence row, which counted as leading.
        led = torch.zeros_like(loss).index_add_(0, self.owner, leads)
        extra = torch.zeros_like(loss).index_add_(0, self.owner, torch.ones_like(leads)) - self.scored
        return loss, (led - extra) / self.scored, list(gradient.split([len(scored), len(essence)]))


def _places(kept: Tensor, count: int) -> Tensor:
    """(count,) where each of `count` things is among those kept; -1 for the others."""
    place = torch.full((count,), -1, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    return place


def exact_head(runner: Runner, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary), not rounded below fp32, of hidden states (n, d), with a gradient to their precision.

    BLAS multiplies few rows, below four with AVX2 and below eight in its plain code, by adding one token of the
    vocabulary after the other; rows of zeros avoid it.
    """
    added = max(0, _HEAD_ROWS - len(hidden))
    return runner.exact_logits(torch.nn.functional.pad(hidden, (0, 0, 0, added)))[: len(hidden)]
