"""Opening what is to be edited: a model in memory, or a checkpoint, which is streamed where it does not fit."""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError, ModelError
from ..methods import Method
from ..models import Decoder
from ..models.runner import Runner
from ..runs.processes import Processes, own_device
from ..statistics import Statistics, likely_layers, tuned_choice
from ..updates import chains
from ..weights import OnRead, Stream, align_
from ..weights.files import check_writable
from . import checkpoints
from .admission import admit_model, checked_dtype
from .defaults import select

_CHECKED_AT_ONCE = 1 << 20  # elements; a sum in fp32 copies what it sums


@dataclass(frozen=True)
class Destination:
    """Where an edited model goes, if anywhere."""

    out: str | Path | None = None
    in_place: bool = False
    lora: str | Path | None = None

    def check(self) -> None:
        """Raise ArgumentError or CheckpointError for a place where nothing could be written later."""
        if self.out is not None:
            checkpoints.check_new(self.out)
            check_writable(Path(self.out))
            if self.in_place:
                raise ArgumentError(f"out: got {self.out} and in_place=True, wanted one of them")
        if self.lora is not None:
            self._check_adapter(self.lora)

    def _check_adapter(self, lora: str | Path) -> None:
        place = Path(lora).absolute()
        if place.exists():
            raise ArgumentError(f"lora: {lora} exists already; choose a new name or remove it")
        if self.out is not None:
            out = Path(self.out).absolute()
            if place == out or out in place.parents:
                raise ArgumentError(f"lora: got {lora}, the same as out or inside of it, wanted another directory")
        if self.in_place:
            raise ArgumentError("lora: got it with in_place=True, where the model that the adapter belongs to is gone")
        check_writable(place)

    def check_outside(self, source: Path) -> None:
        """Raise ArgumentError for a place to write to that is in the source."""
        for name, place in (("out", self.out), ("lora", self.lora)):
            if place is not None and source.resolve() in Path(place).resolve().parents:
                raise ArgumentError(f"{name}: {place} lies inside the source, which is only read; choose another place")


@dataclass(frozen=True)
class Opened:
    """A model ready to be edited, and the checkpoint that it comes from, if it does."""

    runner: Runner
    tokenizer: PreTrainedTokenizerBase
    source: Path | None = None
    converted: bool = False  # to another dtype than the checkpoint's

    @property
    def model(self) -> PreTrainedModel:
        return self.runner.model


def open_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    destination: Destination,
    *,
    memory: int | str | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Opened:
    """A model in memory; raises ModelError and ArgumentError for what cannot be had of one."""
    admit_model(model, or_path=True)
    if tokenizer is None:
        raise ArgumentError("tokenizer: got None, wanted the model's tokenizer, since the model is in memory")
    if destination.in_place:
        raise ArgumentError("in_place: got True for a model in memory, which is edited itself in any case")
    if memory is not None:
        raise ArgumentError("memory: got a budget for a model that is in memory already; give its checkpoint")
    _check_where_it_is(model, device, dtype)
    align_(model)
    return Opened(Runner(model), tokenizer)


def open_checkpoint(
    stack: ExitStack,
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    destination: Destination | None,
    *,
    layers: tuple[Any, ...] | Callable[[PretrainedConfig], Sequence[int]] | None,
    method: Method,
    statistics: Statistics | str | None,
    memory: int | str | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    processes: Processes,
    on_read: OnRead | None,
) -> Opened:
    """A checkpoint, as a whole where it fits, until the stack is closed; raises what `apply_edits` does of one.

    `destination` is None for one that others write from.
    """
    if destination is None:
        destination = Destination()
    elif destination.out is None and destination.lora is None and not destination.in_place:
        raise ArgumentError(
            "out: got None, wanted a new directory, since the model is a checkpoint on disk; "
            "in_place=True changes the checkpoint itself"
        )
    own = own_device(device)
    if destination.in_place and processes.rank == 0:
        stack.enter_context(chains.changing_in_place(source))
    # Where it was found to be cut short, that has been put right by now.
    processes.wait()
    outlined = partial(
        checkpoints.outline,
        source,
        memory=memory,
        device=own,
        identity=isinstance(statistics, str),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    likely = partial(likely_layers, statistics=statistics, spread=method.spread)
    outline = outlined(layer=likely if layers is None else layers)
    converted = dtype not in (None, outline.skeleton.dtype)
    if destination.in_place and converted:
        raise ArgumentError(
            f"dtype: got {dtype} with in_place=True, where weights stay in {outline.skeleton.dtype}; give a "
            "new directory as out"
        )
    directory = outline.directory
    chains.check_continues(directory)
    destination.check_outside(directory)
    tokenizer = tokenizer or checkpoints.load_tokenizer(directory, trust_remote_code=trust_remote_code)
    if outline.placement is None:
        model = checkpoints.load_model(directory, device=own, dtype=dtype, trust_remote_code=trust_remote_code)
        admit_model(model)
        align_(model)
        return Opened(_with_its_past(Runner(model), directory), tokenizer, directory, converted)
    stream = outline.stream(on_read)
    if layers is None:
        stream = _at_its_layers(stream, outline, outlined, method, statistics, on_read)
    stack.enter_context(closing(stream))
    align_(stream.model)
    return Opened(_with_its_past(Runner(stream.model, stream), directory), tokenizer, directory, converted)


def open_to_read(
    stack: ExitStack,
    source: str | Path,
    *,
    changed: Collection[str] = (),
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """A checkpoint whose model is run and not edited, as a whole without a budget of `memory`, until the stack closes.

    With one, the weights `changed` stay in memory, those of them that an edit can change, so that an update can be
    added to them. Raises what `checkpoints.outline` and `checkpoints.load` do.
    """
    own, wanted = own_device(device), checked_dtype(dtype)
    if memory is not None:
        outlined = partial(
            checkpoints.outline,
            source,
            memory=memory,
            device=own,
            identity=True,
            dtype=wanted,
            trust_remote_code=trust_remote_code,
        )
        outline = outlined()
        decoder = Decoder(outline.skeleton)
        sites = [layer for layer in range(len(decoder.layers)) if decoder.has_site(layer)]
        if kept := [layer for layer in sites if decoder.weight_name(layer) in changed]:
            outline = outlined(layer=kept)
        if outline.placement is not None:
            tokenizer = checkpoints.load_tokenizer(outline.directory, trust_remote_code=trust_remote_code)
            stream = outline.stream()
            stack.enter_context(closing(stream))
            align_(stream.model)
            return Opened(Runner(stream.model, stream), tokenizer, outline.directory)
    model, tokenizer, directory = checkpoints.load(
        source, device=own, dtype=wanted, trust_remote_code=trust_remote_code
    )
    admit_model(model)
    align_(model)
    return Opened(Runner(model), tokenizer, directory)


def given_layers(layer: int | None, layers: Sequence[int] | None) -> tuple[Any, ...] | None:
    """What the caller wants, to be checked against the model; None for what is usual."""
    if layer is not None and layers is not None:
        raise ArgumentError(f"layers: got {layers!r} and layer={layer!r}, wanted one of the two")
    if layers is None:
        return None if layer is None else (layer,)
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ArgumentError(f"layers: got {layers!r}, wanted at least one, as [7, 8, 9]")
    return tuple(layers)


def check_weights(runner: Runner, layers: tuple[int, ...]) -> None:
    """NaN anywhere makes every later figure meaningless; name the parameter before any work is done."""
    for layer in layers:
        weight = runner.stored_weight(layer)
        if not _is_wide(weight):
            raise ModelError(
                f"model: the weight of layer {layer} has dtype {weight.dtype}, wanted bfloat16, float16, float32 or "
                "float64; load the model without quantisation"
            )
    for name, parameter in runner.parameters():
        if not _is_wide(parameter):
            continue
        if not all(map(_is_finite, parameter.detach().reshape(-1).split(_CHECKED_AT_ONCE))):
            raise ModelError(f"model: {name} contains NaN or infinity; load an undamaged checkpoint")


def _with_its_past(runner: Runner, directory: Path) -> Runner:
    runner.overwritten = chains.overwritten(directory, runner.model)
    return runner


def _at_its_layers(
    stream: Stream,
    outline: checkpoints.Outline,
    outlined: Callable[..., checkpoints.Outline],
    method: Method,
    statistics: Statistics | str | None,
    on_read: OnRead | None,
) -> Stream:
    """The stream with the edit layers in place: which ones `rome-fast tune` chose, only weights tell for certain."""
    try:
        runner = Runner(stream.model, stream)
        chosen = select(stream.model.config, tuned=tuned_choice(runner, statistics), spread=method.spread).layers
        layers = runner.decoder.sites_of(chosen)
        if layers == outline.layers:
            return stream
    except BaseException:
        stream.close()
        raise
    stream.close()
    return outlined(layer=layers).stream(on_read)


def _check_where_it_is(model: PreTrainedModel, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
    """Raise ArgumentError for a device or dtype that a model in memory does not have."""
    have, want = model.device, None if device is None else checkpoints.checked_device(device)
    if want is not None and (want.type != have.type or want.index not in (None, have.index)):
        raise ArgumentError(
            f"device: got {device} for a model in memory on {have}; move it by model.to({str(device)!r})"
        )
    if dtype not in (None, model.dtype):
        raise ArgumentError(
            f"dtype: got {dtype} for a model in memory in {model.dtype}; convert it by model.to({dtype})"
        )


def _is_finite(part: torch.Tensor) -> bool:
    # One read of the weights: a sum is finite unless an element is not, or it overflows, which is looked into.
    total = part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(part).all())


def _is_wide(weight: torch.Tensor) -> bool:
    """A float dtype that arithmetic is defined for: not one of those that only store quantised weights."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize >= 2
