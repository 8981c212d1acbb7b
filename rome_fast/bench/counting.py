"""What the edits of a call would launch on a GPU, counted without one.

The edits are made for real, but on the meta device: search, closing and all that they call run as they are, on tensors
without data (see `launches`). Layers are alike, so the count is that of models with a few of them, carried on to all:
exact, and quicker.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..closing.flow import Flow
from ..closing.geometry import Geometry
from ..edits import Edit
from ..errors import ArgumentError
from ..methods import Method
from ..models.batches import BatchSizer, in_batches, in_turn, standing_for
from ..models.runner import Runner
from ..models.verification import Verified, take_for_verified, verified
from ..opening.defaults import default_layer, default_settings
from ..search.requests import Request, tokenise
from ..search.search import Clock
from ..search.slots import Mode
from ..search.values import ValueSettings, draft_rows
from .launches import Part, Recorder, Stretch, recording
from .shapes import CONTEXTS, random_model, shape_config, small_model

_META = torch.device("meta")
_ENOUGH = 1 << 60  # bytes: requests that are counted together are a batch already
_MANY_STEPS = 100  # more than are taken


@dataclass(frozen=True)
class Batch:
    """What the edits of one batch launch; a step is a gradient, an update of δ and the next evaluation of the loss."""

    edits: int
    rows: int  # padded, as are the next
    draft_rows: int
    suffix: int  # positions of a row
    contexts: list[Stretch]  # once for a call
    keys: list[Stretch]
    draft_first: list[Stretch]  # the first evaluation on some of the rows; nothing where all are few enough
    draft_step: list[Stretch]
    look: list[Stretch]  # in slots, an evaluation on all rows of those whose draft has ended
    first: list[Stretch]  # the first evaluation on all of them
    step: list[Stretch]
    update: list[Stretch]  # every edit apart
    layer: Stretch  # of a step: one layer


@dataclass(frozen=True)
class Call:
    """What the edits of one call launch."""

    shape: str
    settings: ValueSettings
    apart: bool  # whether attention reads the past where it lies
    batches: list[Batch]

    @property
    def edits(self) -> int:
        return sum(batch.edits for batch in self.batches)


def count_call(
    shape: str,
    edits: Sequence[Edit],
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    memory: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    identity: bool = False,
    apart: bool = True,
    fused: bool = True,
    slots: bool = True,
    extrapolated: bool = True,
) -> Call:
    """What one call with these edits of a shape launches on a GPU with so many bytes of memory.

    `identity`: C is the identity; otherwise it has a factor. `apart=False`: the past is gathered, joined and attended
    to by the library, also where that is not needed, layers are run as they are written, and what a step does besides
    is composed in torch; `fused=False`: only the last two. `slots=False`: edits are parted into batches, each of which
    has the size that its edits need; otherwise slots are kept as on a GPU. `extrapolated=False`: all layers are run.

    Raises ArgumentError for an unknown shape, for chats, and for a method whose edits are more than a value in a layer.
    """
    if any(edit.head is not None for edit in edits):
        raise ArgumentError("edits: got a chat, wanted plain prompts, which share their contexts")
    if method.bare or method.spread or method.null_space is not None:
        raise ArgumentError(f"method: got {method.name}, wanted one of one value in one layer, without a null space")
    config = shape_config(shape)
    layer, settings = default_layer(config), default_settings(config)
    found = _found(shape)
    apart = apart and found.attends_apart
    found = replace(found, attends_apart=apart, runs_fused=apart and fused and found.runs_fused)
    above = config.num_hidden_layers - layer - 1
    whole = _Model(shape, dtype, found, method, settings, tokenizer, layer, above, identity, slots)
    requests = [tokenise(whole.runner, tokenizer, edit, CONTEXTS, method) for edit in edits]
    weight_bytes = sum(p.nbytes for p in whole.runner.model.parameters())
    with standing_for("cuda", int(memory) - weight_bytes):
        sizer = BatchSizer(whole.runner, layer, apart=found.attends_apart)
        if slots:
            turns = list(in_turn(sizer, requests))
            parted = [places[start : start + room] for places, room in turns for start in range(0, len(places), room)]
        else:
            parted = list(in_batches(sizer, requests))
    groups = [[requests[i] for i in places] for places in parted]
    few = replace(whole, layer=min(layer, 1), above=min(above, 1))
    lower, upper = replace(few, layer=few.layer + 1), replace(few, above=few.above + 1)
    more = layer - few.layer, above - few.above
    batches = []
    for group in groups:
        if extrapolated:
            base, with_lower, with_upper = (model.parts(group, close=model is few) for model in (few, lower, upper))
            search = slice(len(with_upper))  # what comes behind it has no layers
            parts = _sum((1 - sum(more), base[search]), (more[0], with_lower), (more[1], with_upper))
            parts += base[len(with_upper) :]
            layers = _sum((1, with_upper), (-1, base[search]))
        else:
            parts = layers = whole.parts(group)
        drafted = [draft_rows([r.row for r in request.rows], few.settings) for request in group]
        batches.append(_batch(group, drafted, parts, layers, slots=slots))
    return Call(shape, settings, found.attends_apart, batches)


@dataclass(frozen=True)
class _Model:
    """A model of a shape without data, with so many layers below the edit layer and above it."""

    shape: str
    dtype: torch.dtype
    found: Verified
    method: Method
    settings: ValueSettings
    tokenizer: PreTrainedTokenizerBase
    layer: int
    above: int
    identity: bool
    slots: bool

    @property
    def runner(self) -> Runner:
        return _runner(self.shape, self.dtype, self.layer + 1 + self.above, self.found)

    def parts(self, group: Sequence[Request], *, close: bool = True) -> list[Part]:
        """What the edits of one batch launch when they are made, or when only their values are found.

        The host is told that no edit is done after the first evaluation on some of the rows, and all are after the
        second, and the same on all rows: two evaluations each, with a step between them. In slots, edits are looked at
        in between.
        """
        drafts = bool(draft_rows([r.row for r in group[0].rows], self.settings))
        done = cycle((False, True, False, False, True) if self.slots and drafts else (False, True))

        def read(stage: str, tensor: Tensor) -> Any:
            answer = torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")
            return answer.fill_(next(done) if tensor.dtype == torch.bool else 1).tolist()

        recorder = Recorder(read, composed=not self.found.runs_fused)
        width = self.runner.weight(self.layer).shape[1]
        factor = None if self.identity else torch.empty(width, width, dtype=torch.float64, device=_META)
        settings = replace(self.settings, stop="argmax", margin=0, steps=_MANY_STEPS)
        layers, clock = {self.layer: Geometry(factor)}, _Stages(recorder)
        flow = Flow.measuring(self.runner, self.tokenizer, self.method, layers, CONTEXTS, settings, clock)
        # The host reads what it would wait for; with the gradient in a GPU's queue by then, it does not.
        flow.search.mode = Mode(fixed=self.slots, ahead=self.slots, recorder=None)
        with standing_for("cuda", _ENOUGH), recording(recorder):
            solved = flow.find(group)
            if close:
                flow.close_each(group, solved)
        return recorder.parts


@cache
def _runner(shape: str, dtype: torch.dtype, layers: int, found: Verified) -> Runner:
    """Of a model without data."""
    runner = Runner(random_model(shape, _META, dtype, layers=layers))
    take_for_verified(runner, found)
    return runner


@cache
def _found(shape: str) -> Verified:
    """What holds of a shape's architecture."""
    return verified(Runner(small_model(shape)), 0)


class _Stages(Clock):
    """Tells a recorder which stage it is."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.recorder.begin(stage)
        yield


def _sum(*terms: tuple[int, list[Part]]) -> list[Part]:
    """Part by part, so many times what is launched in each."""
    found = []
    for parts in zip(*(parts for _, parts in terms), strict=True):
        stretches = []
        for several in zip(*(part.stretches for part in parts), strict=True):
            total: Stretch = Counter()
            for (times, _), stretch in zip(terms, several, strict=True):
                for launches, count in stretch.items():
                    total[launches] += times * count
            stretches.append(Counter({launches: count for launches, count in total.items() if count}))
        found.append(Part(parts[0].stage, stretches))
    return found


def _batch(
    group: Sequence[Request], drafted: list[list[int]], parts: list[Part], of_layer: list[Part], *, slots: bool
) -> Batch:
    """What `_Model.parts` has returned, by what it is: the second part of the keys is the contexts."""
    values = [part.stretches for part in parts if part.stage == "values"]
    keys = [part.stretches for part in parts if part.stage == "keys"]
    update = [part.stretches for part in parts if part.stage == "update"]
    *draft, first, step, rest, _ = values
    look = draft.pop() if len(draft) == 3 else []
    (_, contexts, own) = keys
    step_of_layer = [part.stretches for part in of_layer if part.stage == "values"][-3]

    def padded(rows: Sequence[Sequence[object]]) -> int:
        return len(rows) * max(map(len, rows)) if slots else sum(map(len, rows))

    return Batch(
        edits=len(group),
        rows=padded([request.rows for request in group]),
        draft_rows=padded(drafted),
        suffix=max(request.suffix for request in group),
        contexts=contexts,
        keys=own,
        draft_first=draft[0] if draft else [],
        draft_step=draft[1] if draft else [],
        look=[*look, *rest] if look else [],
        first=first if look else [*first, *rest],
        step=step,
        update=[stretch for part in update for stretch in part],
        layer=sum(step_of_layer, Counter()),
    )
