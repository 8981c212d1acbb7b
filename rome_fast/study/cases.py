"""The requests of a study: which, in which order, and which of them are first-token cases."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..edits import Edit
from ..errors import ArgumentError, quoted
from ..models.rows import edit_rows, encode
from ..models.runner import Runner


@dataclass(frozen=True)
class Case:
    """One request."""

    edit: Edit
    position: int  # of the subject's last token
    first_token: bool  # nothing precedes that token but what the tokenizer puts before every text
    explained: bool  # whether the parts of ROME's update are exchanged one by one


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens, such as BOS, the tokenizer puts before every text."""
    spans = encode(tokenizer, ["a"])[0].spans
    return next(index for index, (_, stop) in enumerate(spans) if stop > 0)


def cases_of(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], sample: int | None
) -> list[Case]:
    """All first-token requests, then `sample` of the others (None: all), evenly spaced over the file.

    As many of the others as there are first-token requests are explained, too. Raises ArgumentError for a request
    that stands there twice, EditError for one that cannot be tokenised.
    """
    leading = leading_tokens(tokenizer)
    seen: dict[tuple[str, str, str], int] = {}
    first: list[Case] = []
    others: list[tuple[Edit, int]] = []
    for number, edit in enumerate(edits, 1):
        key = (edit.prompt, edit.subject, edit.target)
        if key in seen:
            raise ArgumentError(
                f"edits: requests {seen[key]} and {number} are the same, {quoted(edit.text)} → {quoted(edit.target)}; "
                "leave one of them out"
            )
        seen[key] = number
        position = edit_rows(tokenizer, edit, [""], max_length=runner.max_length)[0].subject
        if position == leading:
            first.append(Case(edit, position, True, True))
        else:
            others.append((edit, position))
    if sample is not None:
        if sample < 0:
            raise ArgumentError(f"sample: got {sample}, wanted a number from 0 on")
        others = [others[i * len(others) // sample] for i in range(min(sample, len(others)))]
    return first + [Case(edit, position, False, i < len(first)) for i, (edit, position) in enumerate(others)]
