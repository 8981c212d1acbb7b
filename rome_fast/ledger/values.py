"""Values on disk: what a search has found, as tensors of a safetensors file, and back to the bit."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..search.keys import Trail
from ..search.search import Solved
from ..search.values import Value
from ..weights import Header, read_header, save_tensors
from ..weights.header import read_tensor

_FORMAT = "rome_fast values 1"


def save_values(file: Path, found: Mapping[str, Solved]) -> None:
    """Write what was found by id, atomically; raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for id, solved in found.items():
        about[id] = _packed(f"{id}.", solved, tensors)
    save_tensors(file, tensors, {"format": _FORMAT, "values": json.dumps(about)})


class ValuesFile:
    """A file of `save_values`, of which single values are read; CheckpointError for any other file."""

    def __init__(self, file: Path) -> None:
        self._header: Header = read_header(file)
        metadata = self._header.metadata
        try:
            self._about: dict[str, Any] = json.loads(metadata["values"])
            if metadata["format"] != _FORMAT or not isinstance(self._about, dict):
                raise ValueError("of another format")
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: it does not hold the values of a ledger ({error})") from error

    def read(self, id: str) -> Solved:
        """One value, on the CPU."""
        try:
            return self._unpacked(f"{id}.", self._about[id])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self._header.path}: the value {id} is missing or damaged ({error!r})") from error

    def _unpacked(self, prefix: str, about: Mapping[str, Any]) -> Solved:
        def read(name: str) -> Tensor:
            return read_tensor(self._header, prefix + name)

        trail = None
        if (of_trail := about["trail"]) is not None:
            put_out = {layer: read(f"put_out.{layer}") for layer in of_trail["layers"]}
            entering, context, shared, at = (read(name) for name in ("entering", "context", "shared", "at"))
            trail = Trail(of_trail["first"], entering, context, shared, at, put_out)
        value = Value(read("delta"), tuple(read("losses").tolist()), about["drafted"], about["led"], about["finite"])
        return Solved(
            read("keys"),
            read("unprefixed_value"),
            read("mean_value"),
            value,
            about["starts_bare"],
            about["head"],
            trail,
            None if about["bare"] is None else self._unpacked(f"{prefix}bare.", about["bare"]),
        )


def _packed(prefix: str, solved: Solved, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a value's tensors among the others; returns the rest of it."""
    value, trail = solved.value, solved.trail
    own = {
        # Of several layers, rows are run again, and of these keys only the mean is asked for, to tell edits apart.
        "keys": solved.keys if trail is None else solved.keys.mean(0, keepdim=True),
        "unprefixed_value": solved.unprefixed_value,
        "mean_value": solved.mean_value,
        "delta": value.delta,
        "losses": torch.tensor(value.losses, dtype=torch.float64, device="cpu"),
    }
    if trail is not None:
        own |= {"entering": trail.entering, "context": trail.context, "shared": trail.shared, "at": trail.at}
        own |= {f"put_out.{layer}": out for layer, out in trail.put_out.items()}
    tensors |= {prefix + name: tensor for name, tensor in own.items()}
    return {
        "drafted": value.drafted,
        "led": value.led,
        "finite": value.finite,
        "starts_bare": solved.starts_bare,
        "head": solved.head,
        "trail": None if trail is None else {"first": trail.first, "layers": list(trail.put_out)},
        "bare": None if solved.bare is None else _packed(f"{prefix}bare.", solved.bare, tensors),
    }


def read_values(files: Mapping[str, Path], ids: Iterable[str]) -> dict[str, Solved]:
    """Values by id, each out of the file that has it; raises CheckpointError."""
    opened: dict[Path, ValuesFile] = {}
    found = {}
    for id in ids:
        file = files[id]
        if file not in opened:
            opened[file] = ValuesFile(file)
        found[id] = opened[file].read(id)
    return found
