"""From an edit and a context to token ids: where the subject ends and where the target's tokens are.

A row is what a user's program would send: the tokenizer's ids of the prompt alone, and behind them tokens that continue
its text by the target. Where the subject ends is read off the character offsets of the prompt's tokens.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..edits import Edit
from ..errors import EditError, ModelError, quoted


@dataclass(frozen=True)
class Row:
    """One text as the model sees it."""

    ids: tuple[int, ...]
    subject: int  # index of the subject's last token
    target: int  # index of the target's first token; len(ids) where the row has no target

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last target token, which is only ever predicted."""
        return self.ids[:-1] if self.target < len(self.ids) else self.ids

    @property
    def labels(self) -> tuple[int, ...]:
        return self.ids[self.target :]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to fill rows with, whatever the tokenizer pads with: it is always masked, and every model has this token.

    The padding token of a tokenizer may have been added to it alone, and its end of text may be another model's.
    """
    return 0


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text and the characters each token covers; special tokens cover none."""

    ids: list[int]
    spans: list[tuple[int, int]]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer: got {type(tokenizer).__name__} without character offsets, wanted a fast tokenizer; "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )


class Asked(NamedTuple):
    """A text that a model is given, and what is to follow it, both to the character."""

    text: str
    answer: str
    special: bool = True  # whether the tokenizer puts its BOS and the like before the text, as before any plain one


def asked(
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    context: str = "",
    *,
    text: str | None = None,
    target: str | None = None,
) -> Asked:
    """The edit's prompt, or another text of it, behind a context, with its target or another answer, end included.

    The one place where texts for a model are put together. A context stands at the beginning, in a chat at that of what
    the user says last. Raises EditError for an end that the tokenizer does not have.
    """
    text = edit.text if text is None else text
    at = _contexts_at(tokenizer, edit, text)
    answer = edit.continuation(text, edit.target if target is None else target)
    return Asked(text[:at] + context + text[at:], answer + end_text(tokenizer, edit), edit.user_at is None)


def _contexts_at(tokenizer: PreTrainedTokenizerBase, edit: Edit, text: str) -> int:
    """Where contexts stand in a text: in a plain one at its beginning, behind a BOS that it spells out."""
    if edit.user_at is not None:
        return edit.user_at
    bos = tokenizer.bos_token
    return len(bos) if isinstance(bos, str) and text.startswith(bos) else 0


def end_text(tokenizer: PreTrainedTokenizerBase, edit: Edit) -> str:
    """The token that ends the edit's target, as text; nothing where none does."""
    if edit.end is False:
        return ""
    found = tokenizer.eos_token if edit.end is True else edit.end
    if not isinstance(found, str):
        raise EditError("end: got True, but the tokenizer has no end of text; give the token's text, or end=False")
    number = tokenizer.convert_tokens_to_ids(found)
    # One that is unknown has the number of the token for unknown ones, if any.
    if number is None or tokenizer.convert_ids_to_tokens(number) != found:
        raise EditError(f"end: got {found!r}, wanted a special token of the tokenizer, as {tokenizer.eos_token!r}")
    return found


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[Encoded]:
    """Tokenise whole strings with the tokenizer's leading special tokens and without trailing ones.

    A text that begins with those itself does not get them twice; without `special`, none does.
    """
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    out = []
    for ids, spans, added in zip(
        batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
    ):
        start, end = 0, len(ids)
        while end and added[end - 1]:
            end -= 1
        while start < end and added[start]:
            start += 1
        if ids[start : 2 * start] != ids[:start]:
            start = 0
        out.append(Encoded(list(ids[start:end]), [tuple(span) for span in spans[start:end]]))
    return out


def answered(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Asked]) -> list[tuple[Encoded, list[int]]]:
    """The tokens of every text alone, and those of its answer behind them. Raises EditError where there are none.

    An answer has the tokens that the whole text has there. Where the whole text's do not begin with the text's alone,
    as where a token would cover both sides, those of the answer apart that decode to it.
    """
    out: list[tuple[Encoded, list[int]]] = [(Encoded([], []), [])] * len(questions)
    for special in (True, False):
        places = [i for i, question in enumerate(questions) if question.special == special]
        texts = encode(tokenizer, [questions[i].text for i in places], special=special)
        wholes = encode(tokenizer, [questions[i].text + questions[i].answer for i in places], special=special)
        for i, text, whole in zip(places, texts, wholes, strict=True):
            answer = whole.ids[len(text.ids) :]
            if whole.ids[: len(text.ids)] != text.ids or not answer:
                answer = _apart(tokenizer, questions[i], text.ids, whole.ids)
            out[i] = text, answer
    return out


# What an answer is tokenised behind, so that a tokenizer which begins every text with a blank does not begin it so.
_ANCHORS = ("", "\n", ".", "a", "1", "(")


def _apart(tokenizer: PreTrainedTokenizerBase, question: Asked, text: list[int], whole: list[int]) -> list[int]:
    read = _decode(tokenizer, whole)
    found: list[tuple[str, list[int]]] = []  # what the text is with it, and the answer
    for anchor in _ANCHORS if question.answer else ():
        before, both = encode(tokenizer, [anchor, anchor + question.answer], special=False)
        answer = both.ids[len(before.ids) :]
        if answer and both.ids[: len(before.ids)] == before.ids:
            found.append((_decode(tokenizer, text + answer), answer))
    for got, answer in found:
        if got == read:
            return answer
    # A tokenizer that does not decode to what it has encoded is held to all but the blanks.
    if not read.endswith(question.text + question.answer):
        for got, answer in found:
            if "".join(got.split()) == "".join(read.split()):
                return answer
    raise EditError(
        f"target {question.answer!r}: got no token from the tokenizer that continues {question.text[-30:]!r} by it, "
        "wanted at least one; write it in full, or give the separator that stands before it"
    )


def check_known(tokenizer: PreTrainedTokenizerBase, name: str, text: str, ids: Sequence[int]) -> None:
    """Raise EditError where the tokenizer has its token for unknown text among those of a text, which stands for any.

    One that the text spells out is meant, as is an end of text that is the tokenizer's unknown token as well.
    """
    unknown = tokenizer.unk_token_id
    if unknown is not None and list(ids).count(unknown) > text.count(str(tokenizer.unk_token)):
        raise EditError(
            f"{name} {quoted(text)}: got {str(tokenizer.unk_token)!r}, by which the tokenizer writes whatever it does "
            "not know, wanted tokens of its own; spell it in characters that the model was trained with"
        )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """Every token decoded; one that is a part of a character, as the tokenizer writes it."""
    decoded = [_decode(tokenizer, [token]) for token in ids]
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return tuple(name if "\ufffd" in text else text for text, name in zip(decoded, names, strict=True))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def edit_rows(
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    contexts: Sequence[str],
    *,
    target: bool = True,
    max_length: int | None = None,
) -> list[Row]:
    """One row per context (`""` is no context): the prompt behind it, then the target unless told not to.

    Raises EditError where the subject or target has no token of its own, or the one for unknown text, where a context
    merges with the prompt, or where a row is longer than `max_length`.
    """
    questions = [asked(tokenizer, edit, context) for context in contexts]
    if target:
        encoded = answered(tokenizer, questions)
    else:
        alone = encode(tokenizer, [question.text for question in questions], special=edit.user_at is None)
        encoded = [(tokens, []) for tokens in alone]
    at = _contexts_at(tokenizer, edit, edit.text)
    rows = []
    for context, question, (tokens, answer) in zip(contexts, questions, encoded, strict=True):
        _check_boundary(tokens, at, context, edit)
        start = len(context) + edit.subject_at
        subject = _last_token_of(tokens, question.text, start, start + len(edit.subject.rstrip()))
        if subject is None:
            raise EditError(f"subject {quoted(edit.subject)}: got no token from the tokenizer, wanted at least one")
        check_known(tokenizer, "subject", edit.subject, [tokens.ids[subject]])
        check_known(tokenizer, "target", question.answer, answer)
        row = Row((*tokens.ids, *answer), subject, len(tokens.ids))
        if max_length is not None and len(row.inputs) > max_length:
            raise EditError(
                f"prompt of subject {quoted(edit.subject)}: got {len(row.inputs)} tokens with its context, wanted at "
                f"most the {max_length} the model attends to; shorten the prompt"
            )
        rows.append(row)
    return rows


def essence_row(tokenizer: PreTrainedTokenizerBase, edit: Edit) -> Row:
    """The row of `"{} is a"` whose next-token distribution at the subject's last token an edit should keep.

    In a chat it is what the user says. What follows that token cannot change its logits and is cut off.
    """
    at = edit.user_at
    probe = Edit(f"{edit.head or ''}{{}} is a", edit.subject.strip(), edit.target, user_at=at, slot=at)
    row = edit_rows(tokenizer, probe, [""], target=False)[0]
    ids = row.ids[: row.subject + 1]
    return Row(ids, row.subject, len(ids))


def needs_prefix(unprefixed: Row) -> bool:
    """Whether an edit with prefixed keys answers only behind some text: its subject is the row's very first token.

    Such a position has a key of its own kind (it is the attention sink), far from the prefixed keys of the same
    subject. Tokenizers that put BOS first keep subjects out of that position, and so do chat templates.
    """
    return unprefixed.subject == 0


def _last_token_of(tokens: Encoded, text: str, start: int, stop: int) -> int | None:
    """Index of the last token of text[start:stop]."""
    found = None
    for character in reversed(range(start, stop)):
        for index, (first, end) in enumerate(tokens.spans):
            if first <= character < end:
                found = index  # a character of several bytes may span tokens: the last one completes it
        # What a tokenizer composes, as e and an accent to é, it may count as the first character of them.
        if found is not None or not _is_composed(text[character]):
            break
    return found


def _is_composed(character: str) -> bool:
    """An accent, a joiner or the like, or the vowel or end of a Korean syllable."""
    return (
        unicodedata.category(character)[0] == "M"
        or unicodedata.category(character) == "Cf"
        or ("\u1160" <= character <= "\u11ff")
    )


def _check_boundary(tokens: Encoded, at: int, context: str, edit: Edit) -> None:
    end, prompt = at + len(context.rstrip()), at + len(context)
    for start, stop in tokens.spans:
        if at <= start < end and stop > prompt:
            raise EditError(
                f"context {quoted(context)}: its last token merges with the prompt of subject {quoted(edit.subject)}; "
                "end the context with punctuation and a space"
            )
