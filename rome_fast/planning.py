"""What an edit of a checkpoint will read, before it starts."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch

from .closing.history import History
from .editor import (
    check_kind_of_history,
    check_kind_of_statistics,
    check_rounds,
    check_schedule,
    checked_contexts,
)
from .edits import Edit, asked_edits
from .errors import ModelError
from .methods import DEFAULT_METHOD, Method, cost_of, method_named
from .models.batches import BatchSizer, in_batches
from .models.runner import Runner
from .opening import checkpoints
from .opening.admission import admit_tokenizer, checked_dtype
from .opening.defaults import select
from .opening.opening import given_layers
from .runs.processes import own_device
from .search.contexts import SAMPLED_TOKENS
from .search.requests import as_one, bare_requests, by_head, merged_by_subject, tokenise
from .search.search import KEPT_CONTEXTS
from .search.values import ValueSettings
from .statistics import Statistics, first_token_passes, likely_choice, likely_layers
from .weights import Checkpoint, parse_bytes

_SAMPLED = 20  # contexts, where none are given
_SAMPLE_BYTES = 256 << 20
_CHUNK_BYTES = 16 << 20
_PRODUCT = 512  # rows and columns of the product that is measured


@dataclass(frozen=True)
class Plan:
    """Where the weights of a checkpoint will be during an edit, and how much is read when.

    Figures of stages are upper bounds: values may converge early, and what is in the buffer is not read again.
    """

    model_bytes: int
    memory_bytes: int | None  # the budget; None where none was given
    layers: tuple[int, ...]  # edit layers
    resident_layers: tuple[int, ...]
    streamed_layers: tuple[int, ...]
    head_resident: bool
    buffer_bytes: int
    batches: int  # groups of edits whose values are optimised together; about, where contexts are sampled
    passes: dict[str, int]  # by stage, over the layers it needs
    read_bytes: dict[str, int]  # by stage
    bytes_per_second: float  # of plain sequential reading, measured on a part of the checkpoint
    seconds_reading: float  # computing comes on top, as far as it does not happen meanwhile
    rows_bytes: int  # of the largest group's rows on their way through several edit layers, on top of the budget
    # Of the largest group of edits that are made together, in the closed form of every edit layer; with those of
    # earlier edits, where they are remembered.
    closing_columns: int
    closing_bytes: int  # of one of them, on top of the model
    closing_seconds: (
        float  # of all layers and groups, at the measured rate; what the rows take on their way comes on top
    )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        layers = len(self.resident_layers) + len(self.streamed_layers)
        memory = "what is free" if self.memory_bytes is None else _gigabytes(self.memory_bytes)
        edited = f"edit layer{'' if len(self.layers) == 1 else 's'} {', '.join(map(str, self.layers))}"
        lines = [
            f"model {_gigabytes(self.model_bytes)}, {layers} layers, {edited}; memory: {memory}",
            f"in memory: {len(self.resident_layers)} layers{' and the head' if self.head_resident else ''}; read while "
            f"needed: {len(self.streamed_layers)} layers{'' if self.head_resident else ' and the head'}, through a "
            f"buffer of {_gigabytes(self.buffer_bytes)}",
        ]
        lines += [
            f"  {stage}: {_gigabytes(self.read_bytes[stage])} in {count} pass{'' if count == 1 else 'es'}"
            for stage, count in self.passes.items()
        ]
        lines.append(
            f"at most {_gigabytes(sum(self.read_bytes.values()))} to read, {self.seconds_reading:.0f} s at "
            f"{self.bytes_per_second / 1e9:.2f} GB/s (measured, the system's cache included); computing not counted"
        )
        if self.rows_bytes:
            lines.append(
                f"rows on their way through the edit layers: about {_gigabytes(self.rows_bytes)} beside the budget"
            )
        columns = f"{self.closing_columns:,} column{'' if self.closing_columns == 1 else 's'}"
        lines.append(
            f"closed form: {columns} for each edit layer, {_gigabytes(self.closing_bytes)} at a time, "
            f"{self.closing_seconds:.3g} s (at the rate of a product in float64, measured)"
        )
        return "\n".join(lines)


def plan(
    model: str | Path,
    edits: Sequence[Edit] | Edit,
    *,
    statistics: Statistics | Literal["identity"] | None = None,
    method: str | Method = DEFAULT_METHOD,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    schedule: Literal["joint", "sequential"] = "joint",
    contexts: Sequence[str] | None = None,
    settings: ValueSettings | Mapping[str, Any] | None = None,
    batch_size: int = 1,
    rounds: int = 1,
    history: History | bool = False,
    measure: bool = True,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `apply_edits` with these arguments would keep in memory and read; only a sample of the weights is read.

    Raises what `apply_edits` raises for arguments and checkpoints that it refuses.
    """
    edits = asked_edits(edits)
    how = method_named(method)
    check_schedule(schedule, batch_size)
    check_rounds(rounds)
    check_kind_of_history(history)
    given = given_layers(layer, layers)
    if not isinstance(model, str | Path):
        raise ModelError(f"model: got {type(model).__name__}, wanted the path of a checkpoint, since a plan is for one")
    outline = checkpoints.outline(
        model,
        memory=memory,
        layer=partial(likely_layers, statistics=statistics, spread=how.spread) if given is None else given,
        device=own_device(device),
        identity=isinstance(statistics, str),
        dtype=checked_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    check_rounds(rounds, streamed=outline.placement is not None)
    check_kind_of_statistics(statistics, outline.layers)
    earlier = None if isinstance(history, bool) else history
    if earlier is not None:
        earlier.check_keys(outline.layers, len(how.columns))
    tokenizer = checkpoints.load_tokenizer(outline.directory, trust_remote_code=trust_remote_code)
    admit_tokenizer(tokenizer, outline.skeleton, [f"{edit.text} {edit.target}" for edit in edits])
    config = outline.skeleton.config
    first, last = outline.layers[0], outline.layer
    steps = select(config, outline.layers, settings, likely_choice(config, statistics)).settings.steps
    texts = ("It rained all day. ",) * _SAMPLED if contexts is None else checked_contexts(contexts)
    runner = _Outlined(outline)
    requests = [tokenise(runner, tokenizer, edit, texts, how) for edit in edits]
    group = len(edits) if schedule == "joint" else batch_size
    groups = [requests[start : start + group] for start in range(0, len(requests), group)]
    width, key_size = runner.weight(last).shape
    columns = [len(how.columns) * len(each) for each in groups]
    if how.remembers or history is not False:
        columns = list(accumulate(columns, initial=0 if earlier is None else len(earlier.first_tokens)))[1:]
    costs = [cost_of(count, key_size, width) for count in columns]
    closing_flops = rounds * len(outline.layers) * sum(cost.flops for cost in costs)
    # Of every position up to the subject: what enters the first of the layers, where it is now, and its key there.
    positions = max(sum(len(request.rows) * (request.middle + 1) for request in each) for each in groups)
    rows_bytes = positions * (2 * width + key_size) * (runner.dtype.itemsize)
    # Those of other chats have contexts of their own.
    heads_of_groups = [len(by_head(each)) for each in groups]
    groups = [[each[i] for i in places] for each in groups for _, places in by_head(each)]
    sizer = BatchSizer(runner, outline.layer)
    merged = groups
    if how.merges:
        merged = [[as_one([g[i] for i in some]) for some in merged_by_subject(g, sizer.fits)] for g in groups]
    together = [part for each in merged for part in (each, bare_requests(each))]
    batches = sum(len(list(in_batches(sizer, part))) for part in together)

    count, kept = len(runner.layers), outline.placement
    total = sum(entry.end - entry.begin for entry in outline.checkpoint.entries.values())
    resident = frozenset(range(count + 1)) if kept is None else kept.resident
    stages: dict[str, tuple[int, int]] = {"loading": (1, total)}
    if kept is not None and outline.parts is not None:
        blocks = [block.size for block in outline.parts.blocks]
        sizes = [0 if index in resident else size for index, size in enumerate(blocks)]
        above, whole = sum(sizes[last + 1 : -1]), sum(sizes)
        edited = sum(sizes[layer] for layer in outline.layers)
        stages["loading"] = (1, sum(blocks) - whole + outline.parts.always_bytes)
        stages["check for NaN"] = (1, whole)
        # The model's own forward, its layers one by one, and behind a past, without the head; then the edit layers.
        stages["verification"] = (3, 2 * whole + sum(sizes[:-1]) + edited)
        if contexts is None:
            # If enough of the texts that are sampled at a time are usable.
            stages["contexts"] = (SAMPLED_TOKENS, SAMPLED_TOKENS * whole)
        if any(request.bare for request in requests) or (earlier is not None and bool(earlier.first_tokens.any())):
            passes = first_token_passes(runner, last)
            stages["first tokens"] = (passes, passes * sum(sizes[: last + 1]))
        if measure:
            stages["measuring"] = (2, 2 * whole)
        # Of the contexts, groups behind the first one of a head run the edit layers again and those above.
        heads = len({each[0].edit.head for each in groups})
        again = (len(groups) - heads) * sum(sizes[first:-1])
        stages["keys"] = (len(groups) + batches, (heads + batches) * sum(sizes[:-1]) + again)
        if first < last:
            # From one edit layer to the next, and once more for those that are left when some were left out.
            passes, anew = 2 * len(groups), 2 * sum(count for count in heads_of_groups if count > KEPT_CONTEXTS)
            stages["spreading"] = (passes + anew, passes * sum(sizes[first : last + 1]) + anew * sum(sizes[:-1]))
            if how.arrival != "here":
                # From behind each of them to the last one as well.
                ahead = sum(sum(sizes[layer + 1 : last + 1]) for layer in outline.layers)
                stages["looking ahead"] = (passes * (len(outline.layers) - 1), passes * ahead)
        evaluations = steps * batches
        stages["values"] = (2 * evaluations - batches, evaluations * (2 * above + sizes[-1]) - batches * above)
    rate = _reading_rate(outline.checkpoint)
    return Plan(
        model_bytes=total,
        memory_bytes=None if memory is None else parse_bytes(memory),
        layers=outline.layers,
        resident_layers=tuple(i for i in range(count) if i in resident),
        streamed_layers=tuple(i for i in range(count) if i not in resident),
        head_resident=count in resident,
        buffer_bytes=0 if kept is None else kept.buffer_bytes,
        batches=batches,
        passes={stage: passes for stage, (passes, _) in stages.items()},
        read_bytes={stage: size for stage, (_, size) in stages.items()},
        bytes_per_second=rate,
        seconds_reading=sum(size for _, size in stages.values()) / rate,
        rows_bytes=rows_bytes if first < last else 0,
        closing_columns=max(columns),
        closing_bytes=max(cost.bytes for cost in costs),
        closing_seconds=closing_flops / _product_rate(outline.device),
    )


class _Outlined(Runner):
    """A runner that runs nothing, and answers as the one of the edit will."""

    def __init__(self, outline: checkpoints.Outline) -> None:
        super().__init__(outline.skeleton)
        self._outline = outline

    @property
    def device(self) -> torch.device:
        return self._outline.device

    @property
    def spare_bytes(self) -> int | None:
        return None if self._outline.placement is None else self._outline.placement.activation_bytes


def _reading_rate(checkpoint: Checkpoint) -> float:
    """Bytes per second of reading the end of the largest shard."""
    file = max((header.path for header in checkpoint.shards.values()), key=lambda path: path.stat().st_size)
    buffer = bytearray(_CHUNK_BYTES)
    with file.open("rb", buffering=0) as reader:
        reader.seek(max(0, os.fstat(reader.fileno()).st_size - _SAMPLE_BYTES))
        start, count = time.perf_counter(), 0
        while got := reader.readinto(buffer):
            count += got
        return count / (time.perf_counter() - start)


def _product_rate(device: torch.device) -> float:
    """FLOP/s of a product in fp64."""
    one = torch.ones(_PRODUCT, _PRODUCT, dtype=torch.float64, device=device)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        (one @ one).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * _PRODUCT**3 / min(seconds)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count / 1e6:.2f} MB"
