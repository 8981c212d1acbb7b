"""The folder of a ledger: what it is bound to, its log of events, and the files of values that these have found."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ..errors import ArgumentError, CheckpointError
from ..search.search import Solved
from ..weights.files import check_writable, locked, os_errors, partial, rename_new, sha256_file, sync, write_file
from .base import Base
from .entries import Entry, Event, Kind, check_encodable, events_of
from .log import Log
from .values import read_values, save_values

_BASE, _LOG, _VALUES = "ledger.json", "log.jsonl", "values"


class Store:
    """The folder of one ledger. Values are written before the event that names them, and never changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = folder.absolute()  # wherever the process works later
        self._log = Log(self._place / _LOG)
        self._sound: set[Path] = set()  # files of values that were found to be as they were written

    @classmethod
    def create(cls, folder: Path, base: Base) -> "Store":
        """A new one, complete or not at all. Raises ArgumentError where there is something, and CheckpointError."""
        check_absent(folder)
        place = folder.absolute()
        with os_errors(f"writing {folder}"), partial(place) as work:
            write_file(work / _BASE, base.to_bytes())
            write_file(work / _LOG, b"")
            (work / _VALUES).mkdir()
            sync(work)
            try:
                rename_new(work, place)
            except FileExistsError:
                raise ArgumentError(f"folder: {folder} appeared meanwhile; choose a new name") from None
            sync(place.parent)
        return cls(folder)

    def base(self) -> Base:
        """What the ledger is bound to; CheckpointError for a folder that is none."""
        if not (self._place / _BASE).is_file():
            raise CheckpointError(f"{self._place}: it is no ledger, as it has no {_BASE}; make one by Ledger.create")
        return Base.read(self._place / _BASE)

    def events(self) -> list[Event]:
        """All events, the oldest first; raises CheckpointError."""
        return events_of(self._log.read(), self._log.file)

    @contextmanager
    def writing(self, who: str | None, why: str | None) -> Iterator[list[Event]]:
        """The events so far, to which nobody else adds in this block; CheckpointError where somebody does already."""
        check_encodable("who", who)
        check_encodable("why", why)
        check_writable(self._place)
        with locked(self._place):
            yield self.events()

    def append(
        self,
        kind: Kind,
        events: Sequence[Event],
        who: str | None,
        why: str | None,
        *,
        added: Sequence[Entry] = (),
        removed: Sequence[str] = (),
        values: Mapping[str, Solved] | None = None,
    ) -> None:
        """Add an event to those so far, its values first, inside `writing`; "compact" takes the place of all of them.

        Raises CheckpointError; the events are then those of before.
        """
        number = events[-1].number + 1 if events else 1
        file = sha256 = None
        if values:
            file = f"{_VALUES}/{number:06}.safetensors"
            path = self._place / file
            with os_errors(f"writing {path}"):
                path.parent.mkdir(exist_ok=True)
            # One of the same name is of a writer who died before its event was.
            save_values(path, values)
            sha256 = sha256_file(path)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        event = Event(number, kind, time, who, why, tuple(added), tuple(removed), file, sha256, tuple(values or ()))
        if kind != "compact":
            self._log.append(event.to_json())
            return
        self._log.restart(event.to_json())
        with os_errors(f"cleaning {self._place}"):
            for old in (self._place / _VALUES).glob("*.safetensors"):
                if f"{_VALUES}/{old.name}" != file:
                    old.unlink()

    def files(self, events: Sequence[Event]) -> dict[str, Path]:
        """By id, the file that has the value."""
        return {id: self._place / event.file for event in events if event.file is not None for id in event.values}

    def values(self, events: Sequence[Event], ids: Iterable[str]) -> dict[str, Solved]:
        """What was found, by id; CheckpointError where a file is not as it was written."""
        files, ids = self.files(events), list(ids)
        sha256 = {self._place / event.file: event.sha256 for event in events if event.file is not None}
        for path in {files[id] for id in ids} - self._sound:
            if sha256_file(path) != sha256[path]:
                raise CheckpointError(f"{path}: it was changed since it was written; restore it from a copy")
            self._sound.add(path)
        return read_values(files, ids)


def check_absent(folder: Path) -> None:
    """Raise ArgumentError where there is something already, CheckpointError where nothing can be written."""
    if os.path.lexists(folder):
        raise ArgumentError(f"folder: {folder} exists already; open a ledger by Ledger.open, or choose a new name")
    if not folder.absolute().parent.is_dir():
        raise ArgumentError(f"folder: the directory {folder.absolute().parent} does not exist; make it first")
    check_writable(folder.absolute().parent)
