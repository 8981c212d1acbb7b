"""Write an edited model as it is in memory: as a copy of its checkpoint where the two agree, else all of it anew."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..assets import quiet_transformers
from ..errors import ArgumentError, CheckpointError, ModelError, RomeFastError
from ..opening import checkpoints
from ..records import report_json
from ..weights import Checkpoint, Link, check_link, stored_name
from ..weights.files import Content
from . import chains
from .chains import Step, tensor_sha256
from .delta import Applied, Delta
from .history import History

_GENERATION = "generation_config.json"
_NAMED = 5  # tensors that differ, in a record
_NOT_OF_GENERATION = {"_from_model_config", "transformers_version"}
# What a config says of how the model is run or where it was, and not of what it computes.
_NOT_OF_THE_MODEL = {
    "_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "dtype",
    "experts_implementation", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def save(
    model: PreTrainedModel,
    delta: Delta,
    out: str | Path,
    source: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    link: Link = "copy",
) -> None:
    """Write the model in memory, which `delta` is applied to, and the way back from all of its edits to `out`.

    Where its weights and config are those of `source`, its checkpoint, but for the edits, that is copied, and the edits
    are added to the chain of those recorded there; `tokenizer` goes with it where it is another one. Else the model is
    written as `save_pretrained` writes it, with `tokenizer`; the weights before the edits are then those that were in
    memory, and the records say why. A streamed model has only its edited weights, and the others are those of its
    checkpoint.

    Raises ArgumentError where `out` cannot be made or the edits are no longer in the weights, ModelError for a model
    that cannot be stored as it is, CheckpointError for a `source` that was given and is none, and a full disk.
    """
    check_link(link)
    checkpoints.check_new(out)
    history = _history(model, delta)
    if any(parameter.is_meta for parameter in model.parameters()):
        _save_streamed(model, history, out, source, link)
        return
    reason, begin, directory = _compared(model, history, source)
    if directory is not None and Path(out).absolute().parent.resolve().is_relative_to(directory.resolve()):
        raise ArgumentError(f"out: {out} lies inside the source, which is only read; choose another place")
    if directory is not None and reason is None:
        beside = _generation_file(model, directory) | _tokenizer_files(tokenizer, directory)
        _save_copy(model, history, directory, out, link, begin, beside)
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError("model: it has adapters, which save_pretrained would write alone; merge or unload them first")
    about = {"weights": "memory", "weights_reason": reason}
    stored = {name: name for name in history.names}
    steps = [_step(history, index, stored, about) for index in range(len(history.edits))]
    changed = [name for step in steps for name in step.sha256]
    size = sum(parameter.nbytes for parameter in [*model.parameters(), *map(model.get_parameter, changed)])
    chains.write_whole(out, partial(_save_pretrained, model, tokenizer), steps, size)


def save_edited(
    model: PreTrainedModel,
    delta: Delta,
    source: Path,
    out: str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    link: Link = "copy",
) -> None:
    """The same for a model that was just read from `source`, with nothing but `delta` done to it since.

    `tokenizer` is one that is perhaps not its own. With `out` None, inside `chains.changing_in_place(source)`, the
    source itself is changed, all of it or nothing.
    """
    files = {} if out is None else _tokenizer_files(tokenizer, source)
    _save_copy(model, _history(model, delta), source, out, link, extra_files=files)


def save_in_place(model: PreTrainedModel, delta: Delta, source: Path, *, replaces: bool) -> None:
    """Change the checkpoint `source` of a model in memory, which `delta` was applied to last, to hold that edit.

    With `replaces`, in place of the last edit recorded there. Inside `chains.changing_in_place(source)`: all of it or
    nothing. Raises CheckpointError where its weights were not those of the model before `delta`.
    """
    history, checkpoint = _history(model, delta), Checkpoint.open(source)
    stored = {name: stored_name(checkpoint, name, model) for name in sorted(delta.updates)}
    step = _step(history, len(history.edits) - 1, stored, {"weights": "source"})
    edited = {name: model.get_parameter(own).detach().cpu() for own, name in stored.items()}
    chains.write_last(source, edited, step, replaces=replaces)


def check_unedited(model: PreTrainedModel, sha256: Mapping[str, str], source: Path) -> None:
    """Raise CheckpointError unless a checkpoint has these weights, by their names in `model`."""
    checkpoint = Checkpoint.open(source)
    stored = {name: stored_name(checkpoint, name, model) for name in sha256}
    if changed := [n for n, name in stored.items() if tensor_sha256(checkpoint.read(name)) != sha256[n]]:
        raise CheckpointError(f"{source}: {', '.join(changed)} are not those of the base; give its own checkpoint")


def _history(model: PreTrainedModel, delta: Delta) -> History:
    if not delta.is_applied:
        raise ArgumentError("out: the edit was reverted; put it into the model again by result.delta.apply(model)")
    history = History(model)
    if all(edit.live() is not delta for edit in history.edits):
        raise ArgumentError(
            f"out: {', '.join(delta.updates)} changed after the edit, which could not be undone in what is written; "
            "write the model as it is by model.save_pretrained"
        )
    return history


def _save_streamed(
    model: PreTrainedModel, history: History, out: str | Path, source: str | Path | None, link: Link
) -> None:
    directory = checkpoints.resolve(source or model.config._name_or_path)
    checkpoint = Checkpoint.open(directory)
    possible = set(range(len(history.edits) + 1))
    for name in history.names:
        stored = checkpoint.read(stored_name(checkpoint, name, model))
        possible = {i for i in possible if _same(stored.to(history.before(i, name).dtype), history.before(i, name))}
    if not possible:
        raise CheckpointError(
            f"source: {', '.join(history.names)} in {directory} are not what was edited; give the checkpoint that was"
        )
    _save_copy(model, history, directory, out, link, min(possible))


def _save_copy(
    model: PreTrainedModel,
    history: History,
    source: Path,
    out: str | Path | None,
    link: Link,
    begin: int = 0,
    extra_files: Mapping[str, Content] | None = None,
) -> None:
    """A copy of `source`, which has the first `begin` edits in its weights and, where it has a chain, in that."""
    checkpoint = Checkpoint.open(source)
    stored = {name: stored_name(checkpoint, name, model) for name in history.names}
    weights = _Stored(model, history, checkpoint, stored)
    later = {name for edit in history.edits[begin:] for name in edit.delta.updates}
    recorded = begin if chains.edits_of(source) else 0
    about = {"weights": "source"}
    steps = [_step(weights, i, stored, about) for i in range(recorded, len(history.edits))]
    edited = {stored[name]: weights.before(len(history.edits), name).cpu() for name in sorted(later)}
    chains.write(source, out, edited, steps, link, extra_files)


@dataclass(frozen=True)
class _Stored:
    """A history in the dtypes of the checkpoint, which has more digits where the model was read in a narrower one."""

    model: PreTrainedModel
    history: History
    checkpoint: Checkpoint
    names: Mapping[str, str]  # in the checkpoint, by parameter

    @property
    def edits(self) -> list[Applied]:
        return self.history.edits

    def before(self, index: int, name: str) -> Tensor:
        weight = self.history.before(index, name)
        if self.checkpoint.entry(self.names[name]).dtype == weight.dtype:
            return weight
        weight = self.checkpoint.read(self.names[name])
        for edit in self.edits[:index]:
            if name in edit.delta.updates:
                weight = edit.delta.added_to(self.model, name, weight)
        return weight


def _step(weights: History | _Stored, index: int, stored: Mapping[str, str], about: Mapping[str, Any]) -> Step:
    """An edit as it is recorded; `stored` has the names of its parameters in the checkpoint."""
    edit = weights.edits[index]
    names = sorted(edit.delta.updates)
    hashes = {
        stored[name]: {
            "original": tensor_sha256(weights.before(index, name).cpu()),
            "edited": tensor_sha256(weights.before(index + 1, name).cpu()),
        }
        for name in names
    }
    report = {**report_json(edit.delta.report or edit.delta.metadata), **about}

    def originals() -> dict[str, Tensor]:
        return {stored[name]: weights.before(index, name).cpu() for name in names}

    return Step(edit.delta, report, hashes, originals)


def _compared(
    model: PreTrainedModel, history: History, source: str | Path | None
) -> tuple[str | None, int, Path | None]:
    """Why the model cannot be a copy of its checkpoint, or None, how many edits that holds already, and where it is."""
    if source is not None:
        directory = checkpoints.resolve(source)
        checkpoint = Checkpoint.open(directory)
    else:
        name = str(model.config._name_or_path)
        if not name:
            return "the model does not say which checkpoint it was loaded from", 0, None
        try:
            directory = checkpoints.resolve(name, download=False)
            checkpoint = Checkpoint.open(directory)
        except CheckpointError:
            return f"there is no checkpoint at {name} on this machine", 0, None
    try:
        chains.check_continues(directory)
        with quiet_transformers():
            config = type(model.config).from_pretrained(directory)
    except (RomeFastError, OSError, ValueError, TypeError, KeyError) as error:
        return f"{directory}: {error}", 0, directory
    if keys := _different_keys(model.config.to_dict(), config.to_dict(), _NOT_OF_THE_MODEL):
        return f"the config differs from that in {directory}: {', '.join(keys)}", 0, directory
    if _is_tied(model) != model.config.get_text_config().tie_word_embeddings:
        return "embedding and head are tied or untied unlike the config says", 0, directory
    different, begin = _different_tensors(model, history, checkpoint)
    if different:
        return f"the weights differ from those in {directory}: {', '.join(different)}", 0, directory
    return None, begin, directory


def _different_keys(own: Mapping[str, Any], other: Mapping[str, Any], ignored: set[str]) -> list[str]:
    keys = sorted({*own, *other} - ignored)
    found = []
    for key in keys:
        one, two = own.get(key), other.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += [f"{key}.{inner}" for inner in _different_keys(one, two, ignored)]
        elif one != two:
            found.append(key)
    return found


def _generation_file(model: PreTrainedModel, directory: Path) -> dict[str, Content]:
    """How the model generates, where that is no longer as its checkpoint says."""
    with quiet_transformers():
        try:
            stored = GenerationConfig.from_pretrained(directory)
        except (OSError, ValueError):
            stored = GenerationConfig.from_model_config(model.config)
    if not _different_keys(model.generation_config.to_dict(), stored.to_dict(), _NOT_OF_GENERATION):
        return {}
    return {_GENERATION: _generation_json(model)}


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> dict[str, Content]:
    """Those of the tokenizer by which the edits were made, where the checkpoint has another one, or none."""
    if tokenizer is None or not is_another_tokenizer(tokenizer, directory):
        return {}
    with TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def is_another_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> bool:
    """Whether texts or chats are other tokens by it than by that of a checkpoint, which perhaps has none."""
    if not any(directory.glob("tokenizer*")):
        return True
    try:
        with quiet_transformers():
            stored = checkpoints.load_tokenizer(directory)
    except CheckpointError:
        return False  # it takes code of its own, as the one in memory then did
    return _texts_to_tokens(stored) != _texts_to_tokens(tokenizer)


def _texts_to_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """What decides which tokens a text, or a chat, becomes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left there by the last call.
    backend.update(padding=None, truncation=None)
    special = {name: text for name, text in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return backend, tokenizer.chat_template, special


def _generation_json(model: PreTrainedModel) -> bytes:
    return model.generation_config.to_json_string(use_diff=True).encode()


def _different_tensors(model: PreTrainedModel, history: History, checkpoint: Checkpoint) -> tuple[list[str], int]:
    """The first tensors in which model and checkpoint differ but for edits, and how many of these are in both."""
    held: dict[str, Tensor] = model.state_dict()
    prefix, ignored = f"{model.base_model_prefix}.", model._keys_to_ignore_on_load_unexpected or ()
    names = set(history.names)
    possible = set(range(len(history.edits) + 1))
    found, stored_names = [], {}
    for stored in checkpoint.names():
        name = stored if stored in held else prefix + stored
        if name not in held:
            # Masks of old checkpoints, which nothing reads.
            if not any(re.search(pattern, stored) for pattern in ignored):
                found.append(stored)
        elif name in names:
            tensor = checkpoint.read(stored)
            matching = {i for i in possible if _same(tensor, history.before(i, name))}
            possible = matching or possible
            if not matching:
                found.append(name)
        elif not _same_as_stored(checkpoint, stored, held[name]):
            found.append(name)
        stored_names[name] = stored
        if len(found) >= _NAMED:
            break
    else:
        there = {_place(held[name]) for name in stored_names if name in held}
        found += [n for n, t in held.items() if n not in stored_names and _place(t) not in there][: _NAMED - len(found)]
    return found, min(possible)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Of tied weights the same."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape)


def _same_as_stored(checkpoint: Checkpoint, name: str, own: Tensor) -> bool:
    entry = checkpoint.entry(name)
    return (entry.dtype, entry.shape) == (own.dtype, tuple(own.shape)) and _same(checkpoint.read(name), own)


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.element_size(), torch.uint8)
    one, two = (t.detach().cpu().contiguous().reshape(-1).view(integer) for t in (one, two))
    return torch.equal(one, two)


def _is_tied(model: PreTrainedModel) -> bool:
    head = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    if head is None or embedding is None:
        return bool(model.config.get_text_config().tie_word_embeddings)
    return _place(head) == _place(embedding)


def _save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    with quiet_transformers(), _storable(model):
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise CheckpointError(f"out: the weights cannot be written ({error}); is there room for them?") from error
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelError(f"model: save_pretrained refuses to write it: {error}") from error
    if model.can_generate():
        (folder / _GENERATION).write_bytes(_generation_json(model))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _storable(model: PreTrainedModel) -> Iterator[None]:
    """For `save_pretrained`: a config that says whether the embedding is tied as it is, and nothing of generation.

    It refuses settings of generation that contradict each other, which models ship; those are written as they are.
    """
    config, own = model.config.get_text_config(), model.generation_config
    kept = {"tie_word_embeddings": config.tie_word_embeddings, "dtype": model.config.dtype}
    architectures = model.config.architectures
    config.tie_word_embeddings, model.generation_config = _is_tied(model), GenerationConfig()
    try:
        yield
    finally:
        config.tie_word_embeddings, model.generation_config = kept["tie_word_embeddings"], own
        model.config.dtype, model.config.architectures = kept["dtype"], architectures
