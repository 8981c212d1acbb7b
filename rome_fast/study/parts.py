"""What a study has measured so far, on disk: a killed run goes on, and the files of the report are made of it.

A part is one file and appears whole or not at all; the files for readers are made again from all parts.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..weights import load_tensors, save_tensors
from ..weights.files import atomic_write
from .limit import fit_limit, judge_limit
from .measure import Part

CONDITIONS = "conditions.json"
_LISTS = ("records", "factors", "prefix")


class Folder:
    """The folder of one study. Raises ArgumentError where it belongs to another study, or to something else."""

    def __init__(self, directory: Path, conditions: dict[str, Any]) -> None:
        self.directory, self.conditions = directory, json.loads(json.dumps(conditions))
        file = directory / CONDITIONS
        if directory.exists() and not file.exists() and any(directory.iterdir()):
            raise ArgumentError(f"out: {directory} exists and is not an earlier study's; choose another folder")
        if file.exists():
            old = json.loads(file.read_text(encoding="utf-8"))
            if other := [key for key, value in self.conditions.items() if old.get(key) != value]:
                got, wanted = (", ".join(_short(side.get(key)) for key in other) for side in (old, self.conditions))
                raise ArgumentError(
                    f"out: {directory} holds a study with another {', '.join(other)}: it has {got}, this run has "
                    f"{wanted}; give another folder, or the settings of that study"
                )
        (directory / "parts").mkdir(parents=True, exist_ok=True)
        if not file.exists():
            self._write_json(CONDITIONS, self.conditions)

    def has(self, index: int) -> bool:
        return self._part(index).exists()

    def add(self, index: int, part: Part) -> None:
        metadata = {name: json.dumps(getattr(part, name)) for name in (*_LISTS, "seconds")}
        # A safetensors file wants a tensor; a part without keys has none.
        save_tensors(self._part(index), part.keys or {"none": torch.zeros(1, device="cpu")}, metadata)

    def write(self, norms: Tensor | None, more: dict[str, Any]) -> list[dict[str, Any]]:
        """Make the files of the report out of the parts; returns the records."""
        total = Part()
        keys: list[dict[str, Tensor]] = []
        for file in sorted((self.directory / "parts").glob("*.safetensors")):
            tensors, metadata = load_tensors(file)
            for name in _LISTS:
                getattr(total, name).extend(json.loads(metadata[name]))
            for stage, seconds in json.loads(metadata["seconds"]).items():
                total.seconds[stage] = round(total.seconds.get(stage, 0.0) + seconds, 2)
            if "none" not in tensors:
                first = {_name(r): r["first_token"] for r in json.loads(metadata["records"])}
                marks = torch.tensor(list(first.values()), dtype=torch.uint8, device="cpu")
                keys.append(tensors | {"first_token": marks})
        for name in _LISTS:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in getattr(total, name))
            if lines:
                atomic_write(self.directory / f"{name}.jsonl", lines.encode())
        if keys and norms is not None:
            joined = {name: torch.cat([k[name] for k in keys]) for name in keys[0]}
            save_tensors(self.directory / "keys.safetensors", joined | {"norms": norms}, {})
        self._write_json("guard.json", guard_of(total.records))
        self._write_json(CONDITIONS, self.conditions | more | {"seconds": total.seconds})
        return total.records

    def guard(self) -> dict[str, Any]:
        """What `guard_of` found, as written."""
        found: dict[str, Any] = json.loads((self.directory / "guard.json").read_text(encoding="utf-8"))
        return found

    def _part(self, index: int) -> Path:
        return self.directory / "parts" / f"{index:05d}.safetensors"

    def _write_json(self, name: str, value: Any) -> None:
        atomic_write(self.directory / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def guard_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Limits fitted on every other request of either kind, and how they do on the rest; without collapses, none.

    They are those of one layer: edits that are spread over several have no part in them.
    """
    records = [record for record in records if len(record["layers"]) == 1]
    halves: list[list[dict[str, Any]]] = [[], []]
    for first_token in (True, False):
        names = list(dict.fromkeys(_name(r) for r in records if r["first_token"] == first_token))
        half = {name: i % 2 for i, name in enumerate(names)}
        for record in records:
            if record["first_token"] == first_token:
                halves[half[_name(record)]].append(record)
    rules = {
        "update_ratio": lambda r: r["update_norm"] / r["weight_norm"],
        "denominator": lambda r: 1 / abs(r["denominator"]) if r["denominator"] else float("inf"),
    }
    found: dict[str, dict[str, Any]] = {}
    for rule, figure in rules.items():
        (fitted, tested) = ([figure(r) for r in half] for half in halves)
        (learned, truth) = ([bool(r["collapsed"]) for r in half] for half in halves)
        limit = fit_limit(fitted, learned)
        if limit is not None:
            judged = asdict(judge_limit(limit, tested, truth))
            threshold = limit if rule == "update_ratio" else 1 / limit
            found[rule] = {"threshold": threshold, **judged}
    if "update_ratio" not in found:
        return {"rule": "update_ratio", "threshold": None}
    own = found.pop("update_ratio")
    return {
        "rule": "update_ratio",
        **own,
        "fitted_on": f"the {len(halves[0])} edits of every other request",
        "tested_on": f"the {len(halves[1])} of the rest",
        "alternatives": found,
    }


def _name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["prompt"], row["subject"], row["target"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
