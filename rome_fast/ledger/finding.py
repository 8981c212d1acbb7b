"""The values that a ledger's entries are made with: those of its files, and those of entries made together anew."""

from collections.abc import Collection, Sequence

from ..errors import CheckpointError
from ..search.requests import by_subject
from ..search.search import Solved
from .entries import Entry, Event, value_names
from .store import Store
from .working import Working


class FoundValues:
    """Where a method merges, facts of one subject have a value that depends on which of them are there."""

    def __init__(self, store: Store, *, merges: bool) -> None:
        self._store, self._merges = store, merges
        self._kept: dict[str, Solved] = {}  # of entries made together, that were searched here

    def names(self, entries: Sequence[Entry]) -> dict[str, str]:
        """By id, what the value of each of these entries is called when they are made together."""
        return value_names(entries, merges=self._merges)

    def of(self, model: Working, events: Sequence[Event], entries: Sequence[Entry]) -> list[Solved]:
        """The values of entries that are made together; those that have never been are searched, and kept."""
        names = self.names(entries)
        missing = self.searched(model, entries, self._store.files(events).keys() | self._kept.keys())
        if missing:
            self._kept |= missing
            try:
                with self._store.writing(None, None) as by_now:
                    if left := {name: v for name, v in missing.items() if name not in self._store.files(by_now)}:
                        self._store.append("find", by_now, None, None, values=left)
            except CheckpointError:
                pass  # somebody writes, or nobody may: they are searched again the next time
        values = {**self._store.values(events, [n for n in names.values() if n not in self._kept]), **self._kept}
        return [values[names[entry.id]] for entry in entries]

    def searched(self, model: Working, entries: Sequence[Entry], known: Collection[str]) -> dict[str, Solved]:
        """By name, the values of those entries that are made together with others for the first time."""
        names = self.names(entries)
        groups = [[entries[i] for i in places] for places in by_subject([entry.edit for entry in entries])]
        groups = [group for group in groups if any(names[entry.id] not in known for entry in group)]
        found = model.find_merged([[entry.edit for entry in group] for group in groups]) if groups else []
        return {
            names[entry.id]: solved
            for group, solved_of_group in zip(groups, found, strict=True)
            for entry, solved in zip(group, solved_of_group, strict=True)
        }
