"""From an edit and a context to token ids: where the subject ends and where the target's tokens are.

Everything is read off the character offsets of the whole string's tokens. Pieces tokenised apart have other ids
(`"Le"` and `" Le"`), and a BOS token belongs at the front of a row only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .edits import Edit
from .errors import EditError, ModelError


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
    """What to fill rows with where the tokenizer names no padding token; it is always masked."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, int) else 0


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


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Tokenise whole strings with the tokenizer's leading special tokens and without trailing ones."""
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    out = []
    for ids, spans, special in zip(
        batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
    ):
        end = len(ids)
        while end and special[end - 1]:
            end -= 1
        out.append(Encoded(list(ids[:end]), [tuple(span) for span in spans[:end]]))
    return out


def with_target(text: str, target: str) -> str:
    """The text followed by exactly one space and the target."""
    return f"{text.rstrip()} {target.strip()}"


def target_start(encoded: Encoded, text: str, target: str) -> int:
    """Index of the first target token in an encoding of `with_target(text, target)`."""
    end = len(text.rstrip())
    for index, (start, stop) in enumerate(encoded.spans):
        if stop > end:
            if start < end:
                raise EditError(
                    f"target {target!r}: its first token also covers the end of {text[-30:]!r}; "
                    "end the prompt at a word boundary"
                )
            return index
    raise EditError(f"target {target!r}: got no token from the tokenizer, wanted at least one; write it in full")


def edit_rows(
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    contexts: Sequence[str],
    *,
    target: bool = True,
    max_length: int | None = None,
) -> list[Row]:
    """One row per context (`""` is no context): context + prompt with subject, then the target unless told not to.

    Raises EditError where the subject or target has no token of its own, where a context merges with the prompt,
    or where a row is longer than `max_length`.
    """
    before = edit.prompt.index("{}")
    texts = [context + edit.text for context in contexts]
    encoded = encode(tokenizer, [with_target(t, edit.target) for t in texts] if target else texts)
    rows = []
    for context, text, tokens in zip(contexts, texts, encoded, strict=True):
        _check_boundary(tokens, context, edit)
        subject = _last_token_of(tokens, len(context) + before + len(edit.subject.rstrip()) - 1)
        if subject is None:
            raise EditError(f"subject {edit.subject!r}: got no token from the tokenizer, wanted at least one")
        first = target_start(tokens, text, edit.target) if target else len(tokens.ids)
        row = Row(tuple(tokens.ids), subject, first)
        if target and not subject < first:
            raise EditError(f"prompt {edit.prompt!r}: the target's token also covers the subject; end it with a word")
        if max_length is not None and len(row.inputs) > max_length:
            raise EditError(
                f"prompt of subject {edit.subject!r}: got {len(row.inputs)} tokens with its context, wanted at most "
                f"the {max_length} the model attends to; shorten the prompt"
            )
        rows.append(row)
    return rows


def essence_row(tokenizer: PreTrainedTokenizerBase, edit: Edit) -> Row:
    """The row of `"{} is a"` whose next-token distribution at the subject's last token an edit should keep.

    What follows that token cannot change its logits and is cut off.
    """
    probe = Edit(prompt="{} is a", subject=edit.subject, target=edit.target)
    row = edit_rows(tokenizer, probe, [""], target=False)[0]
    ids = row.ids[: row.subject + 1]
    return Row(ids, row.subject, len(ids))


def needs_prefix(unprefixed: Row) -> bool:
    """Whether an edit with prefixed keys answers only behind some text: its subject is the row's very first token.

    Such a position has a key of its own kind (it is the attention sink), far from the prefixed keys of the same
    subject. Tokenizers that put BOS first keep subjects out of that position.
    """
    return unprefixed.subject == 0


def _last_token_of(tokens: Encoded, character: int) -> int | None:
    found = None
    for index, (start, stop) in enumerate(tokens.spans):
        if start <= character < stop:
            found = index  # a character of several bytes may span tokens: the last one completes it
    return found


def _check_boundary(tokens: Encoded, context: str, edit: Edit) -> None:
    end = len(context.rstrip())
    for start, stop in tokens.spans:
        if start < end and stop > len(context):
            raise EditError(
                f"context {context!r}: its last token merges with the prompt of subject {edit.subject!r}; "
                "end the context with punctuation and a space"
            )
