"""One `Edit` per fact to change, checked when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import EditError

_MOST_LISTED = 10


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
        raise EditError(listing(faults))


def listing(faults: list[str]) -> str:
    """The first ten faults, a line each, and how many more there are."""
    lines = faults[:_MOST_LISTED]
    if len(faults) > len(lines):
        lines.append(f"and {len(faults) - len(lines)} more")
    return "\n".join(lines)


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


def _name(index: int, edit: Edit) -> str:
    return f"edits[{index}]" if edit.case_id is None else f"edits[{index}] (case_id {edit.case_id})"
