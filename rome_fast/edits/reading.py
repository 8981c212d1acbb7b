"""Edits files: JSON lines or one JSON array, in the shapes that data sets of requests have."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import EditError
from .edit import Edit, listing


def load_edits(path: str | Path) -> list[Edit]:
    """Read edits from a file of JSON lines, or of one JSON array, in any of three shapes.

    - `{"prompt", "subject", "target_new", "target_true"?, "paraphrase_prompts"?, "neighborhood_prompts"?,
      "neighborhood_answer"?, "case_id"?}`; `target` is another spelling of `target_new`.
    - CounterFact: `{"requested_rewrite": {"prompt", "subject", "target_new": {"str"},
      "target_true": {"str"}}, "paraphrase_prompts", "neighborhood_prompts", "case_id"}`;
      the neighbourhood's answer is the true target.
    - EasyEdit: `{"prompt": full text, "subject", "target_new", "ground_truth", "rephrase_prompt",
      "locality_prompt", "locality_ground_truth"}`, the last two also as
      `"locality": {"neighborhood": {"prompt", "ground_truth"}}`.

    Keys with other names are ignored. Raises EditError for a missing, unreadable or empty file, and one that
    lists the first 10 faulty requests by line (by position in an array).
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EditError(
            f"path: cannot read the edits file {path} ({error.strerror}); give a file of JSON lines"
        ) from error
    except UnicodeDecodeError as error:
        raise EditError(f"{path.name}: not UTF-8 text ({error}); save the edits file as UTF-8") from error
    if not text.strip():
        raise EditError(f"{path.name}: the file is empty, wanted one JSON object per line")

    edits: list[Edit] = []
    faults: list[str] = []
    for place, record in _records(path.name, text, faults):
        try:
            edits.append(_edit_from_record(record))
        except EditError as error:
            faults.append(f"{place}: {error}")
    if faults:
        raise EditError(listing(faults))
    if not edits:
        raise EditError(f"{path.name}: the array is empty, wanted at least one request")
    return edits


def _records(name: str, text: str, faults: list[str]) -> Iterator[tuple[str, object]]:
    """(place, record) of every request; a line that is not JSON goes to `faults` instead."""
    if text.lstrip().startswith("["):
        try:
            array = json.loads(text)
        except json.JSONDecodeError as error:
            faults.append(f"{name}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})")
            return
        for i, record in enumerate(array, start=1):
            yield f"{name}, item {i}", record
        return
    # Not splitlines(): a JSON string may hold U+2028 and its like, which splitlines() takes for line ends.
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"{name}, line {i}: not valid JSON ({error.msg} at column {error.colno})")
            continue
        yield f"{name}, line {i}", record


# Every spelling under which the file shapes give a field of Edit, once nested objects are flattened.
_SPELLINGS = {
    "prompt": ("prompt",),
    "subject": ("subject",),
    "target": ("target_new", "target"),
    "target_true": ("target_true", "ground_truth"),
    "paraphrase_prompts": ("paraphrase_prompts", "rephrase_prompt"),
    "neighborhood_prompts": ("neighborhood_prompts", "locality_prompt"),
    "neighborhood_answer": ("neighborhood_answer", "locality_ground_truth"),
    "case_id": ("case_id",),
}


def _edit_from_record(record: object) -> Edit:
    if not isinstance(record, dict):
        raise EditError(f"got {type(record).__name__}, wanted a JSON object")
    flat = _flattened(record)
    values: dict[str, Any] = {}
    for field, spellings in _SPELLINGS.items():
        unwrap = _texts if field.endswith("_prompts") else _text
        given = {key: unwrap(flat[key]) for key in spellings if flat.get(key) is not None}
        if not given:
            continue
        value = next(iter(given.values()))
        if any(other != value for other in given.values()):
            raise EditError(f"{' and '.join(given)} give the same thing differently; keep one of them")
        values[field] = value
    missing = [_SPELLINGS[field][0] for field in ("prompt", "subject", "target") if field not in values]
    if missing:
        raise EditError(f"{', '.join(missing)} missing; the keys found are {', '.join(flat) or 'none'}")
    if "requested_rewrite" in record and "target_true" in values:
        values.setdefault("neighborhood_answer", values["target_true"])
    return Edit(**values)


def _flattened(record: dict[str, Any]) -> dict[str, Any]:
    """The record with CounterFact's `requested_rewrite` and EasyEdit's `locality` moved to the top."""
    flat = dict(record)
    rewrite = flat.pop("requested_rewrite", {})
    if not isinstance(rewrite, dict):
        raise EditError(f"requested_rewrite: got {type(rewrite).__name__}, wanted a JSON object")
    flat |= rewrite
    locality = flat.pop("locality", None)
    neighborhood = locality.get("neighborhood") if isinstance(locality, dict) else None
    if isinstance(neighborhood, dict):
        flat.setdefault("locality_prompt", neighborhood.get("prompt"))
        flat.setdefault("locality_ground_truth", neighborhood.get("ground_truth"))
    return flat


def _text(value: Any) -> Any:
    """The one text in CounterFact's `{"str": text}` or in a list of one; anything else is left to Edit."""
    if isinstance(value, dict):
        return value.get("str", value)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _texts(value: Any) -> Any:
    """A single prompt as a tuple of one; anything else is left to Edit."""
    return (value,) if isinstance(value, str) else value
