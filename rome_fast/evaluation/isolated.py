"""Many single-edit models in one forward pass: every row carries the low-rank update of its own edit.

Layers up to the edit layer are the same for all of these models, and run once per text; behind the edit layer, each
row goes on with its own update added. Equal to apply, measure, revert, one edit at a time, up to rounding: of sums in
fp32, and of the weight in bf16 and fp16, where an applied update is rounded with the weight and this one is not.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import Delta
from ..errors import ArgumentError
from ..kernels import low_rank_apply_
from ..runner import Runner, evaluating
from ..verification import check_model, verified

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class RowUpdates:
    """Updates of one layer's down-projection, one for each of several edits."""

    layer: int
    left: Tensor  # (rank, edits, d) fp32 | fp64
    right: Tensor  # (rank, edits, d_ff)

    @classmethod
    def of(cls, runner: Runner, deltas: Sequence[Delta]) -> "RowUpdates":
        """Raises ArgumentError unless every Delta updates the same one layer of this model."""
        names = {name for delta in deltas for name in delta.updates} if all(d.updates for d in deltas) else set()
        layers = [i for i in range(len(runner.layers)) if runner.decoder.has_site(i) and runner.weight_name(i) in names]
        if len(names) != 1 or not layers:
            raise ArgumentError(f"deltas: got updates of {sorted(names) or 'nothing'}, wanted one layer's in each")
        updates = [next(iter(delta.updates.values())) for delta in deltas]
        weight = runner.weight(layers[0])
        if wrong := {(len(u.left), u.right.shape[1]) for u in updates} - {tuple(weight.shape)}:
            raise ArgumentError(f"deltas: got updates of shape {sorted(wrong)}, wanted {tuple(weight.shape)}")
        for delta in deltas:
            delta.check(runner.model)
        rank = max(u.left.shape[1] for u in updates)
        left = weight.new_zeros(rank, len(updates), len(weight), dtype=updates[0].left.dtype)
        right = left.new_zeros(rank, len(updates), weight.shape[1])
        for i, update in enumerate(updates):
            left[: update.left.shape[1], i] = update.left.T
            right[: update.left.shape[1], i] = update.right
        return cls(layers[0], left, right)

    def add_(self, values: Tensor, keys: Tensor, edits: Tensor) -> None:
        """Add to values (rows, time, d), for keys (rows, time, d_ff), what the edits (rows,) make of them; -1: none."""
        ids = edits.repeat_interleave(keys.shape[1])
        for left, right in zip(self.left, self.right, strict=True):
            low_rank_apply_(values.flatten(0, 1), keys.flatten(0, 1), left, right, ids)


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


def final_states(
    runner: Runner,
    rows: Sequence[Sequence[int]],
    uses: Sequence[tuple[int, int]],
    updates: RowUpdates | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """The last layer's output of rows of token ids, each under the edits it is used with.

    A use is (row, edit), the edit an index into `updates` or -1 for the model as it is. Yields, in an order of its
    own, the indices of some uses and their hidden states (uses, time, d), right-padded.
    """
    check_model(runner)
    top = len(runner.layers)
    # Where the edits' values do not arrive unchanged, their layer is run for each of them.
    again = updates is not None and not verified(runner, updates.layer).adds_unchanged
    shared = top if updates is None else updates.layer + (not again)  # layers that do not depend on an edit
    of_row: list[list[int]] = [[] for _ in rows]
    for index, (row, _) in enumerate(uses):
        of_row[row].append(index)
    for batch in packed_by_length([len(row) for row in rows]):
        packed = runner.pack([rows[i] for i in batch])
        keys: list[Tensor] = []

        def see(seen: Tensor, _output: Tensor, keys: list[Tensor] = keys) -> None:
            keys.append(seen)

        seeing = nullcontext() if updates is None or again else runner.watching(updates.layer, see)
        with evaluating(runner.model), seeing:
            lower = runner.run(runner.embed(packed.ids), 0, shared)
        wanted = [(place, use) for place, row in enumerate(batch) for use in of_row[row]]
        together = max(1, _BATCH_TOKENS // packed.ids.shape[1])
        for start in range(0, len(wanted), together):
            places, some = zip(*wanted[start : start + together], strict=True)
            at = torch.tensor(places, device=lower.device)
            hidden = lower[at]
            with evaluating(runner.model), ExitStack() as stack:
                if updates is not None:
                    edits = torch.tensor([uses[use][1] for use in some], device=lower.device)
                    if again:
                        stack.enter_context(carrying(runner, updates, edits))
                    else:
                        updates.add_(hidden, keys[0][at], edits)
                states = runner.run(hidden, shared, top)
            yield list(some), states


@contextmanager
def carrying(runner: Runner, updates: RowUpdates, edits: Tensor) -> Iterator[None]:
    """Whatever runs the model in this block gets row i under edit `edits[i]`; for generation, which runs it itself."""

    def add(keys: Tensor, values: Tensor) -> Tensor:
        values = values.clone()
        updates.add_(values, keys, edits)
        return values

    with runner.watching(updates.layer, add):
        yield
