"""An edit run for its report: the model asked before and after, kept as JSON, and read back."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..edits import Edit
from ..errors import ArgumentError, CheckpointError
from ..evaluation import EditMetrics, evaluate
from ..opening.checkpoints import versions
from ..records import Record
from ..result import EditResult
from .reading import is_number, read_lines, read_object

CONDITIONS_FILE, RECORDS_FILE = "conditions.json", "records.jsonl"

_KIND = "edit run"
_REMEDY = "give a folder that rome-fast edit --report wrote, or make the edit again"
_TOGETHER = 64  # edits asked at a time
_NLL = ("before", "after", "origin", "since_origin")


@dataclass(kw_only=True)
class AskedRecord(Record):
    """A record, and what the model says when it goes on by itself, always with the most probable token."""

    probability_before_prefixed: float | None = None  # mean over the editing contexts
    answer_before: str | None = None  # behind the bare prompt, until it stops by itself or at a bound
    answer_after: str | None = None
    answer_right: bool | None = None  # whether it then stops, having said the target or an alias and nothing else


@dataclass(frozen=True)
class EditRun:
    """What a report is made of."""

    conditions: dict[str, Any]  # `EditResult.report()` without its edits, and what the caller says of the run
    records: list[AskedRecord]  # none of a run that ended in an error, which is among the conditions

    def files(self) -> dict[str, bytes]:
        """The run as files of JSON, by name."""
        lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self.records)
        texts = {
            CONDITIONS_FILE: json.dumps(self.conditions, indent=2, ensure_ascii=False) + "\n",
            RECORDS_FILE: lines,
        }
        # Halves of surrogate pairs become JSON's own escapes.
        return {name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}


def asked_run(
    result: EditResult,
    edits: Sequence[Edit],
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EditRun:
    """An edit whose model is asked what it says, with the edit and without; it has the edit in the end as before.

    A model that was read in parts is not there to be asked, and one of a run that left probabilities out is not asked;
    the conditions say so under "unasked". `about` is kept among the conditions. `progress` is called with (questions
    done, questions in all).

    Raises ArgumentError for other edits than the result's, or weights that have changed since.
    """
    if [(e.prompt, e.subject, e.target) for e in edits] != [(r.prompt, r.subject, r.target) for r in result.records]:
        raise ArgumentError("edits: got others than those of the result, wanted the same ones in their order")
    records = [AskedRecord(**record.to_json()) for record in result.records]
    unasked = _unasked(result)
    if unasked is None:
        bare = [_question(edit) for edit in edits]
        total = 2 * len(edits)
        after = _asked(result, bare, (), progress, 0, total)
        result.revert()
        try:
            before = _asked(result, bare, result.contexts, progress, len(edits), total)
        finally:
            if result.delta.updates:
                result.delta.apply(result.model)
        for record, then, now in zip(records, before, after, strict=True):
            record.probability_before_prefixed = then.probability_prefixed
            record.answer_before, record.answer_after = then.answer, now.answer
            record.answer_right = now.answer_right
    report = result.report()
    report.pop("edits")
    made = {"kind": _KIND, "date": datetime.now(UTC).date().isoformat(), "versions": versions(), "unasked": unasked}
    return EditRun({**made, **report, **(about or {})}, records)


def failed_run(error: Exception, edits: Sequence[Edit], about: Mapping[str, Any] | None = None) -> EditRun:
    """A run that ended in an error and wrote nothing; `about` is kept among the conditions."""
    failure = {"kind": type(error).__name__, "message": str(error), "requests": [[e.text, e.target] for e in edits]}
    made = {"kind": _KIND, "date": datetime.now(UTC).date().isoformat(), "versions": versions(), "seconds": {}}
    return EditRun({**made, **(about or {}), "failure": failure}, [])


def read_run(directory: Path) -> EditRun:
    """Read what `EditRun.files` says was written; CheckpointError for what is missing, damaged or of another kind."""
    if not directory.is_dir():
        raise CheckpointError(f"directory: {directory} is not a directory; {_REMEDY}")
    file = directory / CONDITIONS_FILE
    conditions = read_object(file, _REMEDY)
    if conditions is None:
        raise CheckpointError(f"{directory}: {CONDITIONS_FILE} is missing, so this is no report's folder; {_REMEDY}")
    if conditions.get("kind") != _KIND:
        raise CheckpointError(f'{file}: got {conditions.get("kind")!r} as "kind", wanted {_KIND!r}; {_REMEDY}')
    seconds, nll = conditions.get("seconds"), conditions.get("context_nll")
    if not isinstance(seconds, dict) or not all(map(is_number, seconds.values())):
        raise CheckpointError(f'{file}: got {seconds!r} as "seconds", wanted numbers by stage; {_REMEDY}')
    if nll is not None and not (isinstance(nll, dict) and all(is_number(nll.get(name)) for name in _NLL)):
        raise CheckpointError(f'{file}: got {nll!r} as "context_nll", wanted {", ".join(_NLL)}; {_REMEDY}')
    records = read_lines(directory / RECORDS_FILE, AskedRecord, _REMEDY)
    if "failure" in conditions:
        failure = conditions["failure"]
        texts = isinstance(failure, dict) and all(isinstance(failure.get(name), str) for name in ("kind", "message"))
        if not texts or not _are_pairs(failure.get("requests")):
            raise CheckpointError(f'{file}: got {failure!r} as "failure", wanted what went wrong; {_REMEDY}')
        return EditRun(conditions, [])
    if not records:
        raise CheckpointError(f"{directory}: {RECORDS_FILE} is missing or empty; {_REMEDY}")
    for number, record in enumerate(records, 1):
        where = f"{directory / RECORDS_FILE}, record {number}"
        if record.nearest is not None and not 0 <= record.nearest < len(records):
            raise CheckpointError(f"{where}: got {record.nearest} as nearest of {len(records)} edits; {_REMEDY}")
        if record.update_ratios and len(record.update_ratios) != len(record.layers):
            raise CheckpointError(
                f"{where}: got {len(record.update_ratios)} update ratios of {len(record.layers)} layers; {_REMEDY}"
            )
    return EditRun(conditions, records)


def _are_pairs(value: object) -> bool:
    """Whether a value is a list of pairs of texts."""
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs)


def _unasked(result: EditResult) -> str | None:
    if result.records[0].probability_after is None:
        return "not measured"
    return "read in parts" if any(p.is_meta for p in result.model.parameters()) else None


def _question(edit: Edit) -> Edit:
    """The edit without what else could be asked about it."""
    nothing: dict[str, Any] = {"target_true": None, "neighborhood_answer": None}
    nothing |= dict.fromkeys(("paraphrase_prompts", "neighborhood_prompts", "portability", "neighbors"), ())
    return replace(edit, essence_prompts=(), negation_prompts=(), **nothing)


def _asked(
    result: EditResult,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    progress: Callable[[int, int], None] | None,
    done: int,
    total: int,
) -> list[EditMetrics]:
    if result.tokenizer is None:
        raise ArgumentError("result: it has no tokenizer, without which its model cannot be asked")
    # Texts of one length go on together, and those whose targets are of one length as well.
    texts = result.tokenizer([text for e in edits for text in (e.text, e.boundary + e.target)])["input_ids"]
    order = sorted(range(len(edits)), key=lambda i: (len(texts[2 * i]), len(texts[2 * i + 1])))
    found: dict[int, EditMetrics] = {}
    for start in range(0, len(edits), _TOGETHER):
        some = order[start : start + _TOGETHER]
        metrics = evaluate(result.model, result.tokenizer, [edits[i] for i in some], contexts)
        found.update(zip(some, metrics, strict=True))
        if progress is not None:
            progress(done + len(found), total)
    return [found[i] for i in range(len(edits))]
