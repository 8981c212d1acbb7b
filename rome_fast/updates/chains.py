"""What was done to a checkpoint, and the way back: a chain of edits, each with its record, delta and original weights.

They lie in numbered folders of the checkpoint, `rome_fast/0001/` the oldest. The original of a weight in one of them is
what the edits before it left, so that they are undone last to first.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ArgumentError, CheckpointError
from ..models import Decoder
from ..opening.checkpoints import versions
from ..weights import (
    FOLDER,
    Checkpoint,
    Link,
    change,
    changing,
    load_tensors,
    read_header,
    recover,
    save_tensors,
    stored_name,
    write_edited,
    write_new,
)
from ..weights.files import Content, copy_file
from ..weights.header import read_elements
from .delta import Delta

RECORD_FILE = "record.json"
DELTA_FILE = "delta.safetensors"
ORIGINALS_FILE = "originals.safetensors"

# Where they lay beside the weights before there were chains; read, and moved when an edit is added.
_BESIDE = ("rome_fast.json", "rome_fast_delta.safetensors", "rome_fast_originals.safetensors")


@dataclass(frozen=True)
class Step:
    """An edit that is to be recorded, its tensors by their names in the checkpoint."""

    delta: Delta
    report: Mapping[str, Any]
    sha256: Mapping[str, Mapping[str, str]]  # of every changed tensor, "original" and "edited"
    originals: Callable[[], dict[str, Tensor]]

    def files(self, number: int) -> dict[str, Content]:
        document = {**self.report, "versions": versions(), "sha256": self.sha256}
        folder = _folder(number)
        return {
            f"{folder}/{RECORD_FILE}": (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(),
            f"{folder}/{DELTA_FILE}": self.delta.save,
            f"{folder}/{ORIGINALS_FILE}": lambda path: save_tensors(path, self.originals(), {}),
        }


@dataclass(frozen=True)
class Recorded:
    """An edit that is recorded in a checkpoint; files are named relative to its directory."""

    directory: Path
    label: str
    record: str
    delta: str
    originals: str

    @property
    def files(self) -> list[str]:
        # The record last: without it the rest would be taken for nobody's.
        return [self.delta, self.originals, self.record]

    def document(self) -> dict[str, Any]:
        """What was recorded; raises CheckpointError."""
        file = self.directory / self.record
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: it cannot be read ({error})") from error
        if not isinstance(document, dict):
            raise CheckpointError(f"{file}: it is not a record of an edit")
        return document

    def sha256(self) -> dict[str, dict[str, str]]:
        """Of the changed tensors, "original" and "edited"; what is damaged is left out."""
        recorded = self.document().get("sha256")
        recorded = recorded if isinstance(recorded, dict) else {}
        return {n: h for n, h in recorded.items() if isinstance(h, dict) and {"original", "edited"} <= h.keys()}

    def checked_originals(self) -> tuple[dict[str, Tensor], list[str]]:
        """The original tensors that are what the record says, and what is wrong with the others."""
        originals, _ = load_tensors(self.directory / self.originals)
        recorded = self.sha256()
        sound = {n: t for n, t in originals.items() if n in recorded and tensor_sha256(t) == recorded[n]["original"]}
        faults = [
            f"{self.directory / self.originals}: {name} is missing or damaged"
            for name in sorted({*recorded, *originals} - sound.keys())
        ]
        return sound, faults or ([] if sound else [f"{self.directory / self.record}: it is not a record of an edit"])


def edits_of(directory: str | Path) -> list[Recorded]:
    """The edits recorded in a checkpoint, the oldest first."""
    directory = Path(directory)
    found = []
    if (directory / _BESIDE[0]).exists():
        found.append(Recorded(directory, _BESIDE[0], *_BESIDE))
    if (directory / FOLDER).is_dir():
        numbers = sorted(int(p.name) for p in (directory / FOLDER).iterdir() if re.fullmatch(r"\d{4,}", p.name))
        names = (RECORD_FILE, DELTA_FILE, ORIGINALS_FILE)
        found += [Recorded(directory, _folder(n), *(f"{_folder(n)}/{name}" for name in names)) for n in numbers]
    return found


def records(directory: str | Path) -> list[dict[str, Any]]:
    """What was recorded of each edit of a checkpoint, the oldest first; none where it is not edited.

    Raises CheckpointError for a record that is damaged.
    """
    return [edit.document() for edit in edits_of(directory)]


@contextmanager
def changing_in_place(source: str | Path) -> Iterator[None]:
    """Hold a checkpoint directory for an edit in place, so that no second one begins.

    Warns of other safetensors in it, as `consolidated.safetensors`, which would not be edited. Raises ArgumentError
    where `source` is no directory and CheckpointError where another process is changing it.
    """
    directory = Path(source)
    if not directory.is_dir():
        raise ArgumentError(f"in_place: got {source}, wanted the directory of a checkpoint; give a new one as out")
    with changing(directory):
        ours = {*Checkpoint.open(directory).shards, *_BESIDE}
        if others := sorted({path.name for path in directory.glob("*.safetensors")} - ours):
            warnings.warn(
                f"{directory}: {', '.join(others)} will not be edited; programs that read every safetensors file of a "
                "folder will read it too, so remove it unless you need it as it is",
                stacklevel=2,
            )
        yield


def originals_of(directory: str | Path) -> dict[str, Tensor]:
    """What the edits of a checkpoint overwrote, by tensor name, as it was before the first of them.

    Raises CheckpointError where that is damaged or the weights are no longer those of the last edit.
    """
    check_continues(directory)
    originals: dict[str, Tensor] = {}
    for edit in reversed(edits_of(directory)):
        found, faults = edit.checked_originals()
        if faults:
            raise CheckpointError("; ".join(faults))
        originals |= found
    return originals


def overwritten(directory: str | Path, model: PreTrainedModel) -> dict[str, Callable[[Tensor], Tensor]]:
    """What the edits of a checkpoint overwrote, by parameter name, as it was before the first of them.

    Elements at flat indices (n,) int64 are read when they are asked for, and not checked. What cannot be read is left
    out, or is that of a later edit: this serves to recognise a model, never to restore one.
    """
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for edit in reversed(edits_of(directory)):
        with suppress(CheckpointError):
            header = read_header(edit.directory / edit.originals)
            found |= {name: partial(read_elements, header, name) for name in header.tensors}
    by_parameter: dict[str, Callable[[Tensor], Tensor]] = {}
    if found:
        checkpoint, decoder = Checkpoint.open(directory), Decoder(model)
        for layer in filter(decoder.has_site, range(len(decoder.layers))):
            name = decoder.weight_name(layer)
            with suppress(CheckpointError, KeyError):
                by_parameter[name] = found[stored_name(checkpoint, name, model)]
    return by_parameter


def check_continues(directory: str | Path) -> None:
    """Raise CheckpointError where a checkpoint has weights other than its last edits left: no edit can follow those."""
    directory = Path(directory)
    left = {name: h["edited"] for edit in edits_of(directory) for name, h in edit.sha256().items()}
    if not left:
        return
    checkpoint = Checkpoint.open(directory)
    if changed := [n for n, h in left.items() if n not in checkpoint.entries or tensor_sha256(checkpoint.read(n)) != h]:
        raise CheckpointError(
            f"{directory}: {', '.join(changed[:5])} changed after the edits recorded in it, which can therefore not be "
            f"undone; remove {directory / FOLDER} if the weights are as you want them"
        )


def write(
    source: str | Path,
    out: str | Path | None,
    edited: Mapping[str, Tensor],
    steps: Sequence[Step],
    link: Link = "copy",
    other_files: Mapping[str, Content] | None = None,
) -> None:
    """Copy the checkpoint at `source` to `out` with the tensors `edited`, and add `steps` to its chain of edits.

    Nothing appears under `out` unless all of it does. With `out` None, inside `changing_in_place(source)`, the source
    itself is changed, all of it or nothing.
    """
    source = Path(source)
    extra_files, remove = _moved(edits_of(source))
    last = max([_number(edit) for edit in edits_of(source)] + [len(extra_files) // len(_BESIDE)], default=0)
    for number, step in enumerate(steps, last + 1):
        extra_files |= step.files(number)
    extra_files |= other_files or {}
    if out is None:
        change(source, edited, extra_files=extra_files, remove=remove)
    else:
        write_edited(source, out, edited, extra_files, link, remove=remove)


def write_last(source: Path, edited: Mapping[str, Tensor], step: Step, *, replaces: bool) -> None:
    """Make `step` the last edit of a checkpoint, with the tensors `edited`; where it `replaces` it, of the present one.

    Inside `changing_in_place(source)`: all of it or nothing. Raises CheckpointError where the weights before that edit
    are not those that `step` began with.
    """
    check_continues(source)
    edits, checkpoint = edits_of(source), Checkpoint.open(source)
    originals, faults = edits[-1].checked_originals() if replaces else ({}, [])
    for name, hashes in step.sha256.items():
        before = originals[name] if name in originals else checkpoint.read(name)
        if tensor_sha256(before) != hashes["original"]:
            faults.append(f"{source}: {name} is not what the edit began with")
    if faults:
        raise CheckpointError(f"{'; '.join(faults)}; nothing was changed")
    if replaces:
        change(source, {**originals, **edited}, extra_files=step.files(_number(edits[-1])))
    else:
        write(source, None, edited, [step])


def write_whole(out: str | Path, save: Callable[[Path], None], steps: Sequence[Step], needed_bytes: int) -> None:
    """Make the checkpoint `out` of what `save` writes into a folder, edited by `steps`: complete, or not at all.

    Raises CheckpointError where what was written is not what `steps` left.
    """
    left = {name: hashes["edited"] for step in steps for name, hashes in step.sha256.items()}

    def save_checked(folder: Path) -> None:
        save(folder)
        checkpoint = Checkpoint.open(folder)
        if lost := [n for n in left if n not in checkpoint.entries or tensor_sha256(checkpoint.read(n)) != left[n]]:
            raise CheckpointError(f"out: {', '.join(lost)} would not be stored as in memory, so nothing was written")

    extra_files: dict[str, Content] = {}
    for number, step in enumerate(steps, 1):
        extra_files |= step.files(number)
    write_new(out, save_checked, extra_files, needed_bytes=needed_bytes)


def revert(directory: str | Path, *, all: bool = False) -> list[str]:
    """Give the weights of a checkpoint the bytes they had before its last edit; returns the names of those restored.

    With `all`, before its first one. After the last of its edits is undone the shards are byte-identical to those of
    the unedited checkpoint, and rome_fast's own files are gone. A kill leaves the directory as it was or restored, once
    the next command has run. Raises CheckpointError, before anything is written, for a directory that was not edited by
    rome_fast, whose originals do not match their recorded hashes, whose weights are no longer those of the edit, or
    which another process is changing.
    """
    directory = Path(directory)
    ours = (*_BESIDE, f"{FOLDER}/")
    if any(name.startswith(ours) for name in recover(directory) or ()):
        return []  # what was cut short was a revert
    if not edits_of(directory):
        raise CheckpointError(f"{directory}: it has no {FOLDER}/*/{RECORD_FILE}, so it was not edited by rome_fast")
    with changing(directory):
        edits = edits_of(directory)
        undone = edits if all else edits[-1:]
        originals: dict[str, Tensor] = {}
        faults = _gaps(edits) if all else []
        allowed: dict[str, set[str]] = {}
        for edit in reversed(undone):
            found, wrong = edit.checked_originals()
            faults += wrong
            originals |= found
            for name, hashes in edit.sha256().items():
                # Where a revert by an earlier release was cut short, some weights are the originals already.
                allowed.setdefault(name, {hashes["edited"]}).add(hashes["original"])
        faults += _changed(directory, allowed)
        if faults:
            raise CheckpointError(f"{'; '.join(faults)}; nothing was changed")
        change(directory, originals, remove=[name for edit in reversed(undone) for name in edit.files])
    return sorted(originals)


def verify(directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the last byte and check all that can be known of it; returns what was found.

    That is the index, headers and sizes, that no weight is NaN or infinite, and of an edited checkpoint its whole
    chain: the hashes of the edited weights and of the originals that `revert` needs, that every edit began with what
    the one before it left, and the deltas. A change in place that was cut short is completed first. Raises
    CheckpointError that lists every fault.
    """
    directory = Path(directory)
    recovered = directory.is_dir() and recover(directory) is not None
    checkpoint = Checkpoint.open(directory)
    faults = []
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16) and not bool(
            torch.isfinite(tensor).all()
        ):
            faults.append(f"{checkpoint.shard_of(name)}: {name} contains NaN or infinity")
    edits = edits_of(directory)
    faults += _gaps(edits)
    left: dict[str, str] = {}
    found = []
    for edit in edits:
        document = edit.document()
        faults += edit.checked_originals()[1]
        for name, hashes in edit.sha256().items():
            if left.get(name, hashes["original"]) != hashes["original"]:
                faults.append(f"{directory / edit.originals}: {name} is not what the edit before left")
            left[name] = hashes["edited"]
        try:
            Delta.load(directory / edit.delta)
        except CheckpointError as error:
            faults.append(str(error))
        found.append(
            {
                "place": edit.label,
                "method": document.get("method"),
                "requests": len(document.get("edits", ())),
                "edited": sorted(edit.sha256()),
            }
        )
    faults += _changed(directory, {name: {sha256} for name, sha256 in left.items()})
    if faults:
        raise CheckpointError(f"{directory}: {'; '.join(faults)}")
    return {
        "directory": str(directory),
        "tensors": len(checkpoint.names()),
        "bytes": sum(entry.end - entry.begin for entry in checkpoint.entries.values()),
        "edited": sorted(left),
        "chain": found,
        "recovered": recovered,
    }


def tensor_sha256(tensor: Tensor) -> str:
    """Of the bytes of a tensor, in hex."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _changed(directory: Path, allowed: Mapping[str, set[str]]) -> list[str]:
    """Faults where a tensor's hash is none of those allowed."""
    checkpoint = Checkpoint.open(directory)
    return [
        f"{directory}: {name} was changed after the edit"
        for name, hashes in sorted(allowed.items())
        if name not in checkpoint.entries or tensor_sha256(checkpoint.read(name)) not in hashes
    ]


def _gaps(edits: Sequence[Recorded]) -> list[str]:
    """Edits that are missing from a chain."""
    numbers = {_number(edit) for edit in edits} - {0}
    return [
        f"{edits[0].directory / _folder(n)}: the record of an edit is missing"
        for n in range(1, max(numbers, default=0))
        if n not in numbers
    ]


def _moved(edits: Sequence[Recorded]) -> tuple[dict[str, Content], list[str]]:
    """For an edit recorded beside the weights: its files where a chain begins, and the names to remove."""
    if [edit.label for edit in edits] != [_BESIDE[0]]:
        return {}, []
    names = (RECORD_FILE, DELTA_FILE, ORIGINALS_FILE)

    def copy(name: str) -> Callable[[Path], None]:
        return lambda path: copy_file(edits[0].directory / name, path)

    return {f"{_folder(1)}/{new}": copy(old) for new, old in zip(names, _BESIDE, strict=True)}, list(_BESIDE)


def _number(edit: Recorded) -> int:
    """The place of an edit in its chain, 0 for one beside the weights."""
    return 0 if edit.label == _BESIDE[0] else int(edit.label.rpartition("/")[2])


def _folder(number: int) -> str:
    return f"{FOLDER}/{number:04}"
