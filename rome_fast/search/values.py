"""The values of edits: δ, found by gradient descent on the layers above the edit layer, many edits at once.

loss = mean NLL of the target over the rows + kl_factor · KL(after ‖ before) of the next token at the end of the
subject + weight_decay · ‖δ‖ / ‖v₀‖²   (ROME, Meng et al. 2022, equation 4, with the released code's weight decay)

The decay has a slope at δ = 0: where that of the NLL is smaller there, the edit stays where it is for ever. So our own
stop rule drops the decay of an edit that has not moved after a few steps.

Only what δ can change is computed: layers above the edit layer, positions from the subject's last token on, logits
where a target token or the KL term needs them. The edits of a batch are independent; one that is done leaves it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.batches import free_memory
from ..models.past import attention_mask
from ..models.products import multiplies_fast
from ..models.rows import Row
from ..models.runner import Runner, frozen_weights
from .keys import RowStates

Stop = Literal["argmax", "loss"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

_HEAD_ELEMENTS = 1 << 25  # logits at a time, which bounds the memory of the head
_HEAD_ROWS = 8  # at least; with fewer, 1e-4 of a gradient was rounding
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


@dataclass(frozen=True)
class _Targets:
    """Which positions of which rows are scored, for which token, with which share in which edit's loss."""

    row: Tensor  # (n,)
    time: Tensor
    label: Tensor
    share: Tensor
    edit: Tensor


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
            draft = _Batch(runner, layer, chosen_states, some, settings.kl_factor)
            search.run(draft, edits, most - 1, settings.margin, settle=False)
            before = draft.initial
            del draft, chosen_states
        batch = _Batch(runner, layer, states, rows, settings.kl_factor, before)
        # A draft has had its margin of steps.
        search.run(batch, edits, most, 0 if drafted[0] else settings.margin, settle=True)
    return search.values


def scored_rows(rows: Sequence[Row]) -> int:
    """How many of an edit's rows have a target: all of them, or all but the last."""
    return len(rows) if rows[-1].labels else len(rows) - 1


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
        self.adam = _Adam(self.delta, settings.learning_rate)
        self.losses: list[list[float]] = [[] for _ in base_values]
        self._drafted = [0] * len(base_values)
        self._values: list[Value | None] = [None] * len(base_values)

    @property
    def values(self) -> list[Value]:
        return [value for value in self._values if value is not None]

    def run(self, batch: "_Batch", edits: list[int], most: int, margin: int, *, settle: bool) -> None:
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


class _Batch:
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


class _Adam:
    """Adam (Kingma & Ba 2015) on the rows of a matrix, each with steps of its own."""

    def __init__(self, parameters: Tensor, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        # In fp32, 1 - 0.999 would be wrong by 5e-5 of itself, and every update with it.
        self.steps = torch.zeros(len(parameters), 1, dtype=torch.float64, device=parameters.device)

    def forget(self, row: int) -> None:
        """Begin anew with this row."""
        for moment in (self.first, self.second, self.steps):
            moment[row] = 0

    def step(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """What to add to these rows."""
        self.steps[rows] += 1
        steps = self.steps[rows]
        self.first[rows] = self.first[rows].lerp(gradient, 0.1)
        self.second[rows] = self.second[rows] * 0.999 + 0.001 * gradient**2
        scale = self.second[rows].sqrt() / (1 - 0.999**steps).sqrt().to(gradient.dtype) + 1e-8
        return -(self.learning_rate / (1 - 0.9**steps)).to(gradient.dtype) * self.first[rows] / scale
