"""The loss of some edits at once, and its gradient at a δ of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import operators
from ..models.past import ContextPast, attention_mask
from ..models.rows import Row
from ..models.runner import Runner
from .keys import RowStates

_HEAD_ELEMENTS = 1 << 25  # logits at a time, which bounds the memory of the head
_HEAD_ROWS = 8  # at least; with fewer, 1e-4 of a gradient was rounding


def scored_rows(rows: Sequence[Row]) -> int:
    """How many of an edit's rows have a target: all of them, or all but the last."""
    return len(rows) if rows[-1].labels else len(rows) - 1


@dataclass(frozen=True, eq=False)
class Member:
    """An edit with the rows that its loss is taken over, and where their states are."""

    edit: int
    rows: Sequence[Row]  # the last may be without a target, an essence row
    states: RowStates  # of many edits
    places: Sequence[int]  # in them, of each row
    before: Tensor | None = None  # (vocabulary,) log-probabilities of the essence at δ = 0, once they are known
    all: "Member | None" = None  # with all rows, where these are some of them

    def some(self, chosen: Sequence[int]) -> "Member":
        """The same with some of the rows."""
        rows, places = [self.rows[i] for i in chosen], [self.places[i] for i in chosen]
        return replace(self, rows=rows, places=places, all=self)

    @property
    def whole(self) -> bool:
        """Whether rows are run from their first token on."""
        return self.states.past is None

    @property
    def width(self) -> int:
        """Positions of the longest suffix."""
        return max(len(row.inputs) - (0 if self.whole else row.subject) for row in self.rows)

    @property
    def middle(self) -> int:
        """Positions of the middle that there is room for."""
        past = self.states.past
        return 0 if past is None else past.middle

    @property
    def targets(self) -> int:
        """Positions that are scored."""
        return sum(len(row.labels) for row in self.rows)


class Shape(NamedTuple):
    """Of the tensors that a loss is computed from."""

    rows: tuple[int, ...]  # in each slot
    targets: tuple[int, ...]  # in each slot: positions that are scored
    width: int  # positions of a suffix
    middle: int  # and of a middle

    @classmethod
    def of(cls, members: Sequence[Member]) -> "Shape":
        """With no more room than there must be."""
        rows, targets = tuple(len(m.rows) for m in members), tuple(m.targets for m in members)
        return cls(rows, targets, max(m.width for m in members), max(m.middle for m in members))


@dataclass(frozen=True)
class _Index:
    """Which rows and positions are whose: int64 on the device, the share in the dtype of a loss."""

    owner: Tensor  # (rows,) the slot of each
    at: Tensor  # (rows,) where in the suffix the subject's last token is
    # (slots,) the row of each where the subject's last token stands behind nothing but the subject: its essence.
    essence: Tensor
    scored: Tensor  # (rows,) 1 for a row with a target, 0 for another one, in the dtype of a loss
    # (targets,) each: the row that is scored, for which token, with which share of its slot's loss.
    row: Tensor
    label: Tensor
    share: Tensor
    # (targets + slots,) each: positions that enter the loss, counted through all rows, and in which slot's; those of
    # the essences are behind those that are scored.
    place: Tensor
    slot: Tensor

    @classmethod
    def of(cls, members: Sequence[Member | None], shape: Shape, dtype: torch.dtype, device: torch.device) -> "_Index":
        """Of the members in the slots. Room that is left is filled with rows and targets of share 0."""
        owner: list[int] = []
        at: list[int] = []
        essence: list[int] = []
        has_target: list[int] = []
        targets: list[tuple[int, int, int, int]] = []  # row, label, place, slot
        shares: list[float] = []
        for slot, (member, rows, count) in enumerate(zip(members, shape.rows, shape.targets, strict=True)):
            start, first = len(owner), len(shares)
            own = [] if member is None else member.rows
            scored = scored_rows(own) if own else 0
            whole = member is not None and member.whole
            owner += [slot] * rows
            at += [row.subject if whole else 0 for row in own] + [own[0].subject if whole else 0] * (rows - len(own))
            essence.append(start + (scored % len(own) if own else 0))
            has_target += [1] * scored + [0] * (rows - scored)
            for number, row in enumerate(own, start):
                before = 0 if whole else row.subject
                for offset, label in enumerate(row.labels):
                    place = number * shape.width + row.target + offset - 1 - before
                    targets.append((number, label, place, slot))
                    shares.append(1 / (len(row.labels) * scored))
            empty = count - (len(shares) - first)
            targets += [(start, 0, start * shape.width, slot)] * empty
            shares += [0.0] * empty
        rows_of, labels, places, slots = map(list, zip(*targets, strict=True))
        places += [row * shape.width + at[row] for row in essence]
        slots += range(len(members))
        columns = (owner, at, essence, rows_of, labels, places, slots)
        numbers = sent([number for column in columns for number in column], torch.int64, device)
        owned, where, said, row, label, place, of = numbers.split([len(column) for column in columns])
        scored, share = sent([*has_target, *shares], dtype, device).split([len(has_target), len(shares)])
        return cls(owned, where, said, scored, row, label, share, place, of)

    def copy_(self, other: "_Index") -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))


def sent(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, in one transfer that a GPU does while the host goes on."""
    made = torch.tensor(numbers, dtype=dtype, device="cpu")
    return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


class Objective:
    """Loss and gradient of the edits in some slots, from tensors of a fixed shape.

    The members of slots may be exchanged: then the tensors get other contents, and stay where they are.
    """

    def __init__(
        self, runner: Runner, layer: int, members: Sequence[Member | None], shape: Shape, kl_factor: float
    ) -> None:
        self.runner, self.layer, self.kl_factor, self.shape = runner, layer, kl_factor, shape
        self.members = list(members)
        self._starts = list(accumulate(shape.rows, initial=0))
        dtype, device = torch.promote_types(runner.dtype, torch.float32), runner.device
        self.index = _Index.of(self.members, shape, dtype, device)
        self.mask: Tensor | None = None
        present = {slot: m for slot, m in enumerate(members) if m is not None}
        some = list(present.values())
        self.scored = scored_rows(some[0].rows)
        tight = len(some) == len(members) and shape == Shape.of(some)
        if tight and all(m.states is some[0].states for m in some):
            self.states = _chosen(some, shape.width)
        else:
            self.states = _blank(max(some, key=lambda m: m.middle).states, sum(shape.rows), shape)
            self._put(present)
        # (slots, vocabulary) log-probabilities of the essence at δ = 0, and where the next evaluation finds them out.
        self.before = torch.zeros(len(members), runner.vocab_size, dtype=dtype, device=device)
        self.unknown = torch.ones(len(members), dtype=torch.bool, device=device)
        self._know(present)
        # fp16 gradients of a loss spread over many rows would vanish.
        self.scale = 1024.0 if torch.float16 in (self.states.suffix.dtype, runner.compute_dtype) else 1.0
        self._lay_out()

    def exchange(self, members: dict[int, Member]) -> None:
        """Put members into slots, in the place of those that are there."""
        for slot, member in members.items():
            self.members[slot] = member
        self.index.copy_(_Index.of(self.members, self.shape, self.index.share.dtype, self.index.share.device))
        self._put(members)
        self.unknown.index_fill_(0, sent(list(members), torch.int64, self.unknown.device), True)
        self._know(members)
        self._lay_out()

    def _put(self, members: dict[int, Member]) -> None:
        for states in {id(m.states): m.states for m in members.values()}.values():
            rows: list[int] = []
            places: list[int] = []
            for slot, member in members.items():
                if member.states is states:
                    start, stop = self._starts[slot : slot + 2]
                    rows += range(start, stop)
                    # A row too many is the first one again: what is there must be numbers.
                    places += [*member.places, *[member.places[0]] * (stop - start - len(member.places))]
            device = self.runner.device
            _copy_rows(self.states, sent(rows, torch.int64, device), states, sent(places, torch.int64, device))

    def _know(self, members: dict[int, Member]) -> None:
        for slot, member in members.items():
            if member.before is not None:
                self.before[slot] = member.before
                self.unknown[slot] = False

    def _lay_out(self) -> None:
        past, width = self.states.past, self.shape.width
        mask = None if past is None else attention_mask(past.seen, width, self.states.suffix.dtype)
        if self.mask is None or mask is None:
            self.mask = mask
        else:
            self.mask.copy_(mask)
        self.renew()

    def renew(self) -> None:
        """Have the runner make the arguments of its layers anew, which it does for tensors that it does not know."""
        positions = self.states.positions
        self._positions = None if positions is None else positions.view_as(positions)
        self._mask = None if self.mask is None else self.mask.view_as(self.mask)

    def _with(self, added: Tensor) -> Tensor:
        """The edit layer's output (rows, time, d) with `added` (rows, d) in the values at the subject's last token."""
        states, at = self.states, self.index.at
        suffix, positions, past, entering = states.suffix, states.positions, states.past, states.entering
        if entering is not None:
            time = entering.shape[1]
            out = self.runner.run_adding(
                entering,
                self.layer,
                added,
                at,
                positions=None if positions is None else positions[:, :time],
                mask=None if past is None else attention_mask(past.seen, time, suffix.dtype),
                past=past,
            )
            return torch.cat([out, suffix[:, time:]], 1)
        if past is None:
            rows = torch.arange(len(added), device=added.device)
            return suffix.index_put((rows, at), added, accumulate=True)
        return _AddedToFirst.apply(suffix, added)

    def evaluate(self, delta: Tensor, *, gradient: bool = True) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """At δ (slots, d): loss without decay and share of rows that lead (slots,), gradient (slots, d) on call.

        The last evaluation of an edit needs no gradient, which is half of the work. Without `gradient`, there is none
        to call, and nothing is kept for it.
        """
        index = self.index
        with torch.set_grad_enabled(gradient):
            delta = delta.detach().requires_grad_()
            added = delta.index_select(0, index.owner).to(self.states.suffix.dtype)
            hidden = self._with(added)
            top = len(self.runner.layers)
            hidden = self.runner.run(
                hidden, self.layer + 1, top, positions=self._positions, mask=self._mask, past=self.states.past
            )
            picked = hidden.flatten(0, 1).index_select(0, index.place)
            loss, led, of_picked = self._head(picked.detach(), gradient)

        def of_delta() -> Tensor:
            (found,) = torch.autograd.grad([picked], [delta], [of_picked])
            return found if self.scale == 1 else found / self.scale

        return loss, led, of_delta

    def _head(self, picked: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and its gradient at the positions that enter it, a bounded number of logits rows at a time."""
        t = self.index
        targets = len(t.label)
        values: list[Tensor] = []
        rights: list[Tensor] = []
        gradients: list[Tensor] = []
        rows = max(1, _HEAD_ELEMENTS // self.runner.vocab_size)
        for start in range(0, len(picked), rows):
            hidden = picked[start : start + rows].requires_grad_(wanted)
            logits = exact_head(self.runner, hidden)
            part = slice(start, start + rows)
            essence = slice(max(0, start - targets), max(0, start + len(hidden) - targets))
            value, right, gradient = operators.target_losses_(
                self.before[essence],
                self.unknown[essence],
                logits.detach(),
                t.label[part],
                t.share[part],
                self.kl_factor,
                self.scale,
                wanted,
            )
            values.append(value)
            rights.append(right)
            if wanted:
                gradients += torch.autograd.grad([logits], [hidden], [gradient])
        loss = torch.zeros(len(t.essence), dtype=t.share.dtype, device=picked.device)
        led = torch.zeros_like(loss)
        loss.index_add_(0, t.slot, _joined(values))
        # A row leads if all its targets do.
        led.index_add_(0, t.owner, t.scored.scatter_reduce(0, t.row, _joined(rights), "amin"))
        return loss, led / self.scored, _joined(gradients) if wanted else picked


class _AddedToFirst(torch.autograd.Function):
    """Hidden states (rows, time, d) with something (rows, d) added to the first of each row; a gradient to that."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, added: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, 0] += added
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0][:, 0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _chosen(members: Sequence[Member], width: int) -> RowStates:
    """The states of members that have theirs together."""
    states = members[0].states
    places = [place for member in members for place in member.places]
    if places != list(range(len(states.suffix))):
        states = states.rows(sent(places, torch.int64, states.suffix.device))
    positions, entering = states.positions, states.entering
    return replace(
        states,
        suffix=states.suffix[:, :width],
        positions=None if positions is None else positions[:, :width],
        entering=None if entering is None else entering[:, :width],
    )


def _blank(like: RowStates, rows: int, shape: Shape) -> RowStates:
    """Room for the states of so many rows."""

    def zeros(states: Tensor, *sizes: int) -> Tensor:
        return states.new_zeros(rows, *sizes, *states.shape[1 + len(sizes) :])

    past, entering, positions = like.past, like.entering, like.positions
    if past is not None:
        past = replace(
            past,
            shared=ContextPast(past.shared.contexts, zeros(past.shared.index)),
            keys={layer: zeros(k, k.shape[1], shape.middle) for layer, k in past.keys.items() if shape.middle},
            values={layer: zeros(v, v.shape[1], shape.middle) for layer, v in past.values.items() if shape.middle},
            context_seen=zeros(past.context_seen),
            middle_seen=zeros(past.middle_seen),
        )
    return replace(
        like,
        suffix=zeros(like.suffix, shape.width),
        positions=None if positions is None else zeros(positions, shape.width),
        past=past,
        entering=None if entering is None else zeros(entering, shape.width if past is None else 1),
    )


def _copy_rows(into: RowStates, rows: Tensor, states: RowStates, places: Tensor) -> None:
    """Put the states at some places (n,) into some rows (n,); room behind them is filled with zeros."""

    def put(into: Tensor | None, states: Tensor | None, axis: int | None = None) -> None:
        if into is None:
            return
        if states is None:
            into.index_fill_(0, rows, 0)
        elif axis is None:
            into.index_copy_(0, rows, states.index_select(0, places))
        else:
            room, time = into.shape[axis], min(into.shape[axis], states.shape[axis])
            into.narrow(axis, 0, time).index_copy_(0, rows, states.narrow(axis, 0, time).index_select(0, places))
            into.narrow(axis, time, room - time).index_fill_(0, rows, 0)

    put(into.suffix, states.suffix, 1)
    put(into.positions, states.positions, 1)
    put(into.entering, states.entering, 1)
    if into.past is not None and states.past is not None:
        put(into.past.shared.index, states.past.shared.index)
        put(into.past.context_seen, states.past.context_seen)
        put(into.past.middle_seen, states.past.middle_seen)
        for layer in into.past.keys:
            put(into.past.keys[layer], states.past.keys.get(layer), 2)
            put(into.past.values[layer], states.past.values.get(layer), 2)


def exact_head(runner: Runner, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary), not rounded below fp32, of hidden states (n, d), with a gradient to their precision.

    BLAS multiplies few rows, below four with AVX2 and below eight in its plain code, by adding one token of the
    vocabulary after the other; rows of zeros avoid it.
    """
    if hidden.device.type != "cpu" or len(hidden) >= _HEAD_ROWS:
        return runner.exact_logits(hidden)
    added = _HEAD_ROWS - len(hidden)
    return runner.exact_logits(torch.nn.functional.pad(hidden, (0, 0, 0, added)))[: len(hidden)]
