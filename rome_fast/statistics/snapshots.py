"""Sums on disk every few seconds of work, so that a run that was killed goes on where it was.

A run keeps its last two snapshots: each is written beside them and renamed into place, and one that cannot be read is
passed over for the one before. A snapshot says where its window begins (`Place`) and how many batches are in the sums;
batches do not depend on snapshots, so the sums of a resumed run are those of an undisturbed one to the bit.
"""

import fcntl
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

import torch
from torch import Tensor

from ..errors import CheckpointError, StatisticsError
from ..weights import load_tensors, save_tensors
from ..weights.files import os_errors
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

    def latest(self, totals: Mapping[int, Tensor]) -> Sums | None:
        """The newest sums that are readable, on the devices of `totals`; warns where newer ones are not."""
        found: dict[int, Sums] = {}
        damaged = []
        for slot in (0, 1):
            file = self._file(slot)
            if file.exists():
                try:
                    number, sums = self._read(file, totals)
                    found[number] = sums
                except (CheckpointError, StatisticsError) as error:
                    damaged.append(str(error))
        self._number = max(found, default=0)
        if damaged:
            rest = f"going on from the other one, at {found[self._number].tokens} tokens" if found else "beginning anew"
            warnings.warn(f"{'; '.join(damaged)}; {rest}", stacklevel=3)
        return found[self._number] if found else None

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
        tensors = {str(layer): total.cpu() for layer, total in sums.totals.items()}
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
        metadata = {"format": _FORMAT, "state": state, "sha256": _checksum(state, tensors)}
        try:
            save_tensors(self._file(number % 2), tensors, metadata)
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
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StatisticsError(
                f"out: another process is collecting the same statistics in {self.folder}; wait for it to end"
            ) from None
        except OSError:
            # A file system without locks: then nobody can be told apart.
            pass
        self._lock = descriptor

    def _read(self, file: Path, like: Mapping[int, Tensor]) -> tuple[int, Sums]:
        tensors, metadata = load_tensors(file)
        state = metadata.get("state", "")
        damaged = StatisticsError(f"the snapshot {file} is damaged")
        if metadata.get("format") != _FORMAT or metadata.get("sha256") != _checksum(state, tensors):
            raise damaged
        fields = json.loads(state)
        totals = {layer: tensors.get(str(layer), torch.empty(0)) for layer in like}
        if any(totals[layer].shape != total.shape for layer, total in like.items()) or fields["run"] != self._run:
            raise damaged
        moved = {layer: totals[layer].to(total.device) for layer, total in like.items()}
        return fields["number"], Sums(
            moved, fields["tokens"], Place(**fields["start"]), fields["rows"], fields["batches"]
        )


def _checksum(state: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
