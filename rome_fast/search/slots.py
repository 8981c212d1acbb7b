"""The search for δ, many edits at once: each in a slot, which the next one waiting gets when it is done.

An edit takes its first steps on some of its rows (its draft) and the last ones on all of them, two phases with slots of
their own. On a CPU, slots are as many as there are edits left and as small as these allow: work that counts for nothing
takes time there. On a GPU their number and shape are kept, as far as edits wait for them, since it is what is done at
once that counts there, and a captured step has a fixed shape. Between the phases an edit is looked at once on all
rows, without a gradient: most are done then.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.rows import Row
from ..models.runner import Runner, frozen_weights
from .capture import CudaRecorder, Gradient, Recorder, Step
from .keys import RowStates
from .objective import Member, Objective, Shape, sent
from .optimiser import State
from .values import Value, ValueSettings, draft_rows

# Positions of a step above which it is not captured. On an H200, 35 edits of llama-2-7b at once gained nothing by it.
CAPTURED_POSITIONS = 1024


class Chunk(NamedTuple):
    """Edits whose keys were found together."""

    rows: Sequence[Sequence[Row]]  # of each edit; the last may be one without a target (an essence row)
    states: RowStates  # of all rows, one edit after the other
    base_values: Tensor  # (edits, d): the v₀


@dataclass(frozen=True)
class Mode:
    """How slots are kept."""

    fixed: bool  # in number and shape, as long as edits wait for them
    ahead: bool  # δ is moved before the host knows which edits are done; those stay where they are
    recorder: Recorder | None  # of steps


def usual_mode(runner: Runner) -> Mode:
    """What is fastest: of a GPU, one that never waits for the host. A streamed model's weights have no fixed place."""
    if runner.device.type != "cuda" or runner.stream is not None:
        return Mode(fixed=False, ahead=False, recorder=None)
    return Mode(fixed=True, ahead=True, recorder=CudaRecorder(runner.device))


def optimise_values(
    runner: Runner,
    chunks: Iterable[Chunk],
    layer: int,
    settings: ValueSettings,
    edits: int,
    *,
    room: int | None = None,
    mode: Mode | None = None,
    tell: Callable[[int], None] | None = None,
) -> list[Value]:
    """Find δ for so many edits, in their order, by a runner of `search_runner`.

    The KL term of an edit is taken in its last row if that has no target, otherwise in the first. All edits have the
    same number of rows with a target. Chunks are taken when there is room for them: at most `room` edits are optimised
    at once. `tell` is called with the number of edits done.
    """
    dtype = torch.promote_types(runner.dtype, torch.float32)
    state = State(edits, runner.hidden_size, settings, dtype, runner.device)
    done = 0
    with frozen_weights(runner.model):
        search = _Search(runner, layer, state, mode or usual_mode(runner), room or edits, iter(chunks))
        while turn := search.turn():
            ended = search.step(*turn)
            done += ended
            if ended and tell is not None:
                tell(done)
        return state.values()


class _Search:
    """Edits on their way from the chunks through the phases."""

    def __init__(
        self, runner: Runner, layer: int, state: State, mode: Mode, room: int, chunks: Iterator[Chunk]
    ) -> None:
        self.runner, self.layer, self.state, self.mode, self.room = runner, layer, state, mode, room
        self.chunks: Iterator[Chunk] | None = chunks  # None once all of them are taken
        self.phases: list[_Phase] = []
        self._taken = 0  # edits

    def turn(self) -> tuple[int, bool] | None:
        """The phase whose turn it is, and whether other edits may come to it yet; None when all edits are done.

        It is that of those who are furthest, as soon as there are enough of them.
        """
        while self.chunks is not None and not (self.phases and self.phases[0].full):
            chunk = next(self.chunks, None)
            if chunk is None:
                self.chunks = None
            else:
                self._take(chunk)
        for number, phase in reversed(list(enumerate(self.phases))):
            more = self.chunks is not None or any(earlier.busy for earlier in self.phases[:number])
            if phase.busy and (phase.full or not more):
                return number, more
        return None

    def step(self, number: int, more: bool) -> int:
        """A step of a phase; how many edits are done with the last one."""
        phase = self.phases[number]
        left, ended = phase.step(more)
        if phase.drafts and left:
            self.state.draft_ends(sent([member.edit for member in left], torch.int64, self.runner.device))
            self.phases[number + 1].waiting += [replace(m.all, before=m.before) for m in left if m.all is not None]
            return 0
        if not phase.moves:
            self.phases[number + 1].waiting += [member for member, over in zip(left, ended, strict=True) if not over]
        return sum(ended)

    def _take(self, chunk: Chunk) -> None:
        members, start = [], 0
        for edit, rows in enumerate(chunk.rows, self._taken):
            member = Member(edit, rows, chunk.states, range(start, start + len(rows)))
            chosen = draft_rows(rows, self.state.settings)
            members.append(member.some(chosen) if chosen else member)
            start += len(rows)
        edits = range(self._taken, self._taken + len(members))
        self.state.enter(sent(edits, torch.int64, self.runner.device), chunk.base_values)
        self._taken += len(members)
        self.phases = self.phases or self._phases(drafts=members[0].all is not None)
        self.phases[0].waiting += members

    def _phases(self, *, drafts: bool) -> list["_Phase"]:
        settings, common = self.state.settings, (self.runner, self.layer, self.state, self.mode, self.room)
        if not drafts:
            return [_Phase(*common, settings.most, settings.margin)]
        draft = _Phase(*common, settings.most - 1, settings.margin, drafts=True)
        # A draft has had its margin of steps.
        look, last = _Phase(*common, settings.most, 0, moves=False), _Phase(*common, settings.most, 0)
        return [draft, look, last] if self.mode.fixed else [draft, last]


class _Phase:
    """Edits that wait for a slot, and those that have one, from their first step in the phase to their last."""

    def __init__(
        self,
        runner: Runner,
        layer: int,
        state: State,
        mode: Mode,
        room: int,
        most: int,
        margin: int,
        *,
        drafts: bool = False,
        moves: bool = True,  # otherwise every edit is evaluated once
    ) -> None:
        self.runner, self.layer, self.state, self.mode, self.room = runner, layer, state, mode, room
        self.most, self.margin, self.drafts, self.moves = most, margin, drafts, moves
        self.waiting: deque[Member] = deque()
        self.slots: list[Member | None] = []
        self._work: _Work | None = None
        self._alone = 0  # steps since an edit was given a slot

    @property
    def present(self) -> list[Member]:
        return [member for member in self.slots if member is not None]

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.present)

    @property
    def full(self) -> bool:
        """Whether all slots that there is room for will have an edit in the next step."""
        return len(self.waiting) + len(self.present) >= self.room

    def step(self, more: bool) -> tuple[list[Member], list[bool]]:
        """Evaluate and move the edits in the slots; those that leave, and whether they are done.

        `more`: other edits may come yet.
        """
        objective, step = self._seat(more)
        step.evaluate(math.inf if more or self.waiting else self.most - self._alone)
        self._alone += 1
        read = _to_host(self._done)
        if self.moves and self.mode.ahead:
            step.move()
        left, ended = [], []
        for slot, over in enumerate(read()):
            member = self.slots[slot]
            if member is not None and (over or not self.moves):
                left.append(replace(member, before=objective.before[slot].clone()) if self.drafts else member)
                ended.append(over)
                self.slots[slot] = None
        if self.moves and not self.mode.ahead and self.present:
            step.move()
        if not (more or self.busy):
            self._work, self.slots = None, []
        return left, ended

    def _seat(self, more: bool) -> "_Work":
        """Give slots to those that wait."""
        present, work = self.present, self._work
        if not self.mode.fixed:
            if work is None or len(present) < len(self.slots):
                members = present or self._next(self.room)
                work = self._lay_out(members, Shape.of(members))
            return work
        wanted = min(self.room, len(present) + len(self.waiting))
        count = max(wanted, len(self.slots))
        while not more and count > 1 and (count + 1) // 2 >= wanted:
            count = (count + 1) // 2
        slots = self.slots if count == len(self.slots) else [*present, *[None] * (count - len(present))]
        free = [slot for slot, member in enumerate(slots) if member is None]
        new = dict(zip(free, self._next(len(free)), strict=False))
        shape = self._padded([*present, *new.values()], count)
        if work is None or shape != work.objective.shape:
            return self._lay_out([new.get(slot, member) for slot, member in enumerate(slots)], shape)
        for slot, member in new.items():
            self.slots[slot] = member
        if new:
            work.objective.exchange(new)
        if free:
            # Also where nobody takes the place of one that has left, which may be in another phase by now.
            self._edits.copy_(self._numbers())
        return work

    def _next(self, most: int) -> list[Member]:
        if most and self.waiting:
            self._alone = 0
        return [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]

    def _padded(self, members: Sequence[Member], count: int) -> Shape:
        """A shape that these members fit into, no smaller than the last one but for the number of slots.

        Where steps are captured it is one of a few, since each has to be captured anew.
        """
        rows = max(len(member.rows) for member in (*members, *self.waiting))
        targets, width, middle = (max(getattr(m, name) for m in members) for name in ("targets", "width", "middle"))
        if self._captured(count * rows, width):
            width = rounded_up(width)
        found = rows, rounded_up(targets), width, rounded_up(middle)
        if self._work is not None:
            last = self._work.objective.shape
            found = tuple(map(max, found, (last.rows[0], last.targets[0], last.width, last.middle)))
        rows, targets, width, middle = found
        return Shape((rows,) * count, (targets,) * count, width, middle)

    def _captured(self, rows: int, width: int) -> bool:
        """Whether steps on so many positions are to be captured."""
        return self.moves and self.mode.recorder is not None and rows * width <= CAPTURED_POSITIONS

    def _numbers(self) -> Tensor:
        """(slots,) int64: the row of each slot's edit in the state."""
        edits = [self.state.nobody if member is None else member.edit for member in self.slots]
        return sent(edits, torch.int64, self.runner.device)

    def _lay_out(self, slots: Sequence[Member | None], shape: Shape) -> "_Work":
        """Make the tensors that the next steps work on."""
        if self._work is not None:
            known = {member: self._work.objective.before[slot] for slot, member in enumerate(self.slots)}
            slots = [replace(m, before=known[m]) if m is not None and m in known else m for m in slots]
        self.slots = list(slots)
        self._work = None  # which frees its memory
        self._edits = edits = self._numbers()
        self._done = done = torch.zeros_like(edits, dtype=torch.bool)
        objective = Objective(self.runner, self.layer, slots, shape, self.state.settings.kl_factor)

        # What they work on but not the phase, which holds them: in a cycle a model would outlive its last user.
        state, most, margin, moves = self.state, self.most, self.margin, self.moves

        def evaluate() -> Gradient:
            loss, led, gradient = objective.evaluate(state.delta.index_select(0, edits), gradient=moves)
            state.judge(edits, loss, led, most, margin, done)
            return gradient

        def move(gradient: Tensor) -> None:
            state.move(edits, gradient)

        recorder = self.mode.recorder if self._captured(sum(shape.rows), shape.width) else None
        self._work = _Work(objective, Step(evaluate, move, objective.renew, recorder))
        return self._work


class _Work(NamedTuple):
    """What a step works on, and how."""

    objective: Objective
    step: Step


def rounded_up(size: int) -> int:
    """The least of 0, 1, 2, 3, 4, 6, 8, 12, 16, … that is not below."""
    power = 1 << max(0, size - 1).bit_length()
    return size if size < 4 else power * 3 // 4 if size <= power * 3 // 4 else power


def _to_host(flags: Tensor) -> Callable[[], list[bool]]:
    """A function that waits for what the flags are now; a GPU copies them when it has come so far, and goes on."""
    if flags.device.type != "cuda":
        return flags.tolist
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    copy.copy_(flags, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[bool]:
        copied.synchronize()
        found: list[bool] = copy.tolist()
        return found

    return read
