"""JSON of a measurement, read back for its report: one error names file, line, field, what came and what was wanted."""

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..errors import CheckpointError

_Kind = TypeVar("_Kind")


def read_object(file: Path, remedy: str) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is no file."""
    text = _text(file, remedy)
    return None if text is None else _parse(text, str(file), remedy)


def read_lines(file: Path, kind: type[_Kind], remedy: str) -> list[_Kind]:
    """The objects of a JSON lines file, as dataclasses of that kind; none where there is no file.

    Fields that the kind does not have are passed over. Raises CheckpointError, as `read_object` does.
    """
    text = _text(file, remedy) or ""
    found = []
    # Not splitlines: there are more line ends than JSON has.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            found.append(_filled(_parse(line, where, remedy), kind, where, remedy))
    return found


def is_number(value: object) -> bool:
    """Whether a value is a number, other than yes or no, that a float can hold."""
    # Whole numbers have no bound in JSON; infinite ones and NaN are floats.
    return isinstance(value, float) or (type(value) is int and abs(value) <= sys.float_info.max)


def _text(file: Path, remedy: str) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"reading {file}: {error}; {remedy}") from error


def _parse(text: str, where: str, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON, perhaps cut short ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: got {type(value).__name__}, wanted an object; {remedy}")
    return value


def _filled(line: Mapping[str, Any], kind: type[_Kind], where: str, remedy: str) -> _Kind:
    values = {}
    # What is passed in is a dataclass, which the type of a type cannot say.
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in line and (field.default is not MISSING or field.default_factory is not MISSING):
            continue
        value: Any = line.get(field.name)
        wanted = field.type
        # A number without a fraction, or the yes or no of one prompt.
        if (isinstance(value, bool) or is_number(value)) and _fits(1.0, wanted):
            value = float(value)
        if not _fits(value, wanted):
            name = getattr(wanted, "__name__", str(wanted))
            raise CheckpointError(f'{where}: got {value!r} as "{field.name}", wanted {name}; {remedy}')
        values[field.name] = value
    return kind(**values)


def _fits(value: object, wanted: Any) -> bool:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is list:
        return isinstance(value, list) and all(_fits(part, parts[0]) for part in value)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if wanted is float:
        return is_number(value)
    return isinstance(value, wanted)
