"""Edited checkpoints: a complete directory that transformers loads, with what was done to it and the way back."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .assets import quiet_transformers
from .batches import free_memory
from .defaults import default_layer
from .delta import Delta
from .errors import ArgumentError, CheckpointError, ModelError, RomeFastError
from .models import Decoder, is_transposed, known_model_types
from .weights import (
    Checkpoint,
    Link,
    OnRead,
    Parts,
    Placement,
    Stream,
    change,
    changing,
    load_tensors,
    parse_bytes,
    place,
    recover,
    save_tensors,
    write_edited,
)
from .weights.files import Content

RECORD_FILE = "rome_fast.json"
DELTA_FILE = "rome_fast_delta.safetensors"
ORIGINALS_FILE = "rome_fast_originals.safetensors"

_FREE_SHARE = 0.8  # of the memory that is free, for a model that is read from disk


def resolve(source: str | Path, *, code: bool = False) -> Path:
    """The local directory of a checkpoint: a directory as it is, a hub id downloaded or found in the hub cache.

    A change in place that was cut short is completed first. `code` also fetches Python files from the hub.
    """
    directory = Path(source)
    if directory.is_dir():
        recover(directory)
        return directory
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model: {source} is neither a directory nor a model that the hub can deliver ({type(error).__name__}); "
            "check the spelling, or give the path of a local checkpoint"
        ) from error


def load(
    source: str | Path, *, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Model (in the checkpoint's dtype), tokenizer and local directory.

    Code that lies in the directory runs with `trust_remote_code` only. Raises CheckpointError for a damaged
    checkpoint and ModelError for an architecture that cannot be edited.
    """
    directory = resolve(source, code=trust_remote_code)
    Checkpoint.open(directory)
    _check_architecture(directory)
    model = load_model(directory, device=device, trust_remote_code=trust_remote_code)
    return model, load_tokenizer(directory, trust_remote_code=trust_remote_code), directory


def load_model(directory: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint as a whole; raises CheckpointError."""
    model: PreTrainedModel
    with _loading(directory):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
        )
        # The wrapper of transformers around this method hides its types.
        model.to(_device(device))  # type: ignore[arg-type]
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
    layer: int
    device: torch.device
    parts: Parts | None  # None where all of it fits, as is the next
    placement: Placement | None

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
    layer: int | None = None,
    device: str = "cpu",
    identity: bool = False,
    collecting: int = 0,
    trust_remote_code: bool = False,
) -> Outline:
    """Find out what of a checkpoint stays in memory; no weight is read yet.

    `memory` bounds what weights, buffers and hidden states take; by default what is free on the device. Without
    `identity`, room is left for the statistics of the edit layer. With `collecting`, second moments of so many layers,
    `layer` the last of them, are summed up in place of an edit: nothing above it is run. Raises CheckpointError,
    ModelError, and ArgumentError for a layer that is not there and a budget that is too small.
    """
    directory = resolve(source, code=trust_remote_code)
    checkpoint = Checkpoint.open(directory)
    _check_architecture(directory)
    target = _device(device)
    with _loading(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        skeleton = _skeleton(directory, config, _dtype(config, checkpoint), target, trust_remote_code)
    count = config.num_hidden_layers
    layer = default_layer(config) if layer is None else layer
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
        raise ArgumentError(f"layer: got {layer!r}, wanted one of 0 .. {count - 1}")
    decoder = Decoder(skeleton)
    edited = decoder.weight_name(layer)
    weight = skeleton.get_parameter(edited)
    # An edit holds its weight three times for a moment, and the factor of C with what it is made of.
    width = weight.shape[0 if is_transposed(skeleton, edited) else 1]
    occupied = 2 * weight.nbytes + (0 if identity else 20 * width**2)
    if collecting:
        # A sum in fp64 and a mean in fp32 each, and one sum twice.
        occupied = (12 * collecting + 8) * width**2
    if memory is not None and target.type == "cpu":
        occupied += anonymous_bytes()
    budget = int(_FREE_SHARE * free_memory(target)) if memory is None else parse_bytes(memory)
    size = sum(entry.end - entry.begin for entry in checkpoint.entries.values())
    if size * 9 // 8 + occupied <= budget:
        return Outline(directory, checkpoint, skeleton, layer, target, None, None)
    names = {name: stored_name(checkpoint, name, skeleton) for name, _ in skeleton.named_parameters()}
    parts = Parts(skeleton, decoder.layers, checkpoint, names, edited)
    placement = place(parts.blocks, layer, budget, parts.always_bytes, occupied, above=not collecting)
    return Outline(directory, checkpoint, skeleton, layer, target, parts, placement)


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except RomeFastError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"model: {directory} cannot be loaded: {error}") from error


def _check_architecture(directory: Path) -> None:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"model: {directory} has no readable config.json ({error})") from error
    if kind not in known_model_types():
        raise ModelError(f"model: got architecture {kind!r}, wanted one of {', '.join(known_model_types())}")


def _dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The one that `from_pretrained(dtype="auto")` takes."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = (checkpoint.entry(name).dtype for name in checkpoint.names())
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def _skeleton(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with all parameters on the meta device; what is computed from the config is on `device`."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model: {directory} is quantised, wanted weights in bfloat16, float16, float32 or float64")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    for module in model.modules():
        absent = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name, buffer in absent:
            setattr(module, name, torch.full_like(buffer, torch.nan, device=device))
        if absent:
            # Rotary frequencies, tables of positions: not stored, but a function of the config. `from_pretrained` does
            # the same; weights stay on the meta device.
            model._init_weights(module)
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.config._name_or_path = str(directory)
    # Rows are looked up in a table of the wanted ones, in which padding has no place of its own.
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None
    return model.eval()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        usable = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    except (RuntimeError, TypeError):
        usable = False
    if not usable:
        raise ArgumentError(f"device: got {name!r}, wanted 'cpu', or 'cuda' where torch finds such a device")
    return device


def anonymous_bytes() -> int:
    """What this process holds by now; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0


def check_new(out: str | Path) -> None:
    """Raise ArgumentError when `out` exists, before hours are spent on what cannot be written."""
    if Path(out).exists():
        raise ArgumentError(f"out: {out} exists already; choose a new name or remove it")


@contextmanager
def changing_in_place(source: str | Path) -> Iterator[None]:
    """Hold a checkpoint directory for an edit in place, so that no second one begins.

    Raises ArgumentError where `source` is no directory or holds an edit already, whose way back would be lost, and
    CheckpointError where another process is changing it.
    """
    directory = Path(source)
    if not directory.is_dir():
        raise ArgumentError(f"in_place: got {source}, wanted the directory of a checkpoint; give a new one as out")
    with changing(directory):
        if (directory / RECORD_FILE).exists():
            raise ArgumentError(
                f"in_place: {directory} is edited already, and its original bytes would be lost; undo that with "
                f"rome-fast revert {directory}, or give a new directory as out"
            )
        yield


def write(
    source: str | Path,
    out: str | Path | None,
    model: PreTrainedModel,
    delta: Delta,
    record: Mapping[str, Any],
    link: Link = "copy",
) -> None:
    """Copy the checkpoint at `source` to `out` with the weights that `delta` changed, as they are in `model`.

    Beside the usual files, `out` holds `rome_fast.json` (`record`, versions, hashes), the delta and the original
    bytes of what it changed, which `revert` puts back. Nothing appears under `out` unless all of it does. With `out`
    None, inside `changing_in_place(source)`, the source itself is changed, all of it or nothing.
    """
    source = Path(source)
    checkpoint = Checkpoint.open(source)
    edited: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    for name in delta.updates:
        stored = stored_name(checkpoint, name, model)
        originals[stored] = checkpoint.read(stored)
        edited[stored] = model.get_parameter(name).detach().cpu().to(originals[stored].dtype)
    document = {
        **record,
        "versions": versions(),
        "sha256": {
            name: {"original": tensor_sha256(originals[name]), "edited": tensor_sha256(edited[name])} for name in edited
        },
    }
    extra_files: dict[str, Content] = {
        RECORD_FILE: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(),
        DELTA_FILE: delta.save,
        ORIGINALS_FILE: lambda path: save_tensors(path, originals, {}),
    }
    if out is None:
        change(source, edited, extra_files=extra_files)
    else:
        write_edited(source, out, edited, extra_files, link)


def revert(directory: str | Path) -> list[str]:
    """Give every weight of an edited checkpoint its original bytes again; returns the names of those restored.

    The shard is byte-identical to the source's afterwards, and rome_fast's own files are gone. A kill leaves the
    directory edited or restored, once the next command has run. Raises CheckpointError, before anything is written,
    for a directory that was not edited by rome_fast, whose originals do not match their recorded hashes, whose
    weights are no longer those of the edit, or which another process is changing.
    """
    directory = Path(directory)
    if recover(directory) and not (directory / RECORD_FILE).exists():
        return []  # what was cut short was a revert
    read_record(directory)
    with changing(directory):
        originals, faults = _recorded_originals(directory)
        if faults:
            raise CheckpointError(f"{'; '.join(faults)}; nothing was changed")
        change(directory, originals, remove=[DELTA_FILE, ORIGINALS_FILE, RECORD_FILE])
    return sorted(originals)


def verify(directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the last byte and check all that can be known of it; returns what was found.

    That is the index, headers and sizes, that no weight is NaN or infinite, and in an edited checkpoint the hashes of
    the edited weights and of the originals that `revert` needs, and the delta. A change in place that was cut short is
    completed first. Raises CheckpointError that lists every fault.
    """
    directory = Path(directory)
    recovered = directory.is_dir() and recover(directory)
    checkpoint = Checkpoint.open(directory)
    faults = []
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) and not bool(
            torch.isfinite(tensor).all()
        ):
            faults.append(f"{checkpoint.shard_of(name)}: {name} contains NaN or infinity")
    edited: list[str] = []
    if (directory / RECORD_FILE).exists():
        originals, wrong = _recorded_originals(directory, edited_only=True)
        faults += wrong
        edited = sorted(originals)
        try:
            Delta.load(directory / DELTA_FILE)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"{directory}: {'; '.join(faults)}")
    return {
        "directory": str(directory),
        "tensors": len(checkpoint.names()),
        "bytes": sum(entry.end - entry.begin for entry in checkpoint.entries.values()),
        "edited": edited,
        "recovered": recovered,
    }


def _recorded_originals(directory: Path, *, edited_only: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The original weights beside an edit, and what does not match the record, the weights in the shards included.

    Where a revert was cut short, some weights are the originals already; `edited_only` calls that a fault.
    """
    originals, _ = load_tensors(directory / ORIGINALS_FILE)
    checkpoint = Checkpoint.open(directory)
    recorded = read_record(directory).get("sha256")
    recorded = recorded if isinstance(recorded, dict) else {}
    faults = []
    for name in sorted({*recorded, *originals}):
        hashes = recorded.get(name)
        hashes = hashes if isinstance(hashes, dict) else {}
        if name not in originals or tensor_sha256(originals[name]) != hashes.get("original"):
            faults.append(f"{directory / ORIGINALS_FILE}: {name} is missing or damaged")
            continue
        allowed = {hashes.get("edited"), None if edited_only else hashes["original"]}
        if tensor_sha256(checkpoint.read(name)) not in allowed:
            faults.append(f"{directory}: {name} was changed after the edit")
    return originals, faults


def read_record(directory: str | Path) -> dict[str, Any]:
    """What `write` recorded; CheckpointError for a directory without it."""
    file = Path(directory) / RECORD_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: it has no {RECORD_FILE}, so it was not edited by rome_fast") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: it cannot be read ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: it is not a record of an edit")
    return document


def stored_name(checkpoint: Checkpoint, parameter: str, model: PreTrainedModel) -> str:
    """A parameter's name in the checkpoint; published GPT-2 ones leave the base model's prefix out."""
    names = set(checkpoint.names())
    for name in (parameter, parameter.removeprefix(f"{model.base_model_prefix}.")):
        if name in names:
            return name
    raise CheckpointError(f"{checkpoint.directory}: it holds no tensor {parameter}")


def tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


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
