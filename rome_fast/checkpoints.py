"""Edited checkpoints: a complete directory that transformers loads, with what was done to it and the way back."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .assets import quiet_transformers
from .delta import Delta
from .errors import ArgumentError, CheckpointError, ModelError
from .models import known_model_types
from .weights import Checkpoint, load_tensors, restore_tensors, save_tensors, write_edited

RECORD_FILE = "rome_fast.json"
DELTA_FILE = "rome_fast_delta.safetensors"
ORIGINALS_FILE = "rome_fast_originals.safetensors"


def resolve(source: str | Path) -> Path:
    """The local directory of a checkpoint: a directory as it is, a hub id downloaded or found in the hub cache."""
    directory = Path(source)
    if directory.is_dir():
        return directory
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model: {source} is neither a directory nor a model that the hub can deliver ({type(error).__name__}); "
            "check the spelling, or give the path of a local checkpoint"
        ) from error


def load(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path]:
    """Model (in the checkpoint's dtype), tokenizer and local directory.

    Raises CheckpointError for a damaged checkpoint and ModelError for an architecture that cannot be edited.
    """
    directory = resolve(source)
    Checkpoint.open(directory)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"model: {directory} has no readable config.json ({error})") from error
    if kind not in known_model_types():
        raise ModelError(f"model: got architecture {kind!r}, wanted one of {', '.join(known_model_types())}")
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"model: {directory} cannot be loaded: {error}") from error
    return model, tokenizer, directory


def check_new(out: str | Path) -> None:
    """Raise ArgumentError when `out` exists, before hours are spent on what cannot be written."""
    if Path(out).exists():
        raise ArgumentError(f"out: {out} exists already; choose a new name or remove it")


def write(source: str | Path, out: str | Path, model: PreTrainedModel, delta: Delta, record: Mapping[str, Any]) -> None:
    """Copy the checkpoint at `source` to `out` with the weights that `delta` changed, as they are in `model`.

    Beside the usual files, `out` holds `rome_fast.json` (`record`, versions, hashes), the delta and the original
    bytes of what it changed, which `revert` puts back. Nothing appears under `out` unless all of it does.
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
    write_edited(
        source,
        Path(out),
        edited,
        {
            RECORD_FILE: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(),
            DELTA_FILE: delta.save,
            ORIGINALS_FILE: lambda path: save_tensors(path, originals, {}),
        },
    )


def revert(directory: str | Path) -> list[str]:
    """Give every weight of an edited checkpoint its original bytes again; returns the names of those restored.

    The shard is byte-identical to the source's afterwards, and rome_fast's own files are gone. A kill leaves the
    directory edited or restored, and the command can be repeated. Raises CheckpointError, before anything is written,
    for a directory that was not edited by rome_fast, whose originals do not match their recorded hashes, or whose
    weights are no longer those of the edit.
    """
    directory = Path(directory)
    document = read_record(directory)
    originals, _ = load_tensors(directory / ORIGINALS_FILE)
    checkpoint = Checkpoint.open(directory)
    recorded = document.get("sha256")
    recorded = recorded if isinstance(recorded, dict) else {}
    for name in sorted({*recorded, *originals}):
        hashes = recorded.get(name)
        hashes = hashes if isinstance(hashes, dict) else {}
        if name not in originals or tensor_sha256(originals[name]) != hashes.get("original"):
            raise CheckpointError(f"{directory / ORIGINALS_FILE}: {name} is missing or damaged; nothing was changed")
        # Where a revert was cut short, some weights are the originals already.
        if tensor_sha256(checkpoint.read(name)) not in (hashes.get("edited"), hashes["original"]):
            raise CheckpointError(f"{directory}: {name} was changed after the edit; nothing was changed back")
    restore_tensors(directory, originals, remove=[DELTA_FILE, ORIGINALS_FILE, RECORD_FILE])
    return sorted(originals)


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
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
