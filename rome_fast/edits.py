"""What a user asks for: one `Edit` per fact, and the file shapes edits are read from."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EditError

_MAX_LISTED_FAULTS = 10


@dataclass(frozen=True)
class Edit:
    """One fact to change: after the edit, `prompt` about `subject` is to be continued by `target`.

    prompt: template with exactly one `{}` where the subject stands. A full text that holds the subject
        exactly once is accepted as well and turned into such a template.
    subject, target: white space around them is dropped.
    target_true: the answer before the edit, for scoring.
    paraphrase_prompts: full texts that ask the same in other words.
    neighborhood_prompts: full texts about other subjects, whose answer must stay `neighborhood_answer`.
    case_id: a name for reports.

    Raises EditError for a value of the wrong type, a blank text, and a prompt that does not fit its subject.
    """

    prompt: str
    subject: str
    target: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    neighborhood_answer: str | None = None
    case_id: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            _check_text(name, getattr(self, name))
        for name in ("target_true", "neighborhood_answer"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("paraphrase_prompts", "neighborhood_prompts"):
            object.__setattr__(self, name, _checked_texts(name, getattr(self, name)))
        if isinstance(self.case_id, bool) or not isinstance(self.case_id, int | str | None):
            raise EditError(f"case_id: got {self.case_id!r}, wanted an integer, a string or None")
        object.__setattr__(self, "subject", self.subject.strip())
        object.__setattr__(self, "target", self.target.strip())
        object.__setattr__(self, "prompt", _template(self.prompt, self.subject))

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


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
        raise EditError(_listing(faults))
    if not edits:
        raise EditError(f"{path.name}: the array is empty, wanted at least one request")
    return edits


def find_conflicts(edits: Sequence[Edit]) -> None:
    """Raise EditError if two edits share prompt and subject, whether their targets differ or not.

    Blanks at the end of a prompt do not tell prompts apart: none of them comes before a target.

    Lists the first 10 such pairs, each edit by its index and, where it has one, its case_id.
    """
    first: dict[tuple[str, str], int] = {}
    faults = []
    for i, edit in enumerate(edits):
        j = first.setdefault((edit.prompt.rstrip(), edit.subject), i)
        if j == i:
            continue
        pair = f"{_name(j, edits[j])} and {_name(i, edit)}"
        if edits[j].target == edit.target:
            faults.append(f"{pair} both ask for {edit.text!r} -> {edit.target!r}; drop one of them")
        else:
            faults.append(f"{pair} ask for {edit.text!r} -> {edits[j].target!r} and -> {edit.target!r}; keep one")
    if faults:
        raise EditError(_listing(faults))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise EditError(f"{name}: got {type(value).__name__}, wanted a string")
    if not value.strip():
        raise EditError(f"{name}: got {value!r}, wanted a text that is not blank")
    # JSON can spell half of a surrogate pair; a tokenizer would fail on it much later.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise EditError(f"{name}: got {value!r} with half of a surrogate pair, wanted text that UTF-8 can encode")


def _checked_texts(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise EditError(f"{name}: got {type(values).__name__}, wanted a tuple or list of strings")
    for i, value in enumerate(values):
        _check_text(f"{name}[{i}]", value)
    return tuple(values)


def _template(prompt: str, subject: str) -> str:
    """The prompt with exactly one `{}`, put in place of the subject where the prompt spells it out."""
    slots = prompt.count("{}")
    if slots == 1:
        return prompt
    if slots > 1:
        raise EditError(f"prompt: got {slots} '{{}}' in {prompt!r}, wanted exactly one; keep the subject's")
    start = prompt.find(subject)
    if start < 0:
        raise EditError(f"subject {subject!r} is not in the prompt {prompt!r}; write '{{}}' where the subject stands")
    if start != prompt.rfind(subject):
        raise EditError(f"subject {subject!r} is in the prompt {prompt!r} more than once; write '{{}}' for one of them")
    return prompt[:start] + "{}" + prompt[start + len(subject) :]


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


def _name(index: int, edit: Edit) -> str:
    return f"edits[{index}]" if edit.case_id is None else f"edits[{index}] (case_id {edit.case_id})"


def _listing(faults: list[str]) -> str:
    lines = faults[:_MAX_LISTED_FAULTS]
    if len(faults) > len(lines):
        lines.append(f"and {len(faults) - len(lines)} more")
    return "\n".join(lines)
