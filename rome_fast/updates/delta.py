"""Delta: the product of every method. Low-rank factors per parameter that can be applied, undone, saved, exported."""

import json
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ArgumentError, CheckpointError
from ..kernels import rank_update_
from ..models import is_transposed, oriented
from ..models.runner import Runner
from ..weights import load_tensors, save_tensors
from ..weights.files import atomic_write, os_errors
from .samples import Sample
from .truncation import Truncation, check_rank, truncated

if TYPE_CHECKING:
    from ..statistics import Statistics

_FORMAT = "rome_fast delta 1"
_FINGERPRINT = "fingerprint"


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


class AdapterWarning(UserWarning):
    """An adapter is not all that was edited."""


@dataclass
class _Overwritten:
    original: Tensor
    bits_after: Tensor


@dataclass(eq=False, repr=False)
class Delta:
    """Updates by parameter name.

    Applying the same Delta to the same weights gives the same bytes, however it came about: an edit is applied
    through this class only. Each parameter is rounded once, so merged edits lose nothing to bf16 on the way.

    A Delta knows the weights it belongs to by some of their elements, taken when it is first applied, and is refused by
    others: of another model, edited or trained since, or edited with this very Delta. A cast to another dtype is not
    taken for a change. One that was never applied, as one made by hand, is accepted by any weights of its shape.
    """

    updates: dict[str, LowRank]
    metadata: dict[str, str] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)  # what the edit says of itself, see EditResult
    _overwritten: dict[str, _Overwritten] = field(default_factory=dict)

    def __repr__(self) -> str:
        ranks = [f"{name}: rank {update.left.shape[1]}" for name, update in self.updates.items()]
        return f"Delta({', '.join([*ranks, 'applied' if self.is_applied else 'not applied'])})"

    @property
    def is_applied(self) -> bool:
        return bool(self._overwritten)

    @property
    def originals(self) -> dict[str, Tensor]:
        """The weights that `apply` overwrote, by parameter name; empty unless applied."""
        return {name: kept.original for name, kept in self._overwritten.items()}

    def apply(self, model: PreTrainedModel, *, force: bool = False) -> None:
        """Add the updates to the model's weights in place, keeping what they overwrite for `revert`.

        Raises ArgumentError, before anything is written, when this Delta is applied already, a parameter is missing or
        has another shape, the edited weights would not be finite, or, without `force`, the weights are not those the
        Delta was made for or have it in them.
        """
        if self.is_applied:
            raise ArgumentError("delta: it is applied already; revert it before applying it again")
        prepared = self.edited(model, force=force)
        entry = Applied(Delta(self.updates, self.metadata, {}, self.report), weakref.ref(self))
        earlier = _APPLIED.setdefault(model, [])
        with torch.no_grad():
            for name, edited in prepared.items():
                parameter, update = model.get_parameter(name), self.updates[name]
                entry.delta.samples[name] = Sample.of(
                    oriented(model, name, parameter.detach()), update.left, update.right
                )
                kept = self._overwritten[name] = _Overwritten(parameter.detach().clone(), _bits(edited))
                entry.bits_after[name] = kept.bits_after
                before = next((other.bits_after[name] for other in reversed(earlier) if name in other.bits_after), None)
                if before is None or not _equal(_bits(parameter), before):
                    entry.originals[name] = kept.original
                parameter.copy_(edited)
        for name, sample in entry.delta.samples.items():
            self.samples.setdefault(name, sample)
        earlier.append(entry)

    def revert(self, model: PreTrainedModel) -> None:
        """Put back, bit for bit, the weights that `apply` overwrote.

        Raises ArgumentError, before anything is written, when this Delta is not applied, or the weights have
        changed since: undoing it would then lose the later change.
        """
        if not self.is_applied:
            raise ArgumentError("delta: it is not applied to any model, so there is nothing to revert")
        for name, kept in self._overwritten.items():
            if not self.leaves(model, name, model.get_parameter(name), kept.original, kept.bits_after):
                raise ArgumentError(
                    f"delta: {name} was changed after this delta was applied; revert the later edits first"
                )
        with torch.no_grad():
            for name, kept in self._overwritten.items():
                model.get_parameter(name).copy_(kept.original)
        self._overwritten.clear()
        _APPLIED[model] = [entry for entry in _APPLIED.get(model, []) if entry.live() is not self]

    def edited(self, model: PreTrainedModel, *, force: bool = False) -> dict[str, Tensor]:
        """The weights this Delta would leave, by parameter name, without changing the model; errors as of `apply`."""
        self.check(model, force=force)
        edited = {name: self.added_to(model, name, model.get_parameter(name)) for name in self.updates}
        for name, weight in edited.items():
            if not bool(torch.isfinite(weight).all()):
                raise ArgumentError(
                    f"delta: {name} would contain NaN or infinity in {weight.dtype}; nothing was written"
                )
        return edited

    def check(self, model: PreTrainedModel, *, force: bool = False) -> None:
        """Raise ArgumentError unless the model has weights of these shapes and, without `force`, these very ones."""
        for name, update in self.updates.items():
            weight = oriented(model, name, _float_parameter(model, name).detach())
            wanted = (update.left.shape[0], update.right.shape[1])
            if tuple(weight.shape) != wanted:
                raise ArgumentError(
                    f"delta: {name} has shape {tuple(weight.shape)}, wanted {wanted}; it was made for another model"
                )
            if force or name not in self.samples:
                continue
            before, after = self.samples[name].found_in(weight, update.left, update.right)
            if after and not before:
                raise ArgumentError(
                    f"delta: {name} has this very update in it already, and would get it twice; give the unedited "
                    "model, or force it"
                )
            if not before:
                raise ArgumentError(
                    f"delta: {name} is not the weight that it was made for: it is of another model, or was edited or "
                    "trained since; give the model it was made for, or force it"
                )

    def added_to(self, model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
        """A copy of the weight, stored as the model stores its parameter of that name, with this Delta's update."""
        edited, update = weight.detach().clone(), self.updates[name]
        rank_update_(oriented(model, name, edited), update.left.to(edited.device), update.right.to(edited.device))
        return edited

    def leaves(self, model: PreTrainedModel, name: str, weight: Tensor, original: Tensor, bits_after: Tensor) -> bool:
        """Whether a weight is what this Delta left of `original`, as it was or cast to another dtype since."""
        if weight.dtype == original.dtype:
            return _equal(_bits(weight), bits_after)
        return torch.equal(self.added_to(model, name, original).to(weight), weight.detach())

    def merge(self, other: "Delta") -> "Delta":
        """A Delta with the updates of both, ranks concatenated; neither is changed."""
        updates, samples = dict(self.updates), {**other.samples, **self.samples}
        for name, update in other.updates.items():
            if name in updates:
                mine = updates[name]
                left, right = (t.to(mine.left.device) for t in (update.left, update.right))
                update = LowRank(torch.cat([mine.left, left], 1), torch.cat([mine.right, right], 0))
                if not (name in self.samples and name in other.samples):
                    samples.pop(name, None)
            updates[name] = update
        return Delta(updates, {**self.metadata, **other.metadata}, samples)

    def save(self, file: str | Path) -> None:
        """Write the factors as safetensors, atomically."""
        tensors = {}
        for name, update in self.updates.items():
            tensors[f"{name}.left"] = update.left.contiguous().cpu()
            tensors[f"{name}.right"] = update.right.contiguous().cpu()
        metadata = {**self.metadata, "format": _FORMAT}
        if self.samples:
            metadata[_FINGERPRINT] = json.dumps({name: sample.to_json() for name, sample in self.samples.items()})
        save_tensors(Path(file), tensors, metadata)

    @classmethod
    def load(cls, file: str | Path) -> "Delta":
        """Read what `save` wrote; CheckpointError for anything else."""
        tensors, metadata = load_tensors(Path(file))
        names = sorted({key.rpartition(".")[0] for key in tensors})
        if metadata.pop("format", None) != _FORMAT or set(tensors) != {f"{n}.{s}" for n in names for s in _SIDES}:
            raise CheckpointError(f"delta: {file} is a safetensors file but not a delta")
        try:
            samples = {n: Sample.from_json(s) for n, s in json.loads(metadata.pop(_FINGERPRINT, "{}")).items()}
            return cls({n: LowRank(tensors[f"{n}.left"], tensors[f"{n}.right"]) for n in names}, metadata, samples)
        except (ArgumentError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"delta: {file} is a safetensors file but not a delta ({error})") from error

    def to_lora(
        self,
        directory: str | Path,
        model: PreTrainedModel,
        *,
        rank: int | None = None,
        statistics: "Statistics | None" = None,
    ) -> dict[str, Truncation]:
        """Write a PEFT adapter whose product equals this Delta; `model` tells how its layers are stored.

        With a `rank`, that of the best approximation of so small a rank: of the one whose outputs are nearest on keys
        distributed as C of `statistics`, or without those of the nearest matrix. Returns how far it is off by parameter
        name, which the file's metadata say as well; nothing without a rank.

        Warns where the model had other edits in it when this one was made: they are no part of the adapter, nor of the
        checkpoint that it names as its base. Raises ArgumentError when the directory exists, when the Delta changes
        nothing, does not fit the model, for a
        rank below 1, and for statistics with a model that was read in parts, StatisticsError for those of other layers
        or of another model, and CheckpointError where it cannot be written.
        """
        if statistics is not None and any(parameter.is_meta for parameter in model.parameters()):
            raise ArgumentError(
                "statistics: got them with a model that was read in parts, whose weights would tell whether they are "
                "of it; give the model in memory, or leave them out"
            )
        runner = Runner(model)
        layers = {} if statistics is None else {runner.weight_name(n): n for n in range(len(runner.layers))}

        def factor(name: str) -> Tensor | None:
            return None if statistics is None else statistics.for_layer(runner, layers[name]).factor(runner.device)

        return self.to_adapter(directory, model, rank, factor)

    def to_adapter(
        self, directory: str | Path, model: PreTrainedModel, rank: int | None, factor: Callable[[str], Tensor | None]
    ) -> dict[str, Truncation]:
        """The same with the Cholesky factor of C by parameter name, None where there is no C."""
        directory = Path(directory)
        if rank is not None:
            check_rank(rank)
        if os.path.lexists(directory):
            raise ArgumentError(f"directory: {directory} exists already; choose another name or remove it")
        if not self.updates:
            raise ArgumentError("delta: it is empty, so there is no adapter to write")
        # Not whether these are the weights it was made for: an adapter is put on those by whoever loads it.
        self.check(model, force=True)
        base = str(model.config._name_or_path)
        if earlier := self._earlier(model):
            warnings.warn(
                f"adapter: {directory} belongs to a model with {earlier} earlier edit(s) in memory, which neither it "
                f"has nor {base or 'a checkpoint of the model'}; save the edited model, or make all edits in one call",
                AdapterWarning,
                stacklevel=3,
            )
        tensors, ranks, found = {}, {}, {}
        for name, update in self.updates.items():
            left, right = update.left, update.right
            if rank is not None:
                left, right, found[name] = truncated(left, right, rank, factor(name))
            ranks[name] = left.shape[1]
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = right.float().contiguous().cpu()
            tensors[f"{module}.lora_B.weight"] = left.float().contiguous().cpu()
        transposed = any(is_transposed(model, name) for name in self.updates)
        config = _adapter_config(ranks, transposed, base)
        metadata = {"format": "pt"}
        if found:
            metadata["truncation"] = json.dumps({name: asdict(about) for name, about in found.items()})
        with os_errors(f"writing {directory}"):
            directory.mkdir(parents=True)
        save_tensors(directory / "adapter_model.safetensors", tensors, metadata)
        atomic_write(directory / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
        return found

    def _earlier(self, model: PreTrainedModel) -> int:
        """How many Deltas were in the model when this one was put in; 0 where it is not in it."""
        return next((place for place, entry in enumerate(applied_to(model)) if entry.live() is self), 0)


_SIDES = ("left", "right")


@dataclass
class Applied:
    """A Delta in the weights of a model, kept for as long as that model lives or until it is reverted.

    What a weight was before is kept once: of a second Delta it is what the first one left.
    """

    delta: Delta  # the same updates, with samples of the weights they were added to
    live: "weakref.ref[Delta]"  # the one that can be reverted, unless nobody holds it any more
    bits_after: dict[str, Tensor] = field(default_factory=dict)  # by parameter name, as is the next
    originals: dict[str, Tensor] = field(default_factory=dict)


_APPLIED: "weakref.WeakKeyDictionary[PreTrainedModel, list[Applied]]" = weakref.WeakKeyDictionary()


def applied_to(model: PreTrainedModel) -> list[Applied]:
    """The Deltas in the weights of a model, in the order in which they were applied."""
    return list(_APPLIED.get(model, []))


def unedited_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model that Deltas in memory have changed, by parameter name, as they were before."""
    found: dict[str, Tensor] = {}
    for entry in applied_to(model):
        found = entry.originals | found
    return found


def _float_parameter(model: PreTrainedModel, name: str) -> Tensor:
    """Raises ArgumentError for a parameter that is missing or holds no numbers that can be added to."""
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        wrapped = any(".base_layer." in other or ".lora_" in other for other, _ in model.named_parameters())
        remedy = "merge its adapters first (merge_and_unload)" if wrapped else "it was made for another model"
        raise ArgumentError(f"delta: the model has no parameter {name}; {remedy}") from error
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise ArgumentError(
            f"delta: {name} has dtype {parameter.dtype}, wanted bfloat16, float16, float32 or float64; load the model "
            "without quantisation"
        )
    if parameter.is_meta:
        raise ArgumentError(f"delta: {name} is not in memory (on the meta device); load the whole model")
    return parameter


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


def _equal(bits: Tensor, other: Tensor) -> bool:
    """Of `_bits` of weights that may be on different devices."""
    return torch.equal(bits.cpu(), other.cpu())


def _bits(weight: Tensor) -> Tensor:
    """Row and column sums of the raw bits: enough to notice any later change, without a second copy."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    raw = weight.detach().view(integer)
    return torch.cat([raw.sum(0, dtype=torch.int64), raw.sum(1, dtype=torch.int64)])
