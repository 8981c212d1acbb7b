"""Sums on disk every few seconds of work, so that a run that was killed goes on where it was.

A run keeps its last two snapshots: each is written beside them and renamed into place, and one that cannot be read is
passed over for the one before. A snapshot says where its window begins (`Place`) and how many batches are in the sums;
batches do not depend on snapshots, so the sums of a resumed run are those of an undisturbed one to the bit.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, StatisticsError
from ..weights import Header, read_header, save_tensors
from ..weights.files import lock_directory, os_errors
from ..weights.header import read_tensor
from .reading import Place

_EVERY_SECONDS = 5.0
_MOST_SHARE = 0.05  # of the time that may go into snapshots; large sums are written less often
_FORMAT = "rome_fast statistics snapshot 1"
PATTERN = "unfinished-*"


@dataclass
class Sums:
    """What a run has so far: sums of k kᵀ, and which batches are in them."""

    totals: dict[int, Tensor]  # per layer (d_ff, d_ff) fp64, at least the lower triangle
    tokens: int = 0  # in the sums
    start: Place = field(default_factory=Place)  # of the current window
    rows: str = ""  # digest of that window
    batches: int = 0  # of the whole corpus: those before this one are done, by this process or another


class Snapshots:
    """The snapshots of one process of one run; nothing is written before the first one is due."""

    def __init__(self, out: Path, run: Mapping[str, object], rank: int, count: int) -> None:
        """`run` says what is summed: only a run with the same description goes on from these."""
        self._run = json.dumps(dict(run), sort_keys=True)
        digest = hashlib.sha256(self._run.encode()).hexdigest()[:12]
        self.folder = out / f"unfinished-{digest}" / f"rank-{rank}-of-{count}"
        self._number = 0
        self._lock: int | None = None
        self._cost = 0.0
        self._last = time.monotonic()

    def latest(self, totals: dict[int, Tensor]) -> Sums:
        """The newest sums that are readable, put into `totals`, which are 0; warns where newer ones are not.

        One tensor at a time, so that going on takes no more memory than the run that was interrupted.
        """
        found: list[tuple[int, Path]] = []
        damaged = []
        for slot in (0, 1):
            file = self._file(slot)
            if file.exists():
                try:
                    found.append((self._fields(read_header(file))["number"], file))
                except (CheckpointError, StatisticsError) as error:
                    damaged.append(str(error))
        sums = Sums(totals)
        for number, file in sorted(found, reverse=True):
            try:
                sums = self._read(file, totals)
                self._number = number
                break
            except (CheckpointError, StatisticsError) as error:
                damaged.append(str(error))
                for total in totals.values():
                    total.zero_()
        if damaged:
            rest = f"going on from the other one, at {sums.tokens} tokens" if self._number else "beginning anew"
            warnings.warn(f"{'; '.join(damaged)}; {rest}", stacklevel=3)
        return sums

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._last >= max(_EVERY_SECONDS, self._cost / _MOST_SHARE)

    def save(self, sums: Sums) -> None:
        """Replace the older of the two; CheckpointError, and both as they were, where that fails."""
        begun = time.monotonic()
        with os_errors(f"writing {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        number = self._number + 1
        totals = {layer: total.cpu() for layer, total in sums.totals.items()}
        state = json.dumps(
            {
                "run": self._run,
                "number": number,
                "tokens": sums.tokens,
                "batches": sums.batches,
                "start": asdict(sums.start),
                "rows": sums.rows,
            }
        )
        metadata = {"format": _FORMAT, "state": state, "sha256": _checksum(state, totals)}
        try:
            save_tensors(self._file(number % 2), {str(layer): total for layer, total in totals.items()}, metadata)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; nothing is lost: the same command goes on from the snapshot before this one"
            ) from error
        self._number = number
        self._last = time.monotonic()
        self._cost = self._last - begun

    def remove(self) -> None:
        """Remove this process's snapshots, when what they are for is safely elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        # The parent goes with the last process of the run.
        with suppress(OSError):
            self.folder.parent.rmdir()
        self.release()

    def release(self) -> None:
        """Let another process go on from here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _file(self, slot: int) -> Path:
        return self.folder / f"snapshot-{slot}.safetensors"

    def _claim(self) -> None:
        if self._lock is not None:
            return
        # Where a file system has no locks, nobody can be told apart.
        self._lock = lock_directory(self.folder)
        if self._lock is None:
            raise StatisticsError(
                f"out: another process is collecting the same statistics in {self.folder}; wait for it to end"
            )

    def _fields(self, header: Header) -> dict[str, Any]:
        """What a snapshot says of itself; StatisticsError unless it is one of this run."""
        try:
            fields = json.loads(header.metadata["state"])
            if header.metadata["format"] == _FORMAT and fields["run"] == self._run and int(fields["number"]) > 0:
                return dict(fields)
        except (KeyError, ValueError, TypeError):
            pass
        raise StatisticsError(f"the snapshot {header.path} is damaged")

    def _read(self, file: Path, totals: dict[int, Tensor]) -> Sums:
        """A snapshot's sums, put into `totals`; they are of no use where this raises."""
        header = read_header(file)
        fields = self._fields(header)
        damaged = StatisticsError(f"the snapshot {file} is damaged")
        if set(header.tensors) != set(map(str, totals)):
            raise damaged
        digest = hashlib.sha256(header.metadata["state"].encode())
        for layer, total in _ordered(totals):
            saved = read_tensor(header, str(layer))
            if saved.shape != total.shape or saved.dtype != total.dtype:
                raise damaged
            _add_to(digest, layer, saved)
            total.copy_(saved)
        if digest.hexdigest() != header.metadata.get("sha256"):
            raise damaged
        try:
            return Sums(totals, fields["tokens"], Place(**fields["start"]), fields["rows"], fields["batches"])
        except (KeyError, TypeError):
            raise damaged from None


def _ordered(totals: Mapping[int, Tensor]) -> list[tuple[int, Tensor]]:
    return sorted(totals.items(), key=lambda item: str(item[0]))


def _checksum(state: str, totals: Mapping[int, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for layer, total in _ordered(totals):
        _add_to(digest, layer, total)
    return digest.hexdigest()


def _add_to(digest: "hashlib._Hash", layer: int, total: Tensor) -> None:
    digest.update(str(layer).encode())
    digest.update(total.contiguous().view(torch.uint8).numpy().data)
