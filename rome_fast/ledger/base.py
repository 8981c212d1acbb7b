"""What a ledger is bound to: a base model, how its edits are made, and with which statistics they are closed."""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..closing.guard import Guard
from ..closing.judging import Unconverged
from ..errors import ArgumentError, CheckpointError, RomeFastError, StatisticsError
from ..methods import Column, Method
from ..models.fingerprint import Fingerprint
from ..models.rows import encode
from ..models.runner import Runner
from ..opening.checkpoints import versions
from ..opening.defaults import LayerSource
from ..opening.opening import Opened
from ..search.values import ValueSettings
from ..statistics import Statistics
from ..updates.chains import tensor_sha256
from ..weights.files import os_errors

_FORMAT = "rome_fast ledger 1"


@dataclass(frozen=True)
class Base:
    """What a ledger is bound to, written once; two ledgers whose `differences` are none can be merged."""

    id: str  # of the ledger
    model: str  # the base model's name or path when the ledger was made
    fingerprint: Fingerprint  # at the last edit layer
    dtype: str
    weights: dict[str, str]  # SHA-256 of the weights that are edited, by parameter name
    statistics: dict[str, str] | None  # SHA-256 of what each layer's C is made of, by layer; None for C = I
    statistics_folder: str | None  # where they were, if they were read from a folder; they may be elsewhere now
    method: Method
    layers: tuple[int, ...]
    layer_source: LayerSource
    settings: ValueSettings
    contexts: tuple[str, ...]
    guard: Guard
    unconverged: Unconverged
    versions: dict[str, str]
    # SHA-256 of the contexts' tokens, which stand before those of all rows; None in ledgers that do not say.
    tokens: str | None = None
    # The name of the fingerprint at the last layer of all, which values depend on; None in ledgers that do not say.
    whole: str | None = None

    @classmethod
    def of(
        cls,
        opened: Opened,
        layers: tuple[int, ...],
        statistics: Statistics | None,
        contexts: tuple[str, ...],
        **rest: Any,
    ) -> "Base":
        """That of a model as it is; `rest` are the other fields."""
        runner, name = opened.runner, str(opened.model.config._name_or_path)
        return cls(
            id=secrets.token_hex(8),
            # The ledger may be opened elsewhere.
            model=str(Path(name).absolute()) if name and Path(name).is_dir() else name,
            fingerprint=Fingerprint.of(runner, layers[-1]),
            dtype=str(runner.dtype).removeprefix("torch."),
            weights=_weights_of(runner, layers),
            statistics=_statistics_of(statistics, layers),
            statistics_folder=_folder_of(statistics),
            layers=layers,
            contexts=contexts,
            versions=versions(),
            tokens=_tokens_of(opened.tokenizer, contexts),
            whole=_whole(runner),
            **rest,
        )

    def check_model(self, runner: Runner) -> None:
        """Raise ArgumentError for any model but the base as it was."""
        # A model with other layers has none of these weights.
        same = Fingerprint.of(runner, min(self.layers[-1], len(runner.layers) - 1))
        dtype = str(runner.dtype).removeprefix("torch.")
        if not self.fingerprint.matches(same):
            raise ArgumentError(
                f"model: got {same}, wanted {self.fingerprint}, the base of this ledger: it is another model, or was "
                "edited or trained since"
            )
        if dtype != self.dtype:
            raise ArgumentError(f"model: got it in {dtype}, wanted {self.dtype}, in which this ledger was made")
        if changed := [
            name for name, sha256 in _weights_of(runner, self.layers).items() if self.weights[name] != sha256
        ]:
            raise ArgumentError(
                f"model: {', '.join(changed)} differ from those of the base: it was edited or trained since; give the "
                "base model, or revert its edits"
            )
        if self.whole is not None and _whole(runner) != self.whole:
            raise ArgumentError(
                f"model: layers above layer {self.layers[-1]} differ from those of the base: it was edited or trained "
                "since; give the base model, or revert its edits"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ArgumentError for one that cuts the contexts into other tokens."""
        if self.tokens is not None and _tokens_of(tokenizer, self.contexts) != self.tokens:
            raise ArgumentError(
                "tokenizer: got one that cuts the contexts of this ledger into other tokens than before, wanted the "
                "one it was made with: what was found for its edits belongs to those tokens"
            )

    def found_statistics(self) -> Statistics | Literal["identity"] | None:
        """Those of its folder where they still are there, checked; None where the cache may have them."""
        if self.statistics is None:
            return "identity"
        if self.statistics_folder is None:
            return None
        try:
            found = Statistics.load(self.statistics_folder, self.layers)
            return found if _statistics_of(found, self.layers) == self.statistics else None
        except (StatisticsError, CheckpointError, KeyError):
            return None

    def check_statistics(self, statistics: Statistics | None) -> None:
        """Raise ArgumentError for others than those that this ledger is closed with; None for C = I."""
        if _statistics_of(statistics, self.layers) != self.statistics:
            wanted = "'identity'" if self.statistics is None else "those that this ledger was made with"
            got = "'identity'" if statistics is None else "others"
            raise ArgumentError(
                f"statistics: got {got}, wanted {wanted}: its edits would be closed to another update; give the "
                "folder by Statistics.load, since the cache may have others by now"
            )

    def differences(self, other: "Base") -> list[str]:
        """The names of what another ledger is bound to differently, as far as entries depend on it."""
        found = [] if self.fingerprint.matches(other.fingerprint) else ["fingerprint"]
        names = ("dtype", "weights", "statistics", "method", "layers", "settings", "contexts")
        found += [name for name in names if getattr(self, name) != getattr(other, name)]
        # Of those that say it; and where contexts differ, so do their tokens.
        for name in ("whole", *(() if "contexts" in found else ("tokens",))):
            one, two = getattr(self, name), getattr(other, name)
            if None not in (one, two) and one != two:
                found.append(name)
        return found

    def to_bytes(self) -> bytes:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own |= {"fingerprint": json.loads(self.fingerprint.to_json())}
        # JSON has no infinity.
        method = {name: None if value == math.inf else value for name, value in asdict(self.method).items()}
        own |= {"method": method, "settings": asdict(self.settings)}
        return (json.dumps({"format": _FORMAT, **own}, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def read(cls, file: Path) -> "Base":
        """What `to_bytes` gave; raises CheckpointError."""
        with os_errors(f"reading {file}"):
            data = file.read_bytes()
        try:
            own = json.loads(data)
            if own.pop("format") != _FORMAT:
                raise ValueError("of another format")
            own |= {name: tuple(own[name]) for name in ("layers", "contexts")}
            own |= {"fingerprint": Fingerprint.from_json(json.dumps(own["fingerprint"]))}
            columns = tuple(Column(**column) for column in own["method"]["columns"])
            largest = math.inf if (ridge := own["method"]["largest_ridge"]) is None else ridge
            own |= {"method": Method(**{**own["method"], "columns": columns, "largest_ridge": largest})}
            return cls(**{**own, "settings": ValueSettings(**own["settings"])})
        except (ValueError, KeyError, TypeError, AttributeError, RomeFastError) as error:
            raise CheckpointError(f"{file}: it is not of a ledger of this release ({error!r})") from error


def _whole(runner: Runner) -> str:
    return str(Fingerprint.of(runner, runner.decoder.nearest_site(len(runner.layers) - 1)))


def _tokens_of(tokenizer: PreTrainedTokenizerBase, contexts: tuple[str, ...]) -> str:
    ids = [tokens.ids for tokens in encode(tokenizer, contexts)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _weights_of(runner: Runner, layers: tuple[int, ...]) -> dict[str, str]:
    names = [runner.weight_name(layer) for layer in layers]
    return {name: tensor_sha256(runner.model.get_parameter(name).detach().cpu()) for name in names}


def _folder_of(statistics: Statistics | None) -> str | None:
    return None if statistics is None or statistics.folder is None else str(statistics.folder.absolute())


def _statistics_of(statistics: Statistics | None, layers: tuple[int, ...]) -> dict[str, str] | None:
    if statistics is None:
        return None
    found = {}
    for layer in layers:
        entry = statistics.layers[layer]
        numbers: Mapping[str, float | None] = {"ridge": entry.ridge, "collapse_limit": entry.collapse_limit}
        digest = hashlib.sha256(tensor_sha256(entry.moment).encode() + json.dumps(numbers).encode())
        found[str(layer)] = digest.hexdigest()
    return found
