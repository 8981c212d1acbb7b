"""Keys at the edit layer, and everything else that one truncated pass over the edits' rows yields."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..models.past import ContextPast, Contexts, FrozenPast, Recorder, attention_mask
from ..models.rows import Row
from ..models.runner import Runner
from ..models.verification import all_fused_layers, fused_layers, reads_past_apart, verified


@dataclass(frozen=True)
class ContextRow:
    """A row and the number of the context it starts with."""

    row: Row
    context: int


@dataclass(frozen=True)
class Trail:
    """Rows up to the subject's last token as they enter the first of several edit layers, and what these put out."""

    first: int  # the layer that they enter
    entering: Tensor  # (rows, time, d)
    context: Tensor  # (rows,) int64: which context a row has
    shared: Tensor  # (rows,) int64: how many of its tokens are the context's, and not among these
    at: Tensor  # (rows,) int64: where the subject's last token is
    put_out: dict[int, Tensor]  # (rows, d) by edit layer: its output there, before the edit

    def rows(self, index: Tensor) -> "Trail":
        """These rows only."""
        at = self.at[index]
        time = int(at.max()) + 1
        put_out = {layer: out[index] for layer, out in self.put_out.items()}
        return Trail(self.first, self.entering[index, :time], self.context[index], self.shared[index], at, put_out)

    def to(self, device: torch.device) -> "Trail":
        """The same on a device."""
        entering, context, shared, at = (t.to(device) for t in (self.entering, self.context, self.shared, self.at))
        put_out = {layer: out.to(device) for layer, out in self.put_out.items()}
        return Trail(self.first, entering, context, shared, at, put_out)


@dataclass(frozen=True)
class RowStates:
    """What is known of some rows before a value is optimised. A suffix starts at the subject's last token."""

    keys: Tensor  # (rows, d_ff): input of the down-projection at the subject's last token
    values: Tensor  # (rows, d): its output there, bias included
    suffix: Tensor  # (rows, time, d): output of the edit layer
    positions: Tensor | None  # (rows, time); None where rows are whole, as are the next
    past: FrozenPast | None  # of the layers above the edit layer, and of itself where it is run again
    at: Tensor  # (rows,) where in the suffix the subject's last token is: 0, but further on where rows are whole
    entering: Tensor | None  # (rows, 1, d), or whole rows: what enters the edit layer, where it is run again
    trail: Trail | None = None  # where there are several edit layers, of which this is the last

    def rows(self, index: Tensor) -> "RowStates":
        """These rows only."""
        return RowStates(
            self.keys[index],
            self.values[index],
            self.suffix[index],
            None if self.positions is None else self.positions[index],
            None if self.past is None else self.past.rows(index),
            self.at[index],
            None if self.entering is None else self.entering[index],
        )


@torch.no_grad()
def run_to_layer(
    runner: Runner,
    contexts: Contexts | None,
    rows: Sequence[ContextRow],
    layers: Sequence[int],
    above: Runner | None = None,
) -> RowStates:
    """Run each row behind its context through all layers up to the last of the edit layers, where its states are taken.

    Above that, only what lies before the subject's end is run, by `above` where it is not to be the same runner.
    Without `contexts`, rows are run from their first token on, and all of them is the suffix. The result of a row does
    not depend on the others, up to the rounding of differently shaped products.
    """
    layer = layers[-1]
    found = verified(runner, layer)
    again = not found.adds_unchanged
    if contexts is None:
        return _run_whole(runner, rows, layers, again)
    device = runner.device
    shared = [contexts.shared_with(r.context, r.row) for r in rows]
    packed = runner.pack([r.row.inputs[start:] for r, start in zip(rows, shared, strict=True)])
    start = torch.tensor(shared, device=device)
    subjects = [r.row.subject - first for r, first in zip(rows, shared, strict=True)]
    subject = torch.tensor(subjects, device=device)
    index = torch.arange(len(rows), device=device)
    context = torch.tensor([r.context for r in rows], device=device)

    context_past = ContextPast(contexts, context, start, all_fused_layers(runner, found))
    in_context = torch.arange(contexts.longest, device=device) < start.unsqueeze(1)
    time = packed.ids.shape[1]
    positions = start.unsqueeze(1) + torch.arange(time, device=device)

    seen: list[Tensor] = []

    def see(keys: Tensor, values: Tensor) -> None:
        seen.extend((keys[index, subject], values[index, subject]))

    mask = attention_mask(in_context, time, runner.dtype)
    embedded = runner.embed(packed.ids, positions)
    first = runner.run(embedded, 0, layers[0], positions=positions, mask=mask, past=context_past)
    entering, put_out = first, {}
    for lower, upper in pairwise(layers):
        out = runner.run(entering, lower, lower + 1, positions=positions, mask=mask, past=context_past)
        put_out[lower] = out[index, subject]
        entering = runner.run(out, lower + 1, upper, positions=positions, mask=mask, past=context_past)
    own = Recorder(context_past)
    with runner.watching(layer, see):
        hidden = runner.run(entering, layer, layer + 1, positions=positions, mask=mask, past=own)
    trail = None
    if put_out:
        upto = max(subjects) + 1
        put_out[layer] = hidden[index, subject]
        trail = Trail(layers[0], first[:, :upto], context, start, subject, put_out)

    # The middle: behind the context, before the subject's last token. Its keys and values are frozen as well.
    middle = max(subjects)
    recorder = Recorder(context_past, context_past.fused)
    if middle:
        (above or runner).run(
            hidden[:, :middle],
            layer + 1,
            len(runner.layers),
            positions=positions[:, :middle],
            mask=attention_mask(in_context, middle, hidden.dtype),
            past=recorder,
        )
    if again:
        recorder.keys[layer], recorder.values[layer] = own.keys[layer][:, :, :middle], own.values[layer][:, :, :middle]
    apart, fused = reads_past_apart(runner, found), fused_layers(runner, found)
    past = FrozenPast(context_past, recorder.keys, recorder.values, start, subject, apart, fused)

    width = max(len(r.row.inputs) - r.row.subject for r in rows)
    at = (subject.unsqueeze(1) + torch.arange(width, device=device)).clamp(max=time - 1)
    suffix_positions = subject.unsqueeze(1) + start.unsqueeze(1) + torch.arange(width, device=device)
    return RowStates(
        seen[0],
        seen[1],
        hidden[index.unsqueeze(1), at],
        suffix_positions,
        past,
        torch.zeros_like(subject),
        entering[index, subject].unsqueeze(1) if again else None,
        trail,
    )


def _run_whole(runner: Runner, rows: Sequence[ContextRow], layers: Sequence[int], again: bool) -> RowStates:
    layer = layers[-1]
    packed = runner.pack([r.row.inputs for r in rows])
    subject = torch.tensor([r.row.subject for r in rows], device=runner.device)
    index = torch.arange(len(rows), device=runner.device)
    seen: list[Tensor] = []

    def see(keys: Tensor, values: Tensor) -> None:
        seen.extend((keys[index, subject], values[index, subject]))

    first = runner.run(runner.embed(packed.ids), 0, layers[0])
    entering, put_out = first, {}
    for lower, upper in pairwise(layers):
        out = runner.run(entering, lower, lower + 1)
        put_out[lower] = out[index, subject]
        entering = runner.run(out, lower + 1, upper)
    with runner.watching(layer, see):
        hidden = runner.run(entering, layer, layer + 1)
    trail = None
    if put_out:
        put_out[layer] = hidden[index, subject]
        nothing = torch.zeros_like(subject)
        upto = int(subject.max()) + 1
        trail = Trail(layers[0], first[:, :upto], nothing, nothing, subject, put_out)
    return RowStates(seen[0], seen[1], hidden, None, None, subject, entering if again else None, trail)
