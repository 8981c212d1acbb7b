"""Where the parameters of a model lie in a checkpoint: under another name perhaps, or in several tensors.

transformers renames and fuses tensors when it loads them, and undoes that when it saves. What it does to weights then,
it does here to the numbers of their rows, which tell where each of them would be written.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .header import TensorEntry

_MOST_RUNS = 1000  # of a tensor; rows that are mixed one by one are not worth reading so


@dataclass(frozen=True)
class Run:
    """Rows of a tensor of the files that follow one another in a parameter as well.

    A row is what has one index in each dimension but the last.
    """

    tensor: str
    entry: TensorEntry  # of these rows only
    row: int  # of the parameter, the first of them


def stored_runs(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, list[Run]]:
    """What every parameter is made of, in the order of its rows.

    Raises CheckpointError where something is missing, or is not made of many rows at a time.
    """
    found = {name: _under_its_name(checkpoint, name, model) for name, _ in model.named_parameters()}
    if not all(found.values()):
        written = _written(checkpoint, model)
        found = {name: runs or written.get(name, []) for name, runs in found.items()}
    if absent := [name for name, runs in found.items() if not runs]:
        raise CheckpointError(f"{checkpoint.directory}: it holds no tensor {absent[0]}, nor parts of it")
    return found


def stored_name(checkpoint: Checkpoint, parameter: str, model: PreTrainedModel) -> str:
    """The tensor that a parameter is; CheckpointError where it is none, or not all of one."""
    runs = _under_its_name(checkpoint, parameter, model) or stored_runs(checkpoint, model)[parameter]
    if len(runs) > 1 or checkpoint.entry(runs[0].tensor) != runs[0].entry:
        raise CheckpointError(f"{checkpoint.directory}: {parameter} is not one of its tensors, but parts of some")
    return runs[0].tensor


def _under_its_name(checkpoint: Checkpoint, name: str, model: PreTrainedModel) -> list[Run]:
    """A tensor of that name; published GPT-2 checkpoints leave the base model's prefix out."""
    names = (name, name.removeprefix(f"{model.base_model_prefix}."))
    return [Run(name, checkpoint.entry(name), 0) for name in names if name in checkpoint.entries][:1]


def _written(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, list[Run]]:
    """What the parameters would be written as, as far as all of it is there."""
    names, begins, numbers = [], [0], {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape[:-1]
        # Two columns: dimensions of size one are dropped by some conversions.
        numbers[name] = (
            torch.arange(begins[-1], begins[-1] + shape.numel(), device="cpu").reshape(*shape, 1).expand(*shape, 2)
        )
        names.append(name)
        begins.append(begins[-1] + shape.numel())
    owners = torch.tensor(begins[1:], device="cpu")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    rows_found = dict.fromkeys(names, 0)
    for written, rows in revert_weight_conversion(model, numbers).items():
        flat = rows[..., 0].flatten().contiguous()
        owner = torch.searchsorted(owners, flat, right=True)
        # A run ends where the next number is not the next row, or is of another parameter.
        ends = ((flat[1:] != flat[:-1] + 1) | (owner[1:] != owner[:-1])).nonzero().flatten().add(1).tolist()
        whole = _under_its_name(checkpoint, written, model)
        if not whole or len(ends) > _MOST_RUNS or whole[0].entry.shape[:-1] != rows.shape[:-1]:
            continue
        entry, width = whole[0].entry, (whole[0].entry.end - whole[0].entry.begin) // len(flat)
        for begin, end in pairwise([0, *ends, len(flat)]):
            index = int(owner[begin])
            first, last = entry.begin + begin * width, entry.begin + end * width
            some = replace(entry, shape=(end - begin, *entry.shape[-1:]), begin=first, end=last) if ends else entry
            runs[names[index]].append(Run(whole[0].tensor, some, int(flat[begin]) - begins[index]))
            rows_found[names[index]] += end - begin
    for index, name in enumerate(names):
        complete = rows_found[name] == begins[index + 1] - begins[index]
        runs[name] = sorted(runs[name], key=lambda run: run.row) if complete else []
    return runs
