"""Checkpoints by path or hub id: loaded as a whole, or laid out under a budget without reading their weights."""

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..assets import quiet_transformers
from ..errors import ArgumentError, CheckpointError, ModelError, RomeFastError
from ..models import Decoder, oriented
from ..models.batches import free_memory
from ..weights import Checkpoint, OnRead, Parts, Placement, Stream, parse_bytes, place, recover, stored_runs
from ..weights.files import check_writable
from ..weights.memory import anonymous_bytes
from .admission import admit_file, checked_dtype
from .defaults import default_layer

_ADAPTER = "adapter_config.json"
_NAMED = 5  # missing tensors, in an error
_FREE_SHARE = 0.8  # of the memory that is free, for a model that is read from disk


def resolve(source: str | Path, *, code: bool = False, download: bool = True) -> Path:
    """The local directory of a checkpoint: a directory as it is, a hub id downloaded or found in the hub cache.

    A change in place that was cut short is completed first. `code` also fetches Python files from the hub.
    Raises CheckpointError; without `download`, also for what is not in the cache.
    """
    directory = Path(source)
    if directory.is_dir():
        recover(directory)
        return directory
    admit_file(directory)
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
        return Path(snapshot_download(str(source), allow_patterns=patterns, local_files_only=not download))
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model: {source} is neither a directory nor a model that the hub can deliver ({type(error).__name__}); "
            "check the spelling, or give the path of a local checkpoint"
        ) from error


def load(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Model (by default in the checkpoint's dtype), tokenizer and local directory.

    Code that lies in the directory runs with `trust_remote_code` only. Raises CheckpointError for a damaged
    checkpoint and ModelError for an architecture that cannot be edited.
    """
    checked_device(device)
    wanted = checked_dtype(dtype)
    directory = resolve(source, code=trust_remote_code)
    Checkpoint.open(directory)
    model = load_model(directory, device=device, dtype=wanted, trust_remote_code=trust_remote_code)
    return model, load_tokenizer(directory, trust_remote_code=trust_remote_code), directory


def load_model(
    directory: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint as a whole; raises CheckpointError."""
    auto = _auto_class(_config(directory, trust_remote_code))
    with _loading(directory):
        loaded: Any = auto.from_pretrained(
            directory,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        if missing := sorted(loaded[1]["missing_keys"]):
            # They were drawn at random, anew for every process that loads them.
            raise CheckpointError(
                f"model: {directory} holds no tensor {', '.join(missing[:_NAMED])}"
                f"{', …' if len(missing) > _NAMED else ''}, which its config.json asks for; fetch it again, or correct "
                "the config (tie_word_embeddings, where only the head is missing)"
            )
        # The wrapper of transformers around this method hides its types.
        model.to(checked_device(device))  # type: ignore[arg-type]
    return model


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; raises CheckpointError."""
    with _loading(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Outline:
    """A checkpoint, where its weights would be under a budget, and the model without them."""

    directory: Path
    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    layers: tuple[int, ...]  # edit layers, ascending
    device: torch.device
    parts: Parts | None  # None where all of it fits, as is the next
    placement: Placement | None

    @property
    def layer(self) -> int:
        """The last of the edit layers, where δ is found."""
        return self.layers[-1]

    def stream(self, on_read: OnRead | None = None) -> Stream:
        """Start reading; close the stream when done."""
        if self.parts is None or self.placement is None:
            raise ArgumentError("memory: the whole model fits, so there is nothing to stream; use checkpoints.load")
        layers = Decoder(self.skeleton).layers
        return Stream(self.skeleton, layers, self.parts, self.placement, self.device, on_read)


def outline(
    source: str | Path,
    *,
    memory: int | str | None = None,
    layer: int | Sequence[int] | Callable[[PretrainedConfig], Sequence[int]] | None = None,
    device: str = "cpu",
    identity: bool = False,
    collecting: bool = False,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Outline:
    """Find out what of a checkpoint stays in memory; no weight is read yet.

    `layer` is the edit layer or several, a function of the model's config that says which, or None for the default.
    `memory` bounds what weights, buffers and hidden states take; by default what is free on the device. Without
    `identity`, room is left for the statistics of one edit layer. With `collecting`, second moments of those layers are
    summed up in place of an edit: nothing above them is run. In another `dtype` than its
    own, a checkpoint has to fit as a whole. Raises CheckpointError, ModelError, and ArgumentError for a layer that is
    not there, a budget that is too small, and a dtype under a budget.
    """
    directory = resolve(source, code=trust_remote_code)
    checkpoint = Checkpoint.open(directory)
    config, target = _config(directory, trust_remote_code), checked_device(device)
    with _loading(directory):
        skeleton = _skeleton(checkpoint, config, _dtype(config, checkpoint), target, trust_remote_code)
        _untie_stored_head(skeleton, checkpoint)
    decoder = Decoder(skeleton)
    if layer is None or callable(layer):
        by_config = (default_layer(config),) if layer is None else layer(config)
        layers = decoder.sites_of(checked_layers(by_config, len(decoder.layers)))
    else:
        layers = checked_layers(layer, len(decoder.layers))
    edited = [decoder.weight_name(each) for each in layers]
    weights = [skeleton.get_parameter(name) for name in edited]
    width = max(oriented(skeleton, *pair).shape[1] for pair in zip(edited, weights, strict=True))
    if collecting:
        # A sum in fp64 and a mean in fp32 each, and one sum twice.
        edited, occupied = [], (12 * len(layers) + 8) * width**2
    else:
        # An edit holds its weights three times for a moment, and one factor of C with what it is made of.
        occupied = 2 * sum(weight.nbytes for weight in weights) + (0 if identity else 20 * width**2)
    if memory is not None and target.type == "cpu":
        occupied += anonymous_bytes()
    budget = int(_FREE_SHARE * free_memory(target)) if memory is None else parse_bytes(memory)
    size = sum(entry.end - entry.begin for entry in checkpoint.entries.values())
    other = None if dtype is None or dtype == skeleton.dtype else dtype
    if other is not None:
        if memory is not None:
            raise ArgumentError(
                f"dtype: got {other} with a budget of memory, under which weights are read as they are stored, in "
                f"{skeleton.dtype}; leave out one of the two"
            )
        size = size * other.itemsize // skeleton.dtype.itemsize
        if size * 9 // 8 + occupied > budget:
            raise ArgumentError(
                f"dtype: the checkpoint takes {size:,} bytes in {other}, which do not fit, and is read in parts as it "
                f"is stored only, in {skeleton.dtype}; leave dtype out"
            )
    if size * 9 // 8 + occupied <= budget:
        return Outline(directory, checkpoint, skeleton, layers, target, None, None)
    parts = Parts(skeleton, decoder.layers, checkpoint, stored_runs(checkpoint, skeleton), edited)
    placement = place(parts.blocks, layers[-1], budget, parts.always_bytes, occupied, above=not collecting)
    return Outline(directory, checkpoint, skeleton, layers, target, parts, placement)


def checked_layers(layers: object, count: int) -> tuple[int, ...]:
    """One layer or several of a model that has `count`, in ascending order; ArgumentError for others."""
    found: list[Any] = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    for layer in found:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
            raise ArgumentError(f"layer: got {layer!r}, wanted one of 0 .. {count - 1}")
    if not found or len(set(found)) < len(found):
        raise ArgumentError(f"layers: got {found}, wanted at least one, none of them twice")
    return tuple(sorted(found))


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except RomeFastError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"model: {directory} cannot be loaded: {error}") from error


def _config(directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    """CheckpointError without a readable config, ModelError for one that is of no causal language model."""
    try:
        stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind, own = stored["model_type"], stored.get("auto_map")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"model: {directory} has no readable config.json ({error})") from error
    if kind not in CONFIG_MAPPING and not (own and trust_remote_code):
        raise ModelError(
            f"model: got architecture {kind!r}, whose code lies in {directory}; it runs only with "
            "trust_remote_code=True and can do anything then: read it first"
            if own
            else f"model: got architecture {kind!r}, which transformers {transformers.__version__} does not have; a "
            "newer release may have it"
        )
    with _loading(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder or _auto_class(config) is None:
        raise ModelError(
            f"model: got architecture {kind!r}, wanted a causal language model, a decoder alone, that "
            "AutoModelForCausalLM loads"
        )
    if os.path.lexists(directory / _ADAPTER):
        # transformers puts it on the model where peft is installed; its weights are no part of a copy.
        raise ModelError(
            f"model: {directory} holds an adapter of peft ({_ADAPTER}) beside the model, wanted a model alone; merge "
            "it and save what merge_and_unload() returns, or move the adapter's files elsewhere"
        )
    return config


def _auto_class(config: PretrainedConfig) -> Any:
    """What loads a decoder with this config: as a whole, where it reads images as well. None for what is no decoder."""
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    classes = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((auto for auto in classes if type(config) in auto._model_mapping), None)


def _dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The one that `from_pretrained(dtype="auto")` takes."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = (checkpoint.entry(name).dtype for name in checkpoint.names())
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def _skeleton(
    checkpoint: Checkpoint, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with all parameters on the meta device; buffers, stored or computed from the config, on `device`."""
    directory = checkpoint.directory
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model: {directory} is quantised, wanted weights in bfloat16, float16, float32 or float64")
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                blank = torch.nan if buffer.is_floating_point() else 0
                setattr(module, name, torch.full_like(buffer, blank, device=device))
    for module in model.modules():
        if any(True for _ in module.buffers()):
            # Rotary frequencies, tables of positions: not stored, but a function of the config. `from_pretrained` does
            # the same, on the CPU; weights stay on the meta device.
            with torch.device("cpu"):
                model._init_weights(module)
    stored = set(checkpoint.names())
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(checkpoint.read(name))
        elif buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise ModelError(f"model: {directory} does not hold {name}; load it as a whole (with more memory)")
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config._name_or_path = str(directory)
    # Rows are looked up in a table of the wanted ones, in which padding has no place of its own.
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None
    return model.eval()


def _untie_stored_head(skeleton: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give the head a weight of its own where the checkpoint has one for it, whatever the config says of tying.

    `from_pretrained` ties the two only where they are equal, and then reading both gives the same.
    """
    head: Any = skeleton.get_output_embeddings()
    embedding: Any = skeleton.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    prefix, stored = f"{skeleton.base_model_prefix}.", set(checkpoint.names())
    names = {id(module): f"{name}.weight" for name, module in skeleton.named_modules()}
    if all({name, name.removeprefix(prefix)} & stored for name in (names[id(head)], names[id(embedding)])):
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def checked_device(name: str | torch.device) -> torch.device:
    """A device that a model can run on; ArgumentError for others."""
    try:
        device = torch.device(name)
        usable = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except (RuntimeError, TypeError):
        usable = False
    if not usable:
        raise ArgumentError(f"device: got {name!r}, wanted 'cpu', or 'cuda' where torch finds such a device")
    return device


def check_new(out: str | Path) -> None:
    """Raise before hours are spent on what cannot be written.

    ArgumentError where `out` exists or has no directory to be in, CheckpointError where that cannot be written to.
    """
    if os.path.lexists(out):
        raise ArgumentError(f"out: {out} exists already; choose a new name or remove it")
    parent = Path(out).absolute().parent
    if not parent.is_dir():
        raise ArgumentError(f"out: the directory {parent} does not exist; make it first")
    check_writable(parent)


def versions() -> dict[str, str]:
    """Of this package and of what its results depend on."""
    try:
        own = version("rome-fast")
    except PackageNotFoundError:
        own = "not installed"
    return {
        "rome_fast": own,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
