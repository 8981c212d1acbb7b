"""Where the parameters of a model lie in a checkpoint: under another name perhaps, or in several tensors.

transformers renames and fuses tensors when it loads them, and undoes that when it saves. What it does to weights then,
it does here to the numbers of their rows, which tell where each of them would be written.
"""

from bisect import bisect_right

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import CheckpointError
from .checkpoint import Checkpoint

Stored = tuple[tuple[str, int], ...]
"""Tensors of the files that make up a parameter, and at which of its rows each of them begins.

A row is what has one index in each dimension but the last.
"""


def stored_parts(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Stored]:
    """Of every parameter, the tensors that it is made of.

    Raises CheckpointError where one is not there, or is more than a part of one parameter.
    """
    names = set(checkpoint.names())
    parts = {name: _under_its_name(name, names, model) for name, _ in model.named_parameters()}
    if not all(parts.values()):
        written = _written(checkpoint, model)
        parts = {name: found or written.get(name, ()) for name, found in parts.items()}
    if absent := [name for name, found in parts.items() if not found]:
        raise CheckpointError(f"{checkpoint.directory}: it holds no tensor {absent[0]}, nor parts of it")
    return parts


def stored_name(checkpoint: Checkpoint, parameter: str, model: PreTrainedModel) -> str:
    """The one tensor that a parameter is; CheckpointError where there is none, or several."""
    found = _under_its_name(parameter, set(checkpoint.names()), model) or stored_parts(checkpoint, model)[parameter]
    if len(found) > 1:
        raise CheckpointError(f"{checkpoint.directory}: it holds {parameter} in {len(found)} tensors, wanted one")
    return found[0][0]


def _under_its_name(name: str, names: set[str], model: PreTrainedModel) -> Stored:
    """A tensor of that name; published GPT-2 checkpoints leave the base model's prefix out."""
    return tuple((n, 0) for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in names)[:1]


def _written(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Stored]:
    """What the parameters would be written as, as far as that is there and made up of whole rows in their order."""
    names, begins, numbers = [], [0], {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape[:-1]
        numbers[name] = torch.arange(begins[-1], begins[-1] + shape.numel()).reshape(*shape, 1)
        names.append(name)
        begins.append(begins[-1] + shape.numel())
    parts: dict[str, list[tuple[str, int]]] = {name: [] for name in names}
    rows_found = dict.fromkeys(names, 0)
    for written, rows in revert_weight_conversion(model, numbers).items():
        flat = rows.flatten()
        first = int(flat[0])
        owner = bisect_right(begins, first) - 1
        name = names[owner]
        found = _under_its_name(written, set(checkpoint.entries), model)
        if not found or first + len(flat) > begins[owner + 1]:
            continue
        wanted = (*rows.shape[:-1], model.get_parameter(name).shape[-1])
        if checkpoint.entry(found[0][0]).shape == wanted and torch.equal(flat, torch.arange(first, first + len(flat))):
            parts[name].append((found[0][0], first - begins[owner]))
            rows_found[name] += len(flat)
    return {
        name: tuple(sorted(found, key=lambda part: part[1]))
        for index, (name, found) in enumerate(parts.items())
        if rows_found[name] == begins[index + 1] - begins[index]
    }
