"""The report of an edit run: what was asked and what the model says now, failed edits first, in one file of HTML."""

import os
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..weights.files import atomic_write, check_writable, os_errors, partial, rename_new, write_file
from . import drawing
from .document import Block, Bullets, Folded, Heading, Markup, Table, Text, to_html
from .edit_data import AskedRecord, EditRun, read_run
from .edit_figures import figures, gallery
from .listing import SCRIPT, Column, Row, listing, style
from .outcomes import REMEDIES, outcome, verdict
from .study_tables import shown
from .tables import number

REPORT_FILE = "report.html"

_MOST_SHOWN = 400  # characters of a prompt; a chat's template can be long, and its end tells most


def write_run(directory: Path, run: EditRun) -> None:
    """Write the data and the page of a run into a new directory, which appears complete or not at all.

    Raises ArgumentError where there is something of that name, CheckpointError where it cannot be written.
    """
    check_new_report(directory)
    with os_errors(f"writing {directory}"), partial(directory.absolute()) as work:
        for name, content in {**run.files(), REPORT_FILE: page(run)}.items():
            write_file(work / name, content)
        rename_new(work, directory.absolute())


def write_report(directory: Path) -> Path:
    """Write the page of a run anew from its data alone; CheckpointError as of `read_run`, and where it cannot."""
    content = page(read_run(directory))
    atomic_write(directory.absolute() / REPORT_FILE, content)
    return directory / REPORT_FILE


def check_new_report(directory: Path, *others: tuple[str, Path | None]) -> None:
    """Raise ArgumentError or CheckpointError for a folder that could not be made later, or inside of `others`."""
    if os.path.lexists(directory):
        raise ArgumentError(f"report: {directory} exists already; choose a new name or remove it")
    for name, other in others:
        if other is not None and other.resolve() in (directory.resolve(), *directory.resolve().parents):
            raise ArgumentError(f"report: {directory} lies in {other}, which is {name}; choose another place")
    if not directory.absolute().parent.is_dir():
        raise ArgumentError(f"report: the folder {directory.absolute().parent} does not exist; make it first")
    check_writable(directory.absolute())


def page(run: EditRun) -> bytes:
    """The page, in UTF-8. The same run gives the same bytes."""
    title = f"Edits of {run.conditions.get('model') or 'a model in memory'}"
    if "failure" in run.conditions:
        return to_html(f"{title}: nothing was written", _failure(run.conditions)).encode("utf-8")
    blocks = [
        *_summary(run),
        Heading("What needs attention"),
        *_attention(run.records),
        Heading("Figures"),
        *_figures(run),
        Heading("All edits"),
        *_all_edits(run),
        Heading("Conditions"),
        *_conditions(run.conditions),
    ]
    css = f"{_STYLE}{drawing.STYLE}{style(_columns(run))}"
    return to_html(title, blocks, style=css, script=SCRIPT).encode("utf-8")


def _failure(conditions: dict[str, Any]) -> list[Block]:
    """What became of a run that wrote nothing."""
    failure = conditions["failure"]
    what, *rest = failure["message"].splitlines() or [""]
    requests = [[_shortened(text), target] for text, target in failure["requests"]]
    return [
        Text(f"The run ended in an error ({failure['kind']}), and the model is as it was before: none was edited."),
        Heading("What went wrong"),
        Text(what),
        *([Bullets([line.strip() for line in rest])] if rest else []),
        Heading("What was asked for"),
        Table(["request", "target"], requests, texts=2),
        Heading("Conditions"),
        *_conditions(conditions),
    ]


def _summary(run: EditRun) -> list[Block]:
    records = run.records
    made = sum(r.applied for r in records)
    parts = [f"{len(records)} edits were asked for; {made} were made and {len(records) - made} left out."]
    asked = [r for r in records if r.argmax_after is not None]
    if asked:
        bare = sum(bool(r.argmax_after) for r in asked)
        behind = sum((r.argmax_after_prefixed or 0) >= 0.5 for r in asked)
        parts.append(
            f"Of all of them, {bare} are what the model now says behind the bare prompt, and {behind} behind at least "
            "half of the contexts that the edits were made with."
        )
    else:
        parts.append("The model was not asked for any of them.")
    reason = _UNASKED.get(str(run.conditions.get("unasked")))
    return [Text(" ".join(parts)), *([Text(reason)] if reason else [])]


def _attention(records: list[AskedRecord]) -> list[Block]:
    items = []
    for kind, remedy in REMEDIES.items():
        count = sum(outcome(r) == kind for r in records)
        if count and remedy:
            items.append(f"{count} {'edit' if count == 1 else 'edits'}, {_NAMES.get(kind, kind)}. Try: {remedy}.")
    return [Bullets(items)] if items else [Text("Nothing: every edit was made, and answers as far as it was asked.")]


def _figures(run: EditRun) -> list[Block]:
    drawn, missing = figures(run)
    left_out: list[Block] = [Text("Left out:"), Bullets(missing)] if missing else []
    return [Markup(gallery(drawn)), *left_out]


def _all_edits(run: EditRun) -> list[Block]:
    severity = list(REMEDIES)
    places = sorted(range(len(run.records)), key=lambda i: severity.index(outcome(run.records[i])))
    rows = [_row(run, i) for i in places]
    words = (
        "What failed or was left out comes first. Behind: mean over the editing contexts. Off: how far a joint update "
        "stays off what the edit asks for. Answers are the most probable token each time, until the model stops by "
        "itself or at a bound; ✓ where it stops behind the target."
    )
    return [Text(words), Markup(listing(_columns(run), rows, "edits"))]


def _columns(run: EditRun) -> list[Column]:
    answers = [] if run.conditions.get("unasked") else [("said before", 14, True), ("says now", 14, True)]
    names: list[tuple[str, int, bool]] = [
        ("no.", 4, False),
        ("request → target", 24, True),
        ("outcome", 12, True),
        *answers,
        ("P bare, before", 6, False),
        ("P bare, now", 6, False),
        ("P behind, before", 6, False),
        ("P behind, now", 6, False),
        ("‖Δ‖/‖W‖", 5, False),
        ("off", 4, False),
    ]
    return [Column(*each) for each in names]


def _row(run: EditRun, place: int) -> Row:
    r = run.records[place]
    kind = outcome(r)
    mark = " ✓" if r.answer_right else ""
    answers = [((r.answer_before or "").lstrip(" "),), ((r.answer_after or "").lstrip(" ") + mark,)]
    largest = max(r.update_ratios, default=None)
    numbers = (
        r.probability_before,
        r.probability_after,
        r.probability_before_prefixed,
        r.probability_after_prefixed,
        largest,
        r.missed,
    )
    cells: list[Any] = [
        (place + 1, str(place + 1)),
        (_shortened(_request(r)), "→", r.target),
        (f"{verdict(r)}{_reason(r)}",),
        *([] if run.conditions.get("unasked") else answers),
        *((value, number(value)) for value in numbers),
    ]
    return Row(_NAMES.get(kind, kind), cells, _more(run, r), bad=bool(REMEDIES[kind]))


def _reason(record: AskedRecord) -> str:
    if record.left_out in ("did not converge", "loss not finite"):
        return f": loss {number(record.loss)} after {record.steps} steps"
    if record.collapsed:
        return f": ‖Δ‖ is {record.update_norm / record.weight_norm if record.weight_norm else 0:.2f} ‖W‖"
    return ""


def _more(run: EditRun, record: AskedRecord) -> str:
    """Whatever else there is, a line each."""
    ratios = (f"{layer}: {number(r)}" for layer, r in zip(record.layers, record.update_ratios, strict=False))
    lines = [f"loss {number(record.loss)} after {record.steps} steps, denominator {record.denominator:.4g}"]
    if record.update_ratios:
        lines.append(f"‖Δ‖/‖W‖ by layer {', '.join(ratios)}")
    if record.share_bare is not None:
        lines.append(f"share that arrives without a context {number(record.share_bare)}")
    if record.argmax_after_prefixed is not None:
        lines.append(f"said behind {record.argmax_after_prefixed:.0%} of the contexts")
    if record.nearest is not None:
        other = run.records[record.nearest]
        lines.append(
            f"nearest key: no. {record.nearest + 1}, {other.subject} → {other.target}, cosine "
            f"{number(record.nearest_cosine)}"
        )
    if record.target_tokens:
        lines.append(f"tokens of the target: {' '.join(map(repr, record.target_tokens))}")
    if len(request := _request(record)) > _MOST_SHOWN:
        lines.append(f"asked in full: {request}")
    return "\n".join(lines)


def _request(record: AskedRecord) -> str:
    return record.text or record.prompt.replace("{}", record.subject)


def _shortened(text: str) -> str:
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]} … {text[-half:]}"


def _conditions(conditions: dict[str, Any]) -> list[Block]:
    contexts = conditions.get("contexts")
    contexts = [shown(each) for each in contexts] if isinstance(contexts, list) else []
    own = {**conditions, "contexts": len(contexts)}
    rows = [
        [name.replace("_", " "), shown(value)]
        for name, value in own.items()
        if name not in _SHOWN_ELSEWHERE and value is not None
    ]
    folded = Folded("The contexts", Table(["context"], [[each] for each in contexts]))
    return [Table(["condition", "value"], rows, texts=2), *([folded] if contexts else [])]


_SHOWN_ELSEWHERE = ("kind", "unasked", "failure", "context_nll", "seconds")

_NAMES = {"collapse": "collapse predicted", "applied": "made, not asked", "met in part": "answers, met in part"}
"""Of outcomes, where they stand alone."""

_UNASKED = {
    "not measured": "Probabilities and answers were left out (--no-measure).",
    "read in parts": "The model was read in parts (--memory), so that it was not asked for answers in its own words, "
    "nor behind contexts before the edit; rome-fast evaluate asks the edited one where it fits.",
}

_STYLE = """\
:root { --before: #8a8f98; --now: #1f6fb2; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --before: #8f959e; --now: #5aa9ea; --bad: #ff8a80; } }
body { max-width: 1500px; }
td { overflow-wrap: anywhere; }
"""
