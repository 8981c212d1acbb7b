"""The fields of a JSON object, each taken by name, so that those which nobody took can be named."""

import math
from collections.abc import Iterator
from typing import Any

from ..errors import EditError

_LONGEST = 80


class Doubled(dict[str, Any]):
    """A JSON object that gives a field more than once; Python's reader would keep the last and say nothing."""

    doubles: tuple[str, ...] = ()


class Fields:
    """The fields of one object, for a reader to take.

    A field that is null, blank, empty, or a list of nothing else counts as absent. `path` is where the object stands
    in its record, for messages; `name` the same without numbers, for the list of what is not read.
    """

    def __init__(self, values: dict[str, Any], path: str = "", name: str = "") -> None:
        if isinstance(values, Doubled):
            twice = ", ".join(map(shown, values.doubles))
            raise EditError(f"{path + ': ' if path else ''}{twice} given more than once; keep one of them")
        self.keys = list(values)
        self._values = values
        self._left = {key: value for key, value in values.items() if not _blank(value)}
        self._path, self._name = path, name
        self._names = {key: _joined(name, key) for key in values}
        self._opened: list[Fields] = []
        self._rest: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def is_list(self, key: str) -> bool:
        return isinstance(self._left.get(key), list)

    def is_number_or_text(self, key: str) -> bool:
        """An integer or a text, as case_id may be."""
        value = self._left.get(key)
        return isinstance(value, int | str) and not isinstance(value, bool)

    def has(self, *keys: str) -> bool:
        """Whether any of these fields is there."""
        return any(key in self._left for key in keys)

    def take(self, key: str) -> Any:
        """The value as it is, None for an absent one."""
        return self._left.pop(key, None)

    def exactly(self, key: str) -> Any:
        """The value as it is, also a blank one."""
        self._left.pop(key, None)
        return self._values.get(key)

    def texts(self, *keys: str) -> tuple[str, ...]:
        """The text, or the texts of a list, under whichever of these spellings is given; none where none is.

        Raises EditError for anything but texts, and for spellings that are given both and differ.
        """
        given = {key: tuple(self._texts(key)) for key in keys if key in self}
        if not given:
            return ()
        value = next(iter(given.values()))
        if any(other != value for other in given.values()):
            raise EditError(
                f"{' and '.join(self._at(key) for key in given)} give the same thing differently; keep one of them"
            )
        return value

    def first(self, *keys: str) -> str | None:
        """The first of `texts`; the others are not read."""
        names = [self._names[key] for key in keys if key in self]
        first, *others = self.texts(*keys) or (None,)
        if others:
            self._rest += [f"{name} after the first" for name in names]
        return first

    def only(self, *keys: str) -> str | None:
        """The one of `texts`; EditError where there are more."""
        at = " and ".join(self._at(key) for key in keys if key in self)
        text, *others = self.texts(*keys) or (None,)
        if others:
            raise EditError(f"{at}: got {1 + len(others)} texts, wanted one; write a record for each")
        return text

    def lists(self, key: str) -> list[tuple[str, ...]]:
        """The texts of every item of a list, of which an item may be a text or a list of texts."""
        value = self.take(key)
        items = value if isinstance(value, list) else [value]
        return [tuple(_texts(item, self._at(key))) for item in items]

    def lift(self, key: str) -> None:
        """Put the fields of the object under `key` beside the others, before which they go."""
        inner = self.open(key)
        self._opened.remove(inner)
        self._rest += [self._names[name] for name in inner._left if name in self._left]
        self._left |= inner._left
        self._names |= inner._names
        self.keys = [name for name in dict.fromkeys([*self.keys, *inner.keys]) if name != key]

    def open(self, key: str) -> "Fields":
        """The fields of the object under `key`, whose unread ones count as this one's; EditError for another type."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise EditError(f"{self._at(key)}: got {type(value).__name__}, wanted a JSON object")
        return self._open(value, self._at(key), self._names[key])

    def objects(self, key: str, *marks: str) -> Iterator[tuple[str, "Fields"]]:
        """(kind, fields) of every object under `key`: of one with any of the fields `marks`, of a list of them, or of
        either by kind. A value of another form stays unread."""
        value = self._left.get(key)
        if isinstance(value, dict) and not isinstance(value, Doubled) and not any(mark in value for mark in marks):
            groups = list(value.items())
        else:
            groups = [("", value)]
        flat = [
            (kind, f"[{i}]" if isinstance(group, list) else "", item)
            for kind, group in groups
            for i, item in enumerate(group if isinstance(group, list) else [group])
            if not _blank(item)
        ]
        if all(isinstance(item, dict) for *_, item in flat):
            self.take(key)
            for kind, number, item in flat:
                name = _joined(self._names.get(key, key), kind)
                yield kind, self._open(item, _joined(self._at(key), kind) + number, name)

    def unread(self) -> Iterator[str]:
        """Names of what nobody took."""
        for key in self._left:
            yield self._names[key]
        yield from self._rest
        for inner in self._opened:
            yield from inner.unread()

    def _open(self, value: dict[str, Any], path: str, name: str) -> "Fields":
        self._opened.append(Fields(value, path, name))
        return self._opened[-1]

    def _at(self, key: str) -> str:
        return _joined(self._path, key)

    def _texts(self, key: str) -> Iterator[str]:
        # CounterFact's {"str": text, "id": …}
        if isinstance(self._left[key], dict) and "str" in self._left[key]:
            return iter(self.open(key).texts("str"))
        return _texts(self.take(key), self._at(key))


def shown(name: str) -> str:
    """A name for a message: one that does not print, or is long, as Python would write it."""
    plain = name if name.isprintable() and name else ascii(name)
    return plain if len(plain) <= _LONGEST else plain[:_LONGEST] + "…"


def _joined(path: str, key: str) -> str:
    return ".".join(part for part in (path, key and shown(key)) if part)


def _texts(value: object, path: str) -> Iterator[str]:
    for item in _flat(value):
        if isinstance(item, str):
            if item.strip():
                yield item
        elif item is not None and item != []:
            raise EditError(f"{path}: got {_named(item)}")


def _named(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which JSON does not have, wanted a text, or null where there is none"
    if isinstance(value, bool):
        return f"{str(value).lower()}, wanted a text"
    if isinstance(value, int | float):
        return f"the number {shown(str(value))}, wanted a text; write it in quotes"
    return f"{'a JSON object' if isinstance(value, dict) else 'lists inside lists'}, wanted a text"


def _flat(value: object) -> Iterator[object]:
    """The items of a list, and of lists in it; the value itself where it is none."""
    for item in value if isinstance(value, list) else [value]:
        yield from item if isinstance(item, list) else [item]


def _blank(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(item is None or item in ("", [], {}) or _blank_text(item) for item in _flat(value))
    return value is None or value == {}


def _blank_text(value: object) -> bool:
    return isinstance(value, str) and not value.strip()
