"""What a model was edited to before, as far as later edits have to know it: the keys that they leave alone.

Every one of them is a column of the closed form with a residual of zero, as in the cache of AlphaEdit (Fang et al.
2025) and the covariance of MEMIT that grows with each batch, C + K_p K_pᵀ: nothing is asked for there but that what is
there stays. Keys are those at the time of their own edit, as in both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError, CheckpointError
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner
from ..weights import read_header, save_tensors
from ..weights.header import read_tensor

_FORMAT = "rome_fast history 1"


@dataclass(frozen=True)
class History:
    """The keys of earlier edits of a model, by edit layer; made by `EditResult.history` and `Ledger.history`.

    `columns` is how many keys an edit has; `first_tokens` (keys,) bool says which are of subjects at position 0.
    """

    fingerprint: Fingerprint  # of the model at the first of the layers, which no edit there changes
    keys: Mapping[int, Tensor]  # (keys, d_ff) by edit layer, on the CPU
    first_tokens: Tensor
    columns: int

    @classmethod
    def none(cls, runner: Runner, layers: Sequence[int], columns: int) -> "History":
        """That of a model without edits."""
        width = runner.weight(layers[0]).shape[1]
        keys = {layer: torch.empty(0, width, device="cpu") for layer in layers}
        return cls(Fingerprint.of(runner, layers[0]), keys, torch.empty(0, dtype=torch.bool, device="cpu"), columns)

    def __len__(self) -> int:
        """How many edits."""
        return len(self.first_tokens) // self.columns

    def __repr__(self) -> str:
        return f"History({len(self)} edits, layers {list(self.keys)}, of {self.fingerprint})"

    def __add__(self, later: "History") -> "History":
        """Both; ArgumentError for those of another model or other layers."""
        if not isinstance(later, History):
            return NotImplemented
        if not self.fingerprint.matches(later.fingerprint):
            raise ArgumentError(f"history: got {later.fingerprint}, wanted {self.fingerprint}, the same model")
        if list(self.keys) != list(later.keys):
            raise ArgumentError(f"history: got layers {list(later.keys)}, wanted {list(self.keys)}")
        if self.columns != later.columns:
            raise ArgumentError(f"history: got {later.columns} key(s) an edit, wanted {self.columns}")
        keys = {layer: torch.cat([own, later.keys[layer].to(own.dtype)]) for layer, own in self.keys.items()}
        return History(self.fingerprint, keys, torch.cat([self.first_tokens, later.first_tokens]), self.columns)

    def check(self, runner: Runner, layers: Sequence[int], columns: int) -> None:
        """Raise ArgumentError unless it is of this model at these layers, with as many keys an edit."""
        self.check_keys(layers, columns)
        if not self.fingerprint.matches(own := Fingerprint.of(runner, layers[0])):
            raise ArgumentError(f"history: got that of {self.fingerprint}, wanted that of this model, {own}")

    def check_keys(self, layers: Sequence[int], columns: int) -> None:
        """Raise ArgumentError unless it is of these layers, with as many keys an edit."""
        if list(self.keys) != list(layers):
            raise ArgumentError(
                f"history: got keys at layers {', '.join(map(str, self.keys))}, wanted {', '.join(map(str, layers))}, "
                "which are edited now; give layers= as before"
            )
        if self.columns != columns:
            raise ArgumentError(f"history: got {self.columns} key(s) an edit, wanted {columns}; give method= as before")

    def save(self, file: str | Path) -> None:
        """Write it as one safetensors file, atomically; raises CheckpointError."""
        tensors = {f"keys.{layer}": keys.contiguous() for layer, keys in self.keys.items()}
        about = {
            "format": _FORMAT,
            "layers": json.dumps(list(self.keys)),
            "columns": str(self.columns),
            "fingerprint": self.fingerprint.to_json(),
        }
        save_tensors(Path(file), tensors | {"first_tokens": self.first_tokens}, about)

    @classmethod
    def load(cls, file: str | Path) -> "History":
        """What `save` wrote; CheckpointError for any other file."""
        header = read_header(Path(file))
        about = header.metadata
        try:
            if about["format"] != _FORMAT:
                raise ValueError("of another format")
            keys = {int(layer): read_tensor(header, f"keys.{layer}") for layer in json.loads(about["layers"])}
            first_tokens = read_tensor(header, "first_tokens")
            if not keys or any(len(own) != len(first_tokens) for own in keys.values()):
                raise ValueError("with keys missing")
            return cls(Fingerprint.from_json(about["fingerprint"]), keys, first_tokens, int(about["columns"]))
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: it does not hold a history of edits ({error!r})") from error
