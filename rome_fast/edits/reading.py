"""Edits files: JSON lines or one JSON array, in the shapes that data sets of requests have."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ArgumentError, EditError, quoted
from .edit import Edit, listing
from .fields import Fields
from .files import Broken, read_records
from .shapes import edits_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_NAMED = 50


class EditsFileWarning(UserWarning):
    """Something of an edits file is left out."""


class SkippedEditsWarning(EditsFileWarning):
    """Faulty records were left out."""


class DuplicateEditsWarning(EditsFileWarning):
    """Of requests for the same prompt and subject, one was kept."""


class UnreadFieldsWarning(EditsFileWarning):
    """Records have fields that are not read."""


def load_edits(
    path: str | Path,
    on_error: Literal["raise", "skip"] = "raise",
    duplicates: Literal["error", "first", "last"] | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> list[Edit]:
    """Read edits from a file of JSON lines, or of one JSON array, in the shapes of common data sets.

    The shape is told record by record, from its fields:

    - our own: `{"prompt", "subject", "target_new", "target_true"?, "paraphrase_prompts"?, "neighborhood_prompts"?,
      "neighborhood_answer"?, "neighbors"?, "portability"?, "aliases"?, "separator"?, "end"?, "case_id"?}`; `target` is
      another spelling of `target_new`; neighbours and portability are lists of `{"prompt", "answers", "kind"?}`;
    - the same with `"messages"` for `Edit.chat` in place of the prompt;
    - CounterFact, nested and flat; EasyEdit; zsRE; KnowEdit (also WikiBio); MQuAKE; RippleEdits; QAEdit.

    The page "Edits files" of the documentation lists the fields of each. A target or an answer may be a list of
    spellings, the first of which is the target. Optional fields that are null, blank or empty count as absent.

    on_error: what a faulty record does: "raise" an EditError, or "skip" it with a SkippedEditsWarning.
    duplicates: what requests for the same prompt and subject do: "error" raises; "first" keeps the first and "last" the
        last of them, where the first stood, with a DuplicateEditsWarning. None leaves them in, for `apply_edits` to
        refuse.
    tokenizer: has the template that records with messages are put through; the others do without.

    Fields that are not read are named in one UnreadFieldsWarning. Raises EditError for a missing, unreadable or empty
    file, one without a usable record, and one that lists the first 10 faults by line (by position in an array);
    ArgumentError for another `on_error` or `duplicates`.
    """
    if on_error not in ("raise", "skip"):
        raise ArgumentError(f"on_error: got {on_error!r}, wanted 'raise' or 'skip'")
    if duplicates not in ("error", "first", "last", None):
        raise ArgumentError(f"duplicates: got {duplicates!r}, wanted 'error', 'first', 'last' or None")
    path = Path(path)
    records, around = read_records(path)
    edits: list[tuple[str, Edit]] = []
    faults: list[str] = []
    unread = Counter(around)
    for place, record in records:
        try:
            found, left = _read(record, tokenizer)
        except EditError as error:
            faults.append(f"{place}: {error}")
            continue
        edits += [(place, edit) for edit in found]
        unread.update(left)
    if faults and (on_error == "raise" or not edits):
        raise EditError(listing(faults))
    if faults:
        left_out = f"{len(faults)} of {len(records)} records are left out"
        _warn(SkippedEditsWarning, f"{path.name}: {left_out}:\n{listing(faults)}")
    if unread:
        _warn(UnreadFieldsWarning, f"{path.name}: fields that are not read: {_enumerated(unread)}")
    return _without_duplicates(path.name, edits, duplicates)


def _read(record: object, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[list[Edit], list[str]]:
    """The edits of a record, and the names of its fields that were not read, once each."""
    if isinstance(record, Broken):
        raise EditError(record.fault)
    if not isinstance(record, dict):
        raise EditError(f"got {type(record).__name__}, wanted a JSON object")
    fields = Fields(record)
    edits = edits_from(fields, tokenizer)
    return edits, list(dict.fromkeys(fields.unread()))


def _without_duplicates(name: str, edits: Sequence[tuple[str, Edit]], keep: str | None) -> list[Edit]:
    if keep is None:
        return [edit for _, edit in edits]
    kept: dict[tuple[str, int, bool], tuple[str, Edit]] = {}
    doubled = []
    for place, edit in edits:
        key = edit.question
        if key not in kept:
            kept[key] = place, edit
            continue
        first, other = kept[key]
        same = "both" if other.target == edit.target else f"{quoted(other.target)} and"
        doubled.append(f"{first} and {place} ask for {quoted(edit.text)} -> {same} {quoted(edit.target)}")
        if keep == "last":
            kept[key] = place, edit
    if doubled and keep == "error":
        raise EditError(f"{listing(doubled)}\nkeep one of each, or say duplicates='first' or 'last'")
    if doubled:
        what = _counted(len(doubled), "request")
        why = f"the {keep} of those that ask the same is kept"
        _warn(DuplicateEditsWarning, f"{name}: {what} left out, {why}:\n{listing(doubled)}")
    return [edit for _, edit in kept.values()]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _enumerated(names: Counter[str]) -> str:
    items = [f"{name} ({_counted(count, 'record')})" for name, count in names.most_common(_MOST_NAMED)]
    more = len(names) - len(items)
    return ", ".join(items) + (f" and {more} more" if more else "")


def _warn(kind: type[EditsFileWarning], what: str) -> None:
    warnings.warn(what, kind, stacklevel=3)
