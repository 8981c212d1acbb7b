"""Many single-edit models in one forward pass: every row carries the low-rank update of its own edit.

Layers up to the first edit layer are the same for all of these models, and run once per text; behind it, each row goes
on with its own updates added. Equal to apply, measure, revert, one edit at a time, up to rounding: of sums in
fp32, and of the weight in bf16 and fp16, where an applied update is rounded with the weight and this one is not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..kernels import low_rank_apply_
from ..models.runner import Runner, evaluating
from ..models.verification import check_model, verified
from ..updates.delta import Delta, LowRank
from ..weights import Task

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class RowUpdates:
    """Updates of some layers' down-projections, one in each layer for each of several edits."""

    # By layer, ascending: left (rank, edits, d) fp32 | fp64, and right (rank, edits, d_ff).
    factors: dict[int, tuple[Tensor, Tensor]]
    count: int  # of edits

    @classmethod
    def of(cls, runner: Runner, deltas: Sequence[Delta]) -> "RowUpdates":
        """Raises ArgumentError unless every Delta updates the same layers, and fits this model."""
        sites = [i for i in range(len(runner.layers)) if runner.decoder.has_site(i)]
        layers = {runner.weight_name(i): i for i in sites}
        if strangers := sorted({type(each).__name__ for each in deltas if not isinstance(each, Delta)}):
            raise ArgumentError(f"deltas: got {', '.join(strangers)}, wanted result.delta of each request's own edit")
        wanted = {frozenset(delta.updates) for delta in deltas}
        if len(wanted) != 1 or not (names := next(iter(wanted))) or not names <= set(layers):
            got = sorted({name for found in wanted for name in found})
            raise ArgumentError(f"deltas: got updates of {got or 'nothing'}, wanted those of the same layers in each")
        for delta in deltas:
            delta.check(runner.model)
        factors = {}
        for name in sorted(names, key=layers.__getitem__):
            factors[layers[name]] = _stacked(runner.weight(layers[name]), [delta.updates[name] for delta in deltas])
        return cls(factors, len(deltas))

    @property
    def layers(self) -> list[int]:
        return list(self.factors)

    def add_(self, layer: int, values: Tensor, keys: Tensor, edits: Tensor) -> None:
        """Add to values (rows, time, d), for keys (rows, time, d_ff), what the edits (rows,) make of them; -1: none."""
        ids = edits.repeat_interleave(keys.shape[1])
        for left, right in zip(*self.factors[layer], strict=True):
            low_rank_apply_(values.flatten(0, 1), keys.flatten(0, 1), left, right, ids)


def _stacked(weight: Tensor, updates: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """The factors of one layer's updates, padded to one rank."""
    rank = max(u.left.shape[1] for u in updates)
    left = weight.new_zeros(rank, len(updates), len(weight), dtype=updates[0].left.dtype)
    right = left.new_zeros(rank, len(updates), weight.shape[1])
    for i, update in enumerate(updates):
        left[: update.left.shape[1], i] = update.left.T
        right[: update.left.shape[1], i] = update.right
    return left, right


def packed_by_length(lengths: Sequence[int], batch_tokens: int = _BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices in batches of similar length, each batch's padded size within `batch_tokens` (or a single row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def see_final_states(
    runner: Runner,
    rows: Sequence[Sequence[int]],
    uses: Sequence[tuple[int, int]],
    updates: RowUpdates | None,
    see: Callable[[list[int], Tensor], None],
) -> None:
    """Show `see` the last layer's output of rows of token ids, each under the edits it is used with.

    A use is (row, edit), the edit an index into `updates` or -1 for the model as it is. `see` is called, in an order of
    its own, with the indices of some uses and their hidden states (uses, time, d), right-padded.
    """
    check_model(runner)
    top = len(runner.layers)
    first = top if updates is None else updates.layers[0]
    # Where the edits' values do not arrive unchanged, their first layer is run for each of them.
    again = updates is not None and not verified(runner, first).adds_unchanged
    shared = top if updates is None else first + (not again)  # layers that do not depend on an edit
    behind = [] if updates is None else [layer for layer in updates.layers if layer >= shared]
    of_row: list[list[int]] = [[] for _ in rows]
    for index, (row, _) in enumerate(uses):
        of_row[row].append(index)

    def run(batch: list[int]) -> None:
        packed = runner.pack([rows[i] for i in batch])
        keys: list[Tensor] = []

        def note(seen: Tensor, _output: Tensor) -> None:
            keys.append(seen)

        with nullcontext() if updates is None or again else runner.watching(first, note):
            lower = runner.run(runner.embed(packed.ids), 0, shared)
        wanted = [(place, use) for place, row in enumerate(batch) for use in of_row[row]]
        together = max(1, _BATCH_TOKENS // packed.ids.shape[1])
        for start in range(0, len(wanted), together):
            places, some = zip(*wanted[start : start + together], strict=True)
            at = torch.tensor(places, device=lower.device)
            hidden = lower[at]
            with ExitStack() as stack:
                if updates is not None:
                    edits = torch.tensor([uses[use][1] for use in some], device=lower.device)
                    if not again:
                        updates.add_(first, hidden, keys[0][at], edits)
                    stack.enter_context(carrying(runner, updates, edits, behind))
                states = runner.run(hidden, shared, top)
            see(list(some), states)

    tasks = []
    for batch in packed_by_length([len(row) for row in rows]):
        positions = len(batch) * len(rows[batch[-1]])
        # What enters a layer, what leaves it, and as much while it runs.
        size = 4 * positions * runner.hidden_size * runner.dtype.itemsize
        tasks.append(Task(size, partial(run, batch)))
    with evaluating(runner.model):
        if updates is None:
            runner.in_turn(tasks)
        else:
            for task in tasks:  # whose edits the layers that run must not get from each other
                task.run()


@contextmanager
def carrying(runner: Runner, updates: RowUpdates, edits: Tensor, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Whatever runs the model in this block gets row i under edit `edits[i]`; for generation, which runs it itself.

    That is in all layers of the updates, or only in some.
    """

    def adding(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def add(keys: Tensor, values: Tensor) -> Tensor:
            values = values.clone()
            updates.add_(layer, values, keys, edits)
            return values

        return add

    with ExitStack() as stack:
        for layer in updates.layers if layers is None else layers:
            stack.enter_context(runner.watching(layer, adding(layer)))
        yield
