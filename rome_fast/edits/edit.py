"""One `Edit` per fact to change, checked when it is made."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, EditError, quoted
from . import chat
from .boundary import boundary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_LISTED = 10
_PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "essence_prompts", "negation_prompts")
_PROBES = ("portability", "neighbors")
REVERSAL = "reversal"
"""The kind of probes that ask from the target back to the subject."""

# What an edit through a template has of its own.
_OF_CHAT = ("prompt", "separator", "end", "user_at", "slot")


@dataclass(frozen=True)
class Probe:
    """A question beside the edit itself, as a full text, and its right answer in one or several spellings.

    kind: what it tests, for reports.
    """

    prompt: str
    answers: tuple[str, ...]
    kind: str = ""

    def __post_init__(self) -> None:
        _check_text("probe prompt", self.prompt)
        object.__setattr__(self, "answers", _checked_texts("probe answers", self.answers, None))
        if not self.answers:
            raise EditError("probe answers: got none, wanted at least one")
        if not isinstance(self.kind, str):
            raise EditError(f"probe kind: got {type(self.kind).__name__}, wanted a string")

    @property
    def is_reversal(self) -> bool:
        """Whether its kind says so, as data sets spell it: "reversal", "Reversed_Relation", "inverse"."""
        return any(word in self.kind.lower() for word in ("revers", "inverse"))


@dataclass(frozen=True)
class Edit:
    """One fact to change: after the edit, `prompt` about `subject` is to be continued by `target`.

    prompt: template with exactly one `{}` where the subject stands, to the character what the model will be asked:
        white space at its ends counts. A full text that holds the subject exactly once is accepted as well and turned
        into such a template, where the subject stands as the text spells it.
    subject: with the white space that it has. The last character that is none is where the edit takes place.
    target: white space around it is dropped, unless `separator` is given.
    target_true: the answer before the edit, for scoring.
    paraphrase_prompts: full texts that ask the same in other words; `{}` in them becomes the subject.
    neighborhood_prompts: full texts about other subjects, whose answer must stay `neighborhood_answer`.
    case_id: a name for reports.
    separator: what stands between a prompt and a target. None: one space or nothing, by the rule of `boundary`.
    end: whether the model is to stop behind the target: True for the tokenizer's end of text, or a token's own text.
    user_at, slot: of a text that a chat template made, see `chat`: where in `prompt` the user's last message begins,
        and where the subject's `{}` stands; any other `{}` is text.
    aliases: other spellings of the target that are right as well.
    portability: what follows from the edit, to be answered as the probes say; `{}` in them becomes the subject.
    neighbors: more of the neighbourhood, each with answers of its own; `{}` as in `portability`.
    essence_prompts: full texts about the subject that do not ask for what is edited; `{}` becomes the subject.
    negation_prompts: full texts that deny the fact, as "… is not", which the target must not follow; `{}` as before.
    relation: a name for what is asked of the subject, the same in all requests that ask it.

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
    separator: str | None = None
    end: bool | str = False
    user_at: int | None = None
    slot: int | None = None
    aliases: tuple[str, ...] = ()
    portability: tuple[Probe, ...] = ()
    neighbors: tuple[Probe, ...] = ()
    essence_prompts: tuple[str, ...] = ()
    negation_prompts: tuple[str, ...] = ()
    relation: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            _check_text(name, getattr(self, name))
        for name in ("target_true", "neighborhood_answer", "relation"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if isinstance(self.case_id, bool) or not isinstance(self.case_id, int | str | None):
            raise EditError(f"case_id: got {self.case_id!r}, wanted an integer, a string or None")
        if isinstance(self.case_id, str) and self.case_id:
            _check_text("case_id", self.case_id)
        if not isinstance(self.separator, str | None):
            raise EditError(f"separator: got {self.separator!r}, wanted a text, perhaps an empty one, or None")
        if not isinstance(self.end, bool | str) or self.end == "":
            raise EditError(f"end: got {self.end!r}, wanted True, False or the text of a token")
        for name in ("user_at", "slot"):
            at = getattr(self, name)
            if at is not None and (not isinstance(at, int) or not 0 <= at <= len(self.prompt)):
                raise EditError(f"{name}: got {at!r}, wanted a place in the prompt; let Edit.chat find it")
        if self.separator is None:
            object.__setattr__(self, "target", self.target.strip())
        if self.slot is None:
            for name, text in zip(("prompt", "subject"), _template(self.prompt, self.subject), strict=True):
                object.__setattr__(self, name, text)
        elif self.prompt[self.slot : self.slot + 2] != "{}":
            raise EditError(f"slot: got {self.slot}, where there is no '{{}}' in {quoted(self.prompt)}; leave it out")
        for name in _PROMPTS:
            # A template has filled in what it made.
            subject = None if self.slot is not None else self.subject
            object.__setattr__(self, name, _checked_texts(name, getattr(self, name), subject))
        object.__setattr__(self, "aliases", _checked_texts("aliases", self.aliases, None))
        for name in _PROBES:
            subject = None if self.slot is not None else self.subject
            object.__setattr__(self, name, _checked_probes(name, getattr(self, name), subject))

    @classmethod
    def chat(
        cls,
        messages: Sequence[Mapping[str, str]] | str,
        subject: str,
        target: str,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: Mapping[str, Any] | None = None,
        end: bool | str = True,
        separator: str | None = None,
        **rest: Any,
    ) -> "Edit":
        """An edit of what the model answers in a chat, through the chat template of its tokenizer.

        messages: `{"role": …, "content": …}` each, the user's last, or just what the user says. The subject stands in
            the last message: `{}` there, or its only occurrence. Contexts will stand at the beginning of that message.
        template: more arguments of `apply_chat_template`, as `{"enable_thinking": False}`.
        end: whether the model is to stop behind the target, with the token that the template closes an answer with.
        separator: what stands before the target; None for what the template puts there, which mostly is nothing.
        rest: the other fields of an Edit; its paraphrases and other prompts are what the user says instead.

        Raises EditError for messages that cannot be put through the template, and for a tokenizer without one.
        """
        _check_text("subject", subject)
        if not isinstance(template, Mapping | None):
            raise EditError(f"template: got {template!r}, wanted arguments by name, as {{'enable_thinking': False}}")
        *earlier, last = chat.checked_messages(messages)
        _check_text("messages[-1]", last["content"])
        content, subject = _template(last["content"], subject)
        before, after = content.split("{}")
        put = chat.Template(tokenizer, earlier, template or {})
        placed = put.with_slot(before, subject, after)
        for name in _PROMPTS:
            texts = _checked_texts(name, rest.get(name, ()), subject)
            rest[name] = tuple(put.text(text) for text in texts)
        for name in _PROBES:
            probes = _checked_probes(name, rest.get(name, ()), subject)
            rest[name] = tuple(replace(probe, prompt=put.text(probe.prompt)) for probe in probes)
        answers = {"target": target, **{name: rest.pop(name, None) for name in ("target_true", "neighborhood_answer")}}
        if separator is None:
            # Found in the template and not in the answers, which lose their blanks as by the rule.
            separator = put.separator
            answers = {name: text.strip() if isinstance(text, str) else text for name, text in answers.items()}
            for name in _PROBES:
                rest[name] = tuple(replace(p, answers=tuple(a.strip() for a in p.answers)) for p in rest[name])
        end = put.end if end is True else end
        return cls(**placed._asdict(), **answers, separator=separator, end=end, **rest)

    def as_chat(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        end: bool | str = True,
    ) -> "Edit":
        """The same request where the user says the prompt in a chat, behind a system prompt where one is given.

        So do the paraphrases and all other prompts. Arguments and errors are those of `chat`.
        """
        if self.user_at is not None:
            raise EditError("edit: it is a chat already; put plain prompts through a template")
        messages = [{"role": "system", "content": system}] if system is not None else []
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OF_CHAT}
        content = {"role": "user", "content": self.prompt}
        return Edit.chat([*messages, content], tokenizer=tokenizer, template=template, end=end, **own)

    def behind(self, context: str) -> "Edit":
        """The same request with a text before its prompt, in a chat before what the user says last."""
        at = self.user_at or 0
        slot = None if self.slot is None else self.slot + len(context)
        return replace(self, prompt=self.prompt[:at] + context + self.prompt[at:], slot=slot)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in: to the character what the model is asked."""
        start = self.subject_at
        return self.prompt[:start] + self.subject + self.prompt[start + 2 :]

    @property
    def boundary(self) -> str:
        """What stands between the prompt and the target: `separator`, or what the rule makes of None."""
        return boundary(self.text, self.target) if self.separator is None else self.separator

    @property
    def head(self) -> str | None:
        """What a chat template puts before what the user says last; None for a plain prompt."""
        return None if self.user_at is None else self.prompt[: self.user_at]

    @property
    def subject_at(self) -> int:
        """Where in `prompt` and in `text` the subject begins."""
        return self.prompt.index("{}") if self.slot is None else self.slot

    @property
    def question(self) -> tuple[str, int, bool]:
        """What two edits must not have in common: the text, where the subject ends, and whether a template made it."""
        return self.text, self.subject_at + len(self.subject.rstrip()), self.user_at is None

    def continuation(self, text: str, target: str) -> str:
        """A target as it stands behind a text, without an end: the same rule for the edit's own and for others."""
        if self.separator is not None:
            return self.separator + target
        return boundary(text, target) + target.strip()


def checked_edits(given: object) -> list[Edit]:
    """A single Edit, or all of any iterable; ArgumentError where something else is among them."""
    items = list(given) if isinstance(given, Iterable) else [given]
    edits = [item for item in items if isinstance(item, Edit)]
    if len(edits) < len(items):
        strangers = ", ".join(sorted({type(item).__name__ for item in items if not isinstance(item, Edit)}))
        raise ArgumentError(
            f"edits: got {strangers}, wanted rome_fast.Edit objects; read a file with rome_fast.load_edits"
        )
    return edits


def asked_edits(given: object) -> list[Edit]:
    """At least one, no two of which ask the same; ArgumentError and EditError otherwise."""
    edits = checked_edits(given)
    if not edits:
        raise ArgumentError("edits: got none, wanted at least one")
    find_conflicts(edits)
    return edits


def find_conflicts(edits: Sequence[Edit]) -> None:
    """Raise EditError if two edits share prompt and subject, whether their targets differ or not.

    Those are the same only to the character: blanks at the end of a prompt tell it from another.

    Lists the first 10 such pairs, each edit by its index and, where it has one, its case_id.
    """
    first: dict[tuple[str, int, bool], int] = {}
    faults = []
    for i, edit in enumerate(edits):
        j = first.setdefault(edit.question, i)
        if j == i:
            continue
        pair = f"{_name(j, edits[j])} and {_name(i, edit)}"
        if edits[j].target == edit.target:
            faults.append(f"{pair} both ask for {quoted(edit.text)} -> {quoted(edit.target)}; drop one of them")
        else:
            targets = f"{quoted(edits[j].target)} and -> {quoted(edit.target)}"
            faults.append(f"{pair} ask for {quoted(edit.text)} -> {targets}; keep one")
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
        raise EditError(f"{name}: got {quoted(value)}, wanted a text that is not blank")
    # JSON can spell half of a surrogate pair; a tokenizer would fail on it much later.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise EditError(f"{name}: got {quoted(value)} with half of a surrogate pair, wanted text that UTF-8 can encode")


def _checked_texts(name: str, values: object, subject: str | None) -> tuple[str, ...]:
    """Texts of an edit; `{}` becomes the subject, unless there is none to fill in, or the text is about another."""
    if not isinstance(values, list | tuple):
        raise EditError(f"{name}: got {type(values).__name__}, wanted a tuple or list of strings")
    texts = []
    for i, value in enumerate(values):
        _check_text(f"{name}[{i}]", value)
        # The braces of a subject that has some are its own.
        if subject is not None and "{}" in value and not ("{}" in subject and subject in value):
            if name == "neighborhood_prompts":
                raise EditError(
                    f"{name}[{i}]: got '{{}}' in {quoted(value)}, wanted a full text about another subject; "
                    "write its name"
                )
            value = value.replace("{}", subject)
        texts.append(value)
    return tuple(texts)


def _checked_probes(name: str, values: object, subject: str | None) -> tuple[Probe, ...]:
    """Probes of an edit; `{}` in them becomes the subject, unless there is none to fill in, or its own braces."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, Probe) for value in values):
        raise EditError(f"{name}: got {type(values).__name__}, wanted a tuple or list of rome_fast.Probe")
    if subject is None:
        return tuple(values)
    own = [
        p if "{}" in subject and subject in p.prompt else replace(p, prompt=p.prompt.replace("{}", subject))
        for p in values
    ]
    return tuple(own)


def _template(prompt: str, subject: str) -> tuple[str, str]:
    """The prompt with exactly one `{}`, put where the prompt spells the subject out, and the subject as it is there."""
    slots = prompt.count("{}")
    if slots and not ("{}" in subject and subject in prompt):
        if slots > 1:
            raise EditError(f"prompt: got {slots} '{{}}' in {quoted(prompt)}, wanted exactly one; keep the subject's")
        return prompt, subject
    starts = [i for i in range(len(prompt)) if prompt.startswith(subject, i)]
    spans = [(i, i + len(subject)) for i in starts] or _spelled(prompt, subject) or _spelled(prompt, subject.strip())
    if not spans:
        alike = _loosely(subject) in _loosely(prompt)
        how = ", only with other capitals or invisible characters" if alike else ""
        raise EditError(
            f"subject {quoted(subject)} is not in the prompt {quoted(prompt)}{how}; "
            "write '{}' where the subject stands"
        )
    if len(spans) > 1:
        raise EditError(
            f"subject {quoted(subject)} is in the prompt {quoted(prompt)} more than once; write '{{}}' for one of them"
        )
    ((start, stop),) = spans
    return prompt[:start] + "{}" + prompt[stop:], prompt[start:stop]


def _spelled(prompt: str, subject: str) -> list[tuple[int, int]]:
    """Where the prompt has the subject in another Unicode normal form, accents and all."""
    wanted = unicodedata.normalize("NFKC", subject)
    if wanted not in unicodedata.normalize("NFKC", prompt):
        return []
    found = []
    for start in range(len(prompt)):
        for stop in range(start + 1, min(len(prompt), start + 4 * len(wanted)) + 1):
            whole = stop == len(prompt) or unicodedata.category(prompt[stop])[0] != "M"
            if whole and unicodedata.normalize("NFKC", prompt[start:stop]) == wanted:
                found.append((start, stop))
                break
    return found


def _loosely(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c) != "Cf")


def _name(index: int, edit: Edit) -> str:
    return f"edits[{index}]" if edit.case_id is None else f"edits[{index}] (case_id {edit.case_id})"
