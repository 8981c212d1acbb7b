"""What is in a ledger: entries, the events that put them there or took them out, and the state they lead to."""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ..edits import Edit, Probe
from ..errors import ArgumentError, CheckpointError, EditError, quoted
from ..search.requests import Request, by_subject

FoundOn = Literal["base", "edited"]
"""What a value was found on: the base, or the base with the update of all that was in the ledger then."""

Kind = Literal["add", "replace", "remove", "merge", "compact", "find"]
"""What an event does; "find" puts in values alone, of entries of one subject that are made together."""

_LEAST_PREFIX = 4  # characters of an id
_TOLD = 10


@dataclass(frozen=True)
class Entry:
    """A fact in a ledger."""

    id: str  # of the request: the same one has the same id in every ledger
    edit: Edit
    tags: tuple[str, ...]  # sorted
    needs_prefix: bool  # the subject's last token is at position 0
    target_tokens: tuple[str, ...]  # each as text
    converged: bool  # whether a value was found; without one it is left out whenever the ledger is closed
    loss: float  # at the value; NaN or infinite where there is none
    steps: int
    found_on: FoundOn = "base"
    event: int = 0  # the number of the event that put it in or changed it last
    time: str = ""  # of that event, as are the next two; of one that merged or compacted, of the event before
    who: str | None = None
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what its event says."""
        left_out = {"event"} if self.time else {"event", *_OF_EVENT}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        # JSON has no NaN and no infinity.
        loss = self.loss if abs(self.loss) < float("inf") else str(self.loss)
        return {**own, "edit": edit_json(self.edit), "loss": loss}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Entry":
        """Raises KeyError, TypeError, ValueError or EditError for anything that `to_json` does not give."""
        tuples = {name: tuple(values[name]) for name in ("tags", "target_tokens")}
        return cls(**{**values, **tuples, "edit": edit_from_json(values["edit"]), "loss": float(values["loss"])})

    @property
    def request(self) -> Request:
        """The same without its rows."""
        return Request(self.edit, [], self.needs_prefix, 0, self.target_tokens)

    def __str__(self) -> str:
        return f"{self.id}: {quoted(self.edit.text)} → {quoted(self.edit.target)}"


_OF_EVENT = ("time", "who", "why")


@dataclass(frozen=True)
class Event:
    """One change of a ledger."""

    number: int  # from 1 on
    kind: Kind
    time: str  # ISO 8601, UTC
    who: str | None
    why: str | None
    added: tuple[Entry, ...]  # with those whose tags alone are new
    removed: tuple[str, ...]  # ids
    file: str | None  # with the values that were found for it
    sha256: str | None  # of that file
    values: tuple[str, ...]  # names of the values in it: ids, or those of `value_names`

    def to_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "added": [entry.to_json() for entry in self.added]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Event":
        """Errors as of `Entry.from_json`."""
        if values["file"] is not None and not re.fullmatch(r"values/\d{6,}\.safetensors", values["file"]):
            raise ValueError(f"a file of values called {values['file']!r}")
        event = cls(**{**values, **{name: tuple(values[name]) for name in ("added", "removed", "values")}})
        about: dict[str, Any] = {name: getattr(event, name) for name in _OF_EVENT}
        entries = [Entry.from_json({**about, **each, "event": event.number}) for each in values["added"]]
        return replace(event, added=tuple(entries))


class State(Mapping[str, Entry]):
    """The entries after some events by id, in the order of their ids, which no order of events can change."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        found: dict[str, Entry] = {}
        for event in events:
            for id in event.removed:
                del found[id]
            found |= {entry.id: entry for entry in event.added}
        self._entries = {id: found[id] for id in sorted(found)}
        self._questions = {entry.edit.question: entry for entry in self._entries.values()}

    def __getitem__(self, id: str) -> Entry:
        return self._entries[id]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def asking(self, edit: Edit) -> Entry | None:
        """The entry of the same prompt and subject."""
        return self._questions.get(edit.question)

    def named(self, id: str) -> Entry:
        """The entry whose id begins so; ArgumentError where none does, or more than one."""
        if not isinstance(id, str) or len(id) < _LEAST_PREFIX:
            shown = reprlib.repr(id)
            raise ArgumentError(f"ids: got {shown}, wanted an id, or at least its first {_LEAST_PREFIX} characters")
        found = [entry for own, entry in self._entries.items() if own.startswith(id)]
        if len(found) != 1:
            problem = f"with which {len(found)} entries begin" if found else "which no entry has"
            raise ArgumentError(f"ids: got {id!r}, {problem}; see the ids by entries()")
        return found[0]

    def matching(
        self, *, text: str | None = None, subject: str | None = None, tags: Sequence[str] | None = None
    ) -> list[Entry]:
        """Those that meet every condition given: a part of prompt or target, the whole subject, one of the tags.

        Raises ArgumentError for a tag that no entry has, and for what is no text, or a blank one, which all would meet.
        """
        for name, value in (("text", text), ("subject", subject)):
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ArgumentError(f"{name}: got {reprlib.repr(value)}, wanted a text that is not blank")
        wanted = None if tags is None else self._known(tags)
        return [
            entry
            for entry in self._entries.values()
            if (text is None or text in entry.edit.text or text in entry.edit.target)
            and (subject is None or subject.strip() == entry.edit.subject.strip())
            and (wanted is None or wanted & set(entry.tags))
        ]

    def _known(self, tags: Sequence[str]) -> set[str]:
        wanted = set(checked_tags(tags))
        known = {tag for entry in self._entries.values() for tag in entry.tags}
        if unknown := sorted(wanted - known):
            have = ", ".join(map(repr, sorted(known))) or "none, as no entry has a tag"
            raise ArgumentError(f"tags: got {', '.join(map(repr, unknown))}, wanted some of {have}")
        return wanted


def by_age(events: Iterable[Event]) -> list[Entry]:
    """The entries after some events, in the order of the times at which they came in; new tags make none younger."""
    found: dict[str, tuple[str, Entry]] = {}
    for event in events:
        for id in event.removed:
            del found[id]
        for entry in event.added:
            came, _ = found.get(entry.id, (entry.time, entry))
            found[entry.id] = came, entry
    return [entry for _, entry in sorted(found.values(), key=lambda pair: pair[0])]


def request_id(edit: Edit) -> str:
    """What the value of an edit depends on, beside what a ledger is bound to, as 16 hex digits."""
    asked = [edit.text, edit.subject_at, edit.subject, edit.boundary, edit.target, edit.end, edit.user_at]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def value_names(entries: Sequence[Entry], *, merges: bool) -> dict[str, str]:
    """By id, what the value of each entry is called when they are made together.

    One that is found alone has the entry's id; where a method merges, one that is found with others of its subject has
    theirs in its name as well.
    """
    names = {entry.id: entry.id for entry in entries}
    if merges:
        for places in by_subject([entry.edit for entry in entries]):
            ids = sorted(entries[i].id for i in places)
            if len(ids) > 1:
                digest = hashlib.sha256(" ".join(ids).encode()).hexdigest()[:16]
                names |= {id: f"{id}-{digest}" for id in ids}
    return names


def edit_json(edit: Edit) -> dict[str, Any]:
    """The fields of an edit that are not their defaults."""
    usual = {f.name: f.default for f in fields(Edit)}
    return {name: value for name, value in asdict(edit).items() if value != usual[name]}


def edit_from_json(values: Mapping[str, Any]) -> Edit:
    """Errors as of `Entry.from_json`."""
    probes = {n: tuple(Probe(**probe) for probe in values[n]) for n in ("portability", "neighbors") if n in values}
    return Edit(**{**values, **probes})


def checked_tags(tags: object) -> tuple[str, ...]:
    """Sorted and without doubles; ArgumentError for anything but texts."""
    given = [tags] if isinstance(tags, str) else list(tags) if isinstance(tags, Iterable) else [tags]
    if not all(isinstance(tag, str) and tag.strip() for tag in given):
        raise ArgumentError(f"tags: got {tags!r}, wanted texts that are not blank")
    for tag in given:
        check_encodable("tags", tag)
    return tuple(sorted(set(given)))


def check_encodable(name: str, text: object) -> None:
    """Raise ArgumentError for anything but a text that UTF-8 can hold, or None."""
    if text is None:
        return
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        raise ArgumentError(f"{name}: got {text!r}, wanted a text that UTF-8 can encode")


def events_of(lines: Sequence[Mapping[str, Any]], place: object) -> list[Event]:
    """The events that lines of a log tell of; CheckpointError for lines of something else."""
    try:
        events = [Event.from_json(line) for line in lines]
        first = events[0].number if events else 1
        if [event.number for event in events] != list(range(first, first + len(events))):
            raise ValueError("its events are not numbered one after another")
        State(events)
    except (KeyError, TypeError, ValueError, EditError) as error:
        raise CheckpointError(f"{place}: not the log of a ledger of this release ({error!r})") from error
    return events


def listed(entries: Sequence[object]) -> str:
    """The first of them, a line each, and how many more there are."""
    lines = [f"  {entry}" for entry in entries[:_TOLD]]
    return "\n".join([*lines, f"  and {len(entries) - _TOLD} more"] if len(entries) > _TOLD else lines)
