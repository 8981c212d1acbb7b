"""Statistics of several layers: in files, in the cache, and merged out of parts."""

import json
import shlex
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..assets import cache_dir
from ..errors import ArgumentError, CheckpointError, StatisticsError
from ..models.fingerprint import Elements, Fingerprint
from ..models.runner import Runner
from ..models.verification import shared_out
from ..opening.defaults import select
from ..updates.delta import unedited_weights
from ..weights import load_tensors, read_header, save_tensors
from ..weights.files import os_errors
from .choice import Choice, cached_choices
from .layer import LayerStatistics, check_ridge

FORMAT = "rome_fast second moment 1"
FIRST_TOKENS = "rome_fast first tokens 1"


def statistics_cache() -> Path:
    """Where statistics are kept when no directory is given, one folder per model."""
    return cache_dir() / "statistics"


class StatisticsWarning(UserWarning):
    """Statistics are taken that are not of the very model."""


class Statistics:
    """Second moments of one model's keys, by layer, and which layer `rome-fast tune` chose, if it did."""

    def __init__(
        self, layers: Iterable[LayerStatistics], choice: Choice | None = None, folder: Path | None = None
    ) -> None:
        self.layers = {entry.layer: entry for entry in layers}
        self.choice = choice
        self.folder = folder  # that they were read from

    def for_layer(self, runner: Runner, layer: int) -> LayerStatistics:
        """The entry of a layer, checked to belong to this model, or to what it was before the edits that are in it.

        C is that of the unedited model for all edits that follow (as in MEMIT, Meng et al. 2023). Where it is not known
        that those changed it, as of a checkpoint without its records, a StatisticsWarning says so. Raises
        StatisticsError naming both fingerprints for another model, layer or width.
        """
        self.check_layers([layer])
        entry = self.layers[layer]
        width = runner.weight(layer).shape[1]
        actual = Fingerprint.of(runner, layer)
        if entry.moment.shape != (width, width):
            raise StatisticsError(
                f"statistics: got C of shape {tuple(entry.moment.shape)} (model {entry.fingerprint}), wanted "
                f"({width}, {width}) for layer {layer} of this model ({actual})"
            )
        if not is_of(entry.fingerprint, runner, layer):
            if not entry.fingerprint.matches(actual, but_for_edits=True):
                raise StatisticsError(
                    f"statistics: got those of model {entry.fingerprint}, wanted {actual}: the weights below layer "
                    f"{layer} differ; collect statistics of this very model"
                )
            warnings.warn(
                f"statistics: those of layer {layer} are of model {entry.fingerprint}, of which this one differs in "
                "down-projections below, as after edits. C of before is taken, as is usual; collect statistics of this "
                "very model if it was trained",
                StatisticsWarning,
                stacklevel=2,
            )
        return entry

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise StatisticsError, with the command for them, where any of these layers is not here."""
        missing = [str(layer) for layer in layers if layer not in self.layers]
        if missing:
            have = ", ".join(map(str, sorted(self.layers))) or "none"
            raise StatisticsError(
                f"statistics: got layer(s) {have}, wanted layer{'' if len(missing) == 1 else 's'} {', '.join(missing)} "
                "as well; collect in one pass, into the same folder, with: "
                f"rome-fast statistics MODEL --corpus FILE --layers {' '.join(missing)} --out FOLDER"
            )

    def with_ridge(self, ridge: float) -> "Statistics":
        """The same, solved with as C + ridge · mean(diag C) · I; ArgumentError for a ridge that is not from 0 on."""
        check_ridge(ridge)
        return Statistics((replace(entry, ridge=ridge, _factor=None) for entry in self.layers.values()), self.choice)

    @classmethod
    def merge(cls, parts: Sequence["Statistics"]) -> "Statistics":
        """Statistics of all parts' tokens together, layer by layer, as if collected in one go (up to rounding).

        Raises ArgumentError for no parts, StatisticsError for parts of different models (with both fingerprints),
        and for the same corpus twice, whose tokens would count double.
        """
        if not parts:
            raise ArgumentError("parts: got none, wanted at least one Statistics")
        layers = sorted({layer for part in parts for layer in part.layers})
        return cls(_merged([part.layers[layer] for part in parts if layer in part.layers]) for layer in layers)

    def save(self, directory: str | Path) -> None:
        """One safetensors file per layer, each replaced atomically; CheckpointError where that fails."""
        directory = Path(directory)
        with os_errors(f"writing {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
        for layer, entry in self.layers.items():
            write_layer(layer_file(directory, layer), entry)
        if self.choice is not None:
            self.choice.save(directory)

    @classmethod
    def cached(cls, runner: Runner, layers: Sequence[int]) -> "Statistics":
        """Those of most tokens of this model's layers in the cache; StatisticsError with the command for them."""
        unreadable: list[str] = []
        found = {layer: _of_most_tokens(runner, layer, unreadable) for layer in layers}
        missing = [str(layer) for layer, entry in found.items() if entry is None]
        if not missing:
            return cls(entry for entry in found.values() if entry is not None)
        name = shlex.quote(str(runner.model.config._name_or_path or "MODEL"))
        faults = "".join(f"\nunreadable there: {fault}" for fault in unreadable)
        raise StatisticsError(
            f"statistics: none for layer{'' if len(missing) == 1 else 's'} {', '.join(missing)} of {name} in "
            f"{statistics_cache()}; make them (once, in one pass) with: "
            f"rome-fast statistics {name} --corpus FILE --layers {' '.join(missing)}\n"
            f"or edit without them, at some loss of specificity, by statistics='identity' (--identity){faults}"
        )

    @classmethod
    def load(cls, directory: str | Path, layers: Iterable[int] | None = None) -> "Statistics":
        """Read what `save` wrote, of these layers only where some are given and there.

        CheckpointError for a damaged file, StatisticsError for anything else.
        """
        directory = Path(directory)
        files = sorted(directory.glob("layer-*.safetensors"))
        if layers is not None:
            files = [file for file in (layer_file(directory, layer) for layer in layers) if file in files]
        if not files:
            raise StatisticsError(
                f"statistics: found no layer-*.safetensors in {directory}; make them with: "
                f"rome-fast statistics MODEL --corpus FILE --out {shlex.quote(str(directory))}"
            )
        return cls((read_layer(file) for file in files), Choice.load(directory), directory)


def _of_most_tokens(runner: Runner, layer: int, unreadable: list[str]) -> LayerStatistics | None:
    """The cache's entry of this model and layer that saw most tokens; what cannot be read is noted."""
    best: LayerStatistics | None = None
    files = sorted(statistics_cache().glob(f"*/layer-{layer}.safetensors"))
    now, before = fingerprints_of(runner, layer)
    for file in files:
        try:
            if best is None or kept_tokens(file, now) > best.tokens:
                entry = read_layer(file)
                best = entry if entry.fingerprint.matches(now) else best
        except (CheckpointError, StatisticsError) as error:
            unreadable.append(str(error))
    if best is not None:
        return best
    # Those of an edited model itself come before those of what it was.
    for fingerprint, but_for_edits in ((before, False), (now, True)):
        found = {file: kept_tokens(file, fingerprint, but_for_edits=but_for_edits) for file in files}
        for file in sorted(filter(found.get, files), key=lambda file: -found[file]):
            try:
                return read_layer(file)
            except (CheckpointError, StatisticsError):
                continue  # noted above
    return None


def fingerprints_of(runner: Runner, layer: int) -> tuple[Fingerprint, Fingerprint]:
    """Those of a model as it is, and as it was before the edits that are in it, in memory or by its checkpoint."""
    now = Fingerprint.of(runner, layer)
    originals: dict[str, Elements] = {}
    for name, weight in unedited_weights(runner.model).items():
        originals[name] = partial(_elements, weight)
    originals |= runner.overwritten
    return now, Fingerprint.of(runner, layer, originals) if originals else now


def _elements(weight: Tensor, index: Tensor) -> Tensor:
    return weight.reshape(-1)[index.to(weight.device)]


def is_of(fingerprint: Fingerprint, runner: Runner, layer: int) -> bool:
    """Whether it is that of this model, or of what it was before the edits that are known to be in it."""
    return any(fingerprint.matches(own) for own in fingerprints_of(runner, layer))


def tuned_choice(runner: Runner, statistics: Statistics | str | None) -> Choice | None:
    """What `rome-fast tune` chose for this very model: as the statistics given say, and otherwise as the cache does."""
    return next((choice for choice in _choices(statistics) if choice.is_of(runner)), None)


def usual_layers(runner: Runner) -> tuple[int, ...]:
    """The layers that an edit of this model takes by default: several, where a method spreads it."""
    chosen = select(runner.model.config, tuned=tuned_choice(runner, None), spread=True).layers
    return shared_out(runner, runner.decoder.sites_of(chosen))


def likely_layers(
    config: PretrainedConfig, statistics: Statistics | str | None, spread: bool = False
) -> tuple[int, ...]:
    """The edit layers where no weight has been read yet: they may be those of another model of these sizes."""
    return select(config, tuned=likely_choice(config, statistics), spread=spread).layers


def likely_choice(config: PretrainedConfig, statistics: Statistics | str | None) -> Choice | None:
    """What `tuned_choice` says, as far as sizes tell one model from another."""
    return next((choice for choice in _choices(statistics) if choice.may_be_of(config)), None)


def _choices(statistics: Statistics | str | None) -> Iterator[Choice]:
    if not isinstance(statistics, Statistics):
        yield from cached_choices(statistics_cache())
    elif statistics.choice is not None:
        yield statistics.choice


def cache_folder(runner: Runner, name: str, layers: Sequence[int]) -> Path:
    """Where the cache has statistics of these layers of a model that is called `name`.

    The name alone would let two models of one name replace each other's files.
    """
    layer = max(0, min(max(layers), len(runner.layers) - 1))
    return statistics_cache() / f"{name}-{Fingerprint.of(runner, layer)}"


def layer_file(directory: Path, layer: int) -> Path:
    """Where a folder of statistics has a layer."""
    return directory / f"layer-{layer}.safetensors"


def kept_tokens(file: Path, fingerprint: Fingerprint, *, but_for_edits: bool = False) -> int:
    """How many tokens a file of statistics is of; 0 where it is of another model or none."""
    try:
        metadata = read_header(file).metadata
        kept = Fingerprint.from_json(metadata["fingerprint"])
        if metadata["format"] == FORMAT and kept.matches(fingerprint, but_for_edits=but_for_edits):
            return int(metadata["tokens"])
    except (CheckpointError, KeyError, ValueError, TypeError):
        pass
    return 0


def kept_limit(file: Path) -> float | None:
    """The limit of a study that a file of statistics has."""
    metadata = read_header(file).metadata
    return float(metadata["collapse_limit"]) if "collapse_limit" in metadata else None


def check_replaces(directory: Path, layer: int, fingerprint: Fingerprint, tokens: int) -> None:
    """Raise ArgumentError where C of so many tokens would replace one of the same model and more of them."""
    file = layer_file(directory, layer)
    if (kept := kept_tokens(file, fingerprint)) > tokens:
        raise ArgumentError(
            f"out: {file} has C of {kept:,} tokens, which one of {tokens:,} would replace; give another folder, or "
            "remove it first"
        )


def _merged(entries: Sequence[LayerStatistics]) -> LayerStatistics:
    first = entries[0]
    seen: set[str] = set()
    for entry in entries:
        if entry.moment.shape != first.moment.shape or not entry.fingerprint.matches(first.fingerprint):
            raise StatisticsError(
                f"parts: got layer {entry.layer} of model {entry.fingerprint}, C {tuple(entry.moment.shape)}, wanted "
                f"{first.fingerprint}, C {tuple(first.moment.shape)}, like the first part; merge parts of one model"
            )
        corpora = set(entry.provenance.get("corpus_sha256", "").split()) - {""}
        if twice := corpora & seen:
            raise StatisticsError(
                f"parts: layer {entry.layer} has the corpus {min(twice)[:12]}… twice; leave one of the two out"
            )
        seen |= corpora
    if len(entries) == 1:
        return first
    tokens = sum(entry.tokens for entry in entries)
    total = torch.zeros_like(first.moment, dtype=torch.float64)
    for entry in entries:
        total += entry.moment.to("cpu", torch.float64) * entry.tokens
    shared = set(first.provenance.items()).intersection(*(entry.provenance.items() for entry in entries))
    provenance = {name: value for name, value in first.provenance.items() if (name, value) in shared}
    provenance |= {"corpus_sha256": " ".join(sorted(seen)), "parts": str(len(entries))}
    ridge = max(entry.ridge for entry in entries)
    return LayerStatistics(
        first.layer, (total / tokens).to(first.moment.dtype), tokens, first.fingerprint, provenance, ridge
    )


def write_layer(file: Path, entry: LayerStatistics, kind: str = FORMAT) -> None:
    """One safetensors file, replaced atomically; raises CheckpointError where it cannot be written."""
    metadata = {
        "format": kind,
        "layer": str(entry.layer),
        "tokens": str(entry.tokens),
        "fingerprint": entry.fingerprint.to_json(),
        "provenance": json.dumps(entry.provenance),
        "ridge": repr(entry.ridge),
    }
    if entry.collapse_limit is not None:
        metadata["collapse_limit"] = repr(entry.collapse_limit)
    save_tensors(file, {"second_moment": entry.moment}, metadata)


def read_layer(file: Path, kind: str = FORMAT) -> LayerStatistics:
    """What `write_layer` wrote; CheckpointError for a damaged file, StatisticsError for anything else."""
    tensors, metadata = load_tensors(file)
    if metadata.get("format") != kind or set(tensors) != {"second_moment"}:
        raise StatisticsError(f"statistics: {file} is a safetensors file but not one of second moments")
    moment = tensors["second_moment"]
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise StatisticsError(f"statistics: {file} has C of shape {tuple(moment.shape)}, wanted a square matrix")
    if not bool(torch.isfinite(moment).all()):
        raise StatisticsError(f"statistics: {file} contains NaN or infinity; collect it again")
    try:
        return LayerStatistics(
            layer=int(metadata["layer"]),
            moment=moment,
            tokens=int(metadata["tokens"]),
            fingerprint=Fingerprint.from_json(metadata["fingerprint"]),
            provenance=json.loads(metadata["provenance"]),
            # Files from before there was one have none.
            ridge=float(metadata.get("ridge", 0.0)),
            collapse_limit=float(metadata["collapse_limit"]) if "collapse_limit" in metadata else None,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StatisticsError(f"statistics: {file} has unreadable metadata ({error}); collect it again") from error
