"""Keys at the edit layer, and everything else that one truncated pass over the edits' rows yields."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .past import ContextPast, Contexts, FrozenPast, Recorder, attention_mask
from .rows import Row
from .runner import Runner


@dataclass(frozen=True)
class ContextRow:
    """A row and the number of the context it starts with."""

    row: Row
    context: int


@dataclass(frozen=True)
class RowStates:
    """What is known of some rows before a value is optimised. A suffix starts at the subject's last token."""

    keys: Tensor  # (rows, d_ff): input of the down-projection at the subject's last token
    values: Tensor  # (rows, d): its output there, bias included
    suffix: Tensor  # (rows, time, d): output of the edit layer
    positions: Tensor  # (rows, time)
    past: FrozenPast  # of the layers above the edit layer

    def rows(self, index: Tensor) -> "RowStates":
        """These rows only."""
        return RowStates(
            self.keys[index],
            self.values[index],
            self.suffix[index],
            self.positions[index],
            self.past.rows(index),
        )


@torch.no_grad()
def run_to_layer(
    runner: Runner, contexts: Contexts, rows: Sequence[ContextRow], layer: int, above: Runner | None = None
) -> RowStates:
    """Run each row behind its context through layers 0 .. layer; above, only what lies before the subject's end.

    `above` runs the layers above, where it is not to be the same runner. The result of a row does not depend on the
    others, up to the rounding of differently shaped products.
    """
    device = runner.device
    shared = [contexts.shared_with(r.context, r.row) for r in rows]
    packed = runner.pack([r.row.inputs[start:] for r, start in zip(rows, shared, strict=True)])
    start = torch.tensor(shared, device=device)
    subjects = [r.row.subject - first for r, first in zip(rows, shared, strict=True)]
    subject = torch.tensor(subjects, device=device)
    index = torch.arange(len(rows), device=device)
    context = torch.tensor([r.context for r in rows], device=device)

    context_past = ContextPast(contexts, context)
    longest = contexts.recorded.keys[0].shape[2]
    in_context = torch.arange(longest, device=device) < start.unsqueeze(1)
    time = packed.ids.shape[1]
    positions = start.unsqueeze(1) + torch.arange(time, device=device)

    seen: list[Tensor] = []

    def see(keys: Tensor, values: Tensor) -> None:
        seen.extend((keys[index, subject], values[index, subject]))

    embedded = runner.embed(packed.ids, positions)
    with runner.watching(layer, see):
        hidden = runner.run(
            embedded,
            0,
            layer + 1,
            positions=positions,
            mask=attention_mask(in_context, time, embedded.dtype),
            past=context_past,
        )

    # The middle: behind the context, before the subject's last token. Its keys and values are frozen as well.
    middle = max(subjects)
    recorder = Recorder(context_past)
    if middle:
        (above or runner).run(
            hidden[:, :middle],
            layer + 1,
            len(runner.layers),
            positions=positions[:, :middle],
            mask=attention_mask(in_context, middle, hidden.dtype),
            past=recorder,
        )
    in_middle = torch.arange(middle, device=device) < subject.unsqueeze(1)
    past = FrozenPast(context_past, recorder.keys, recorder.values, torch.cat([in_context, in_middle], 1))

    width = max(len(r.row.inputs) - r.row.subject for r in rows)
    at = (subject.unsqueeze(1) + torch.arange(width, device=device)).clamp(max=time - 1)
    suffix_positions = subject.unsqueeze(1) + start.unsqueeze(1) + torch.arange(width, device=device)
    return RowStates(seen[0], seen[1], hidden[index.unsqueeze(1), at], suffix_positions, past)
