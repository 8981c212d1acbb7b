"""Requests: edits as rows of tokens, as a method wants them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ..edits import Edit
from ..methods import Method
from ..models.rows import edit_rows, encode, essence_row, needs_prefix, token_texts
from ..models.runner import Runner
from .keys import ContextRow
from .objective import scored_rows

_MOST_HEADS = 4  # of chats, that have contexts of their own in a group


@dataclass(frozen=True)
class Request:
    """One edit, tokenised."""

    edit: Edit
    # The unprefixed one first where the method uses it. Last the essence row, which has no target, unless the
    # unprefixed one begins with it: what a model says at the end of the subject does not depend on what follows.
    rows: list[ContextRow]
    needs_prefix: bool  # the subject's last token is at position 0
    middle: int  # positions of its own before the subject's last token: those of the row without a context and head
    target_tokens: tuple[str, ...]  # each as text
    head: int = 0  # positions of what a chat template puts before a context
    starts_bare: bool = True  # whether the unprefixed row is among them
    # The row without a context as a request of its own, where the method gives it a key and a value of its own.
    bare: "Request | None" = None
    # Those that are to have one value, where this is all of them: its rows with a target are theirs, in their order.
    parts: "tuple[Request, ...]" = ()

    @property
    def scored(self) -> int:
        """How many of the rows have a target, and with it a part in k̄."""
        return scored_rows([r.row for r in self.rows])

    @property
    def suffix(self) -> int:
        """Positions from the subject's last token on, the same in every row but for odd tokenisations."""
        return max(len(r.row.inputs) - r.row.subject for r in self.rows)

    @property
    def before(self) -> int:
        """Positions before the subject's last token, in the longest row."""
        return max(r.row.subject for r in self.rows)


def tokenise(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, edit: Edit, contexts: Sequence[str], how: Method
) -> Request:
    """The rows a method needs for an edit; raises EditError for one that cannot be tokenised as it must."""
    unprefixed, *prefixed = edit_rows(tokenizer, edit, ["", *contexts], max_length=runner.max_length)
    # Context 0 is the empty one.
    rows = [ContextRow(row, i) for i, row in enumerate([unprefixed, *prefixed])]
    alone = needs_prefix(unprefixed)
    if how.rows == "prefixed" and alone:
        rows = rows[1:]
    essence = ContextRow(essence_row(tokenizer, edit), 0)

    def with_essence(rows: list[ContextRow]) -> list[ContextRow]:
        begins = rows[0].row.ids[: rows[0].row.subject + 1]
        return rows if begins == essence.row.ids else [*rows, essence]

    head = 0 if edit.head is None else len(encode(tokenizer, [edit.head], special=False)[0].ids)
    head = min(head, unprefixed.subject)
    tokens = token_texts(tokenizer, unprefixed.labels)
    starts_bare = not (how.rows == "prefixed" and alone)
    request = Request(edit, with_essence(rows), alone, unprefixed.subject - head, tokens, head, starts_bare)
    if how.bare and alone:
        bare = replace(request, rows=with_essence([ContextRow(unprefixed, 0)]), starts_bare=True)
        request = replace(request, bare=bare)
    return request


MOST_MERGED = 8
"""Requests that are given one value at most: their rows are run together."""


def by_subject(edits: Sequence[Edit]) -> list[list[int]]:
    """Places of the edits of each subject, of chats behind what else is said in them."""
    places: dict[tuple[str, str | None], list[int]] = {}
    for i, edit in enumerate(edits):
        places.setdefault((edit.subject.strip(), edit.head), []).append(i)
    return list(places.values())


def merged_by_subject(group: Sequence[Request], fits: Callable[[Request], bool]) -> list[list[int]]:
    """Places of the requests that are to have one value, see `Method.merges`: as many of one subject as fit."""
    found: list[list[int]] = []
    for own in by_subject([request.edit for request in group]):
        # An essence is that of a first row which begins with it, or else a row behind all others.
        own.sort(key=lambda i: len(group[i].rows) > group[i].scored)
        most = min(len(own), MOST_MERGED)
        while most > 1 and not fits(as_one([group[i] for i in own[:most]])):
            most //= 2
        found += [own[start : start + most] for start in range(0, len(own), most)]
    return found


def as_one(requests: Sequence[Request]) -> Request:
    """One that has the rows with a target of all of them, at least one, and an essence of the first."""
    first = requests[0]
    if len(requests) == 1:
        return first
    bare = bare_requests(requests)
    return replace(
        first,
        rows=[row for request in requests for row in request.rows[: request.scored]] + first.rows[first.scored :],
        middle=max(request.middle for request in requests),
        bare=as_one(bare) if bare else None,
        parts=tuple(requests),
    )


def by_head(group: Sequence[Request]) -> list[tuple[str | None, list[int]]]:
    """Places of the requests that share what their contexts stand behind, with it: None for nothing.

    Of chats, those whose template and earlier messages are the same; where there are many kinds of them, the rarest
    count as plain prompts, which share little with the contexts, but batches with each other.
    """
    heads = Counter(request.edit.head for request in group if request.edit.head is not None)
    common = {head for head, _ in heads.most_common(_MOST_HEADS)}
    places: dict[str | None, list[int]] = {}
    for i, request in enumerate(group):
        places.setdefault(request.edit.head if request.edit.head in common else None, []).append(i)
    return list(places.items())


def bare_requests(group: Sequence[Request]) -> list[Request]:
    return [request.bare for request in group if request.bare is not None]
