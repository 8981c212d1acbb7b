"""The bytes of an edits file to JSON records, with a plain word for everything else that a user may hand over."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EditError
from .fields import Doubled, shown
from .shapes import is_request

_TO_JSON_LINES = 'pandas.read_{}(…).to_json("edits.jsonl", orient="records", lines=True) converts it'
_MAGIC = {
    b"\x1f\x8b": "is compressed with gzip; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"BZh": "is compressed with bzip2; unpack it",
    b"\xfd7zXZ": "is compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it",
    b"PAR1": f"is Parquet, wanted JSON; {_TO_JSON_LINES.format('parquet')}",
    b"ARROW1": f"is Arrow, wanted JSON; {_TO_JSON_LINES.format('feather')}",
}
# A JSON string holds none of these unescaped; U+2028 and its like, at which splitlines() cuts, it may hold.
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Broken:
    """A text that is no JSON value, and why; `line` counts from that of the text's first line."""

    fault: str
    line: int = 1


def read_records(path: Path) -> tuple[list[tuple[str, object]], list[str]]:
    """(place, record) of every line, or of every item where the file is one JSON array; a `Broken` for a bad line.

    A list that is the only one inside a single object, as in `{"data": […]}`, is read as if it stood alone; the names
    of the fields beside it come second. Raises EditError for a file in which no records can be told apart.
    """
    name, text = path.name, _text(path)
    if text.lstrip().startswith("["):
        return _items(name, _parse(text)), []
    lines = [(number, line) for number, line in enumerate(_LINE_END.split(text), start=1) if line.strip()]
    first = _parse(lines[0][1])
    whole = first
    if isinstance(first, Broken) and text.lstrip().startswith("{"):
        whole = _parse(text)
        _check_one_object_a_line(name, text, whole)
    elif isinstance(first, Broken):
        _check_table(path, lines[0][1])
    if isinstance(whole, dict) and (whole is not first or len(lines) == 1) and not is_request(whole):
        lists = [key for key, value in whole.items() if _holds_objects(value)]
        if len(lists) > 1:
            raise EditError(
                f"{name}: one object with {len(lists)} lists, {', '.join(map(shown, lists))}; put the one that is "
                "meant into a file of its own"
            )
        if lists:
            return _items(name, whole[lists[0]]), [key for key in whole if key != lists[0]]
    return [(f"{name}, line {number}", _parse(line)) for number, line in lines], []


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise EditError(f"path: cannot read the edits file {path} ({why}); give a file of JSON lines") from error
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise EditError(f"{path.name}: the file {what}")
    # UTF-16 without its mark passes for UTF-8 with a NUL in every other place, which JSON never has.
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise EditError(f"{path.name}: not UTF-8 text but UTF-16, or no text at all; save the edits file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EditError(f"{path.name}: not UTF-8 text ({error}); save the edits file as UTF-8") from error
    if not text.strip():
        raise EditError(f"{path.name}: the file is empty, wanted one JSON object per line")
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    doubled = Doubled(values)
    names = [name for name, _ in pairs]
    doubled.doubles = tuple(name for name in values if names.count(name) > 1)
    return doubled


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parse(text: str) -> Any:
    """The value that a text spells, or a Broken."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return Broken(f"not valid JSON ({error.msg} at column {error.colno}){_hint(text, error)}", error.lineno)
    except RecursionError:
        return Broken("nested too deep")
    except ValueError:  # of an integer with more digits than Python converts
        return Broken("a number that is too long to be read")


def _hint(text: str, error: json.JSONDecodeError) -> str:
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("", "}", "]"):
        return "; take the last comma away"
    if error.msg == "Extra data" and after.startswith((",", "{")):
        return "; end the line behind the object"
    if after.startswith("'"):
        return "; strings stand in double quotes"
    return ""


def _items(name: str, array: list[Any] | Broken) -> list[tuple[str, object]]:
    if isinstance(array, Broken):
        raise EditError(f"{name}, line {array.line}: {array.fault}")
    if not array:
        raise EditError(f"{name}: the array is empty, wanted at least one request")
    return [(f"{name}, item {number}", record) for number, record in enumerate(array, start=1)]


def _holds_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _check_one_object_a_line(name: str, text: str, whole: object) -> None:
    """For a text whose first line is no JSON value but the beginning of an object."""
    if isinstance(whole, dict) and is_request(whole):
        raise EditError(
            f"{name}: one JSON object over several lines, wanted one object per line or an array; write it on one "
            "line, or put [ and ] around it"
        )
    try:
        _, end = _DECODER.raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return
    if isinstance(whole, Broken) and _LINE_END.search(text.lstrip()[:end]):
        raise EditError(
            f"{name}: JSON objects over several lines each, wanted one object per line or an array; jq -c . FILE "
            "puts each on a line"
        )


def _check_table(path: Path, header: str) -> None:
    columns = [column.strip(" \"'") for column in re.split(r"[,;\t]", header)]
    if path.suffix.lower() in (".csv", ".tsv") or {"prompt", "subject", "src"} & set(columns):
        raise EditError(f"{path.name}: a table of columns, wanted JSON; {_TO_JSON_LINES.format('csv')}")
