"""Edits with near keys: no weight gives one key two values, and telling near ones apart takes a large update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import Record

_AT_ONCE = 1024  # keys compared with all others


def tell_nearest(records: Sequence[Record], keys: Sequence[Tensor]) -> None:
    """Write into every record which other one has the nearest of the keys (d_ff,), by cosine."""
    if len(keys) < 2:
        return
    units = torch.nn.functional.normalize(torch.stack(list(keys)).to(torch.float32), dim=1)
    for start in range(0, len(units), _AT_ONCE):
        cosines = units[start : start + _AT_ONCE] @ units.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -torch.inf
        for record, cosine, place in zip(records[start:], *(t.tolist() for t in cosines.max(1)), strict=False):
            record.nearest, record.nearest_cosine = place, cosine
