"""Delta: the product of every method. Low-rank factors per parameter that can be applied, undone, saved, exported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .errors import ArgumentError, CheckpointError
from .kernels import rank_update_
from .models import is_transposed
from .weights import load_tensors, save_tensors

_FORMAT = "rome_fast delta 1"


@dataclass(frozen=True)
class LowRank:
    """An update of one parameter, in the (d, d_ff) orientation whatever way the model stores it.

    Raises ArgumentError for factors that do not fit together.
    """

    left: Tensor  # (d, r) fp32 | fp64
    right: Tensor  # (r, d_ff) same dtype

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        fit = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] and left.dtype == right.dtype
        if not fit or left.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"delta: got factors {left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}, wanted "
                "(d, r) and (r, d_ff) in float32 or float64"
            )

    def dense(self) -> Tensor:
        """(d, d_ff)"""
        return self.left @ self.right


@dataclass
class _Overwritten:
    original: Tensor
    bits_after: Tensor


@dataclass
class Delta:
    """Updates by parameter name.

    Applying the same Delta to the same weights gives the same bytes, however it came about: an edit is applied
    through this class only. Each parameter is rounded once, so merged edits lose nothing to bf16 on the way.
    """

    updates: dict[str, LowRank]
    metadata: dict[str, str] = field(default_factory=dict)
    _overwritten: dict[str, _Overwritten] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_applied(self) -> bool:
        return bool(self._overwritten)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The weights that `apply` overwrote, by parameter name; empty unless applied."""
        return {name: kept.original for name, kept in self._overwritten.items()}

    def apply(self, model: PreTrainedModel) -> None:
        """Add the updates to the model's weights in place, keeping what they overwrite for `revert`.

        Raises ArgumentError, before anything is written, when this Delta is applied already, a parameter is missing
        or has another shape, or the edited weights would not be finite.
        """
        if self.is_applied:
            raise ArgumentError("delta: it is applied already; revert it before applying it again")
        prepared = {name: self._prepare(model, name, update) for name, update in self.updates.items()}
        with torch.no_grad():
            for name, edited in prepared.items():
                parameter = model.get_parameter(name)
                self._overwritten[name] = _Overwritten(parameter.detach().clone(), _bits(edited))
                parameter.copy_(edited)

    def revert(self, model: PreTrainedModel) -> None:
        """Put back, bit for bit, the weights that `apply` overwrote.

        Raises ArgumentError, before anything is written, when this Delta is not applied, or the weights have
        changed since: undoing it would then lose the later change.
        """
        if not self.is_applied:
            raise ArgumentError("delta: it is not applied to any model, so there is nothing to revert")
        for name, kept in self._overwritten.items():
            if not torch.equal(_bits(model.get_parameter(name)), kept.bits_after):
                raise ArgumentError(
                    f"delta: {name} was changed after this delta was applied; revert the later edits first"
                )
        with torch.no_grad():
            for name, kept in self._overwritten.items():
                model.get_parameter(name).copy_(kept.original)
        self._overwritten.clear()

    def edited(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The weights this Delta would leave, by parameter name, without changing the model."""
        return {name: self._prepare(model, name, update) for name, update in self.updates.items()}

    def _prepare(self, model: PreTrainedModel, name: str, update: LowRank) -> Tensor:
        try:
            parameter = model.get_parameter(name)
        except AttributeError as error:
            raise ArgumentError(f"delta: the model has no parameter {name}; it was made for another model") from error
        edited = parameter.detach().clone()
        oriented = edited.T if is_transposed(model, name) else edited
        wanted = (update.left.shape[0], update.right.shape[1])
        if tuple(oriented.shape) != wanted:
            raise ArgumentError(
                f"delta: {name} has shape {tuple(oriented.shape)}, wanted {wanted}; it was made for another model"
            )
        rank_update_(oriented, update.left.to(edited.device), update.right.to(edited.device))
        if not bool(torch.isfinite(edited).all()):
            raise ArgumentError(f"delta: {name} would contain NaN or infinity in {edited.dtype}; nothing was written")
        return edited

    def merge(self, other: "Delta") -> "Delta":
        """A Delta with the updates of both, ranks concatenated; neither is changed."""
        updates = dict(self.updates)
        for name, update in other.updates.items():
            if name in updates:
                mine = updates[name]
                left, right = (t.to(mine.left.device) for t in (update.left, update.right))
                update = LowRank(torch.cat([mine.left, left], 1), torch.cat([mine.right, right], 0))
            updates[name] = update
        return Delta(updates, {**self.metadata, **other.metadata})

    def save(self, file: str | Path) -> None:
        """Write the factors as safetensors, atomically."""
        tensors = {}
        for name, update in self.updates.items():
            tensors[f"{name}.left"] = update.left.contiguous().cpu()
            tensors[f"{name}.right"] = update.right.contiguous().cpu()
        save_tensors(Path(file), tensors, {**self.metadata, "format": _FORMAT})

    @classmethod
    def load(cls, file: str | Path) -> "Delta":
        """Read what `save` wrote; CheckpointError for anything else."""
        tensors, metadata = load_tensors(Path(file))
        names = sorted({key.rpartition(".")[0] for key in tensors})
        if metadata.pop("format", None) != _FORMAT or set(tensors) != {f"{n}.{s}" for n in names for s in _SIDES}:
            raise CheckpointError(f"delta: {file} is a safetensors file but not a delta")
        try:
            return cls({n: LowRank(tensors[f"{n}.left"], tensors[f"{n}.right"]) for n in names}, metadata)
        except ArgumentError as error:
            raise CheckpointError(f"delta: {file} is a safetensors file but not a delta ({error})") from error

    def to_lora(self, directory: str | Path, model: PreTrainedModel) -> None:
        """Write a PEFT adapter whose product equals this Delta; `model` tells how its layers are stored.

        Raises ArgumentError when the directory exists, or when the Delta changes nothing.
        """
        directory = Path(directory)
        if directory.exists():
            raise ArgumentError(f"directory: {directory} exists already; choose another name or remove it")
        if not self.updates:
            raise ArgumentError("delta: it is empty, so there is no adapter to write")
        ranks = {name: update.left.shape[1] for name, update in self.updates.items()}
        transposed = any(is_transposed(model, name) for name in self.updates)
        config = _adapter_config(ranks, transposed, str(model.config._name_or_path))
        tensors = {}
        for name, update in self.updates.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = update.right.float().contiguous().cpu()
            tensors[f"{module}.lora_B.weight"] = update.left.float().contiguous().cpu()
        directory.mkdir(parents=True)
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


_SIDES = ("left", "right")


def _adapter_config(ranks: Mapping[str, int], transposed: bool, base: str) -> dict[str, object]:
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    rank = max(modules.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        # The adapter's scale is alpha / r; both patterns make it 1 for every module.
        "lora_alpha": rank,
        "rank_pattern": modules,
        "alpha_pattern": modules,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def _bits(weight: Tensor) -> Tensor:
    """Row and column sums of the raw bits: enough to notice any later change, without a second copy."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    raw = weight.detach().view(integer)
    return torch.cat([raw.sum(0, dtype=torch.int64), raw.sum(1, dtype=torch.int64)])
