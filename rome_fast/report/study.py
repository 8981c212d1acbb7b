"""The report of the collapse study: what was measured, in words, tables and figures."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import ArgumentError
from ..methods import METHODS
from ..weights.files import atomic_write, os_errors
from .document import Block, Bullets, Folded, Heading, Picture, Text, to_html, to_markdown
from .study_data import StudyData, StudyRecord, read_study
from .study_tables import (
    DENOMINATOR_KEYS,
    LEFT_KEYS,
    RESIDUALS,
    cell,
    collapses,
    conditions_table,
    factors_table,
    guard_table,
    largest,
    mean,
    methods_of,
    norms_table,
    of,
    parts_of,
    parts_of_method,
    parts_table,
    perplexity_table,
    prefix_table,
    quality_table,
    records_table,
    share,
    shown,
)

_FIGURES = "figures"


def write_report(directory: Path) -> list[Path]:
    """Write report.md, report.html (one file that needs no other) and figures/*.png beside a study's results.

    `directory` holds conditions.json and records.jsonl, and factors.jsonl, keys.safetensors, prefix.jsonl and
    guard.json where those parts were measured; the report says of a part that was not. An earlier
    report is replaced, and with it every PNG in figures.

    Returns the files written. Raises ArgumentError without matplotlib, CheckpointError where a file of the study is
    missing, damaged or not of its form, or where the report cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(
            "write_report: the figures need matplotlib, which is not installed; pip install 'rome-fast[study]'"
        )
    data = read_study(directory)
    title = f"Collapse of edited models: {data.conditions.get('model', 'unnamed model')}"
    pictures = _pictures(data)
    blocks = _document(data, pictures)

    figures = directory / _FIGURES
    with os_errors(f"preparing {figures}"):
        figures.mkdir(exist_ok=True)
        for old in figures.glob("*.png"):
            old.unlink()
    contents = {
        **{picture.file: picture.png for picture in pictures.values()},
        "report.md": to_markdown(title, blocks).encode(),
        "report.html": to_html(title, blocks).encode(),
    }
    for name, content in contents.items():
        atomic_write(directory / name, content)
    return [directory / name for name in contents]


def _pictures(data: StudyData) -> dict[str, Picture]:
    """The figures of what was measured, by name."""
    from . import study_figures as draw

    conditions = _conditions_line(data)
    drawn = {
        "denominators": (
            draw.denominator_figure(data, conditions),
            "Denominators of all edits. In each band first-token requests stand above normal ones, both sorted.",
        ),
        "perplexity": (
            draw.perplexity_figure(data, conditions),
            "Perplexity of every edited model. In each band first-token requests stand above normal ones, both sorted.",
        ),
    }
    if data.keys is not None:
        first = int(data.keys.first_token.sum())
        drawn["projection"] = (
            draw.projection_figure(data.keys, conditions),
            f"Directions (vectors scaled to length 1) of the two sides of the denominator, of {first} first-token and "
            f"{len(data.keys.first_token) - first} normal requests. t-SNE keeps neighbours together; "
            "distances between its groups mean nothing.",
        )
        drawn["key_norms"] = (
            draw.key_norm_figure(data.keys, data.records[0].layer, conditions),
            "Mean norm of the keys of first tokens and of later ones, by layer.",
        )
    if data.prefixes:
        drawn["prefix"] = (
            draw.prefix_figure(data.prefixes, data.collapse_ratio, conditions),
            "Denominator and perplexity ratio of rome's edits by the number of words before the subject.",
        )
    return {name: Picture(f"{_FIGURES}/{name}.png", png, caption) for name, (png, caption) in drawn.items()}


def _document(data: StudyData, pictures: dict[str, Picture]) -> list[Block]:
    return [
        Heading("In short"),
        *_summary(data),
        Heading("Conditions"),
        conditions_table(data.conditions),
        *_collapse(data, pictures),
        *_quality(data.records),
        *_factors(data),
        *_keys(data, pictures),
        *_prefixes(data, pictures),
        *_guard(data),
        Heading("All records"),
        Text("The lines of records.jsonl; the HTML form of this report shows them."),
        Folded(f"{len(data.records)} records", records_table(data.records)),
    ]


def _summary(data: StudyData) -> list[Block]:
    methods = methods_of(data.records)
    requests = {(r.prompt, r.subject, r.target): r.first_token for r in data.records}
    first = sum(requests.values())
    opening = (
        f"Each of {len(requests)} requests was edited alone into an unedited model, by each of {len(methods)} methods. "
        f"In {first} of them the subject's last token is the first token of the prompt; these are called first-token "
        f"requests, the other {len(requests) - first} normal. A model counts as collapsed when its perplexity is more "
        f"than {data.collapse_ratio:g} times the unedited model's {data.perplexity_before:.1f}."
    )
    wanted = data.conditions.get("requests")
    if isinstance(wanted, int) and (wanted != len(requests) or len(data.records) != wanted * len(methods)):
        opening += (
            f" Not every edit has been measured: {len(data.records)} of {wanted} requests by {len(methods)} methods; "
            "every table says how many edits its means are of."
        )
    return [Text(opening), Bullets([_outcome(data.records, method) for method in methods]), *_cure(data)]


def _outcome(records: Sequence[StudyRecord], method: str) -> str:
    edits = of(records, method)
    bad, measured = collapses(edits)
    if not measured:
        return f"{method}: no perplexity was measured."
    worst = largest(r.perplexity_after for r in edits)
    extent = f"highest perplexity {cell(worst)}"
    if worst is not None and math.isfinite(worst):
        extent += f", {cell(largest(r.perplexity_ratio for r in edits))} times the unedited model's"
    if not bad:
        return f"{method}: none of {measured} edited models collapsed; {extent}."
    parts = [
        f"{share(group)} {name}"
        for name, group in (("first-token", of(records, method, True)), ("normal", of(records, method, False)))
        if group
    ]
    return f"{method}: {bad} of {measured} edited models collapsed ({', '.join(parts)}); {extent}."


def _cure(data: StudyData) -> list[Block]:
    """Which methods do not collapse, whether the fact is then there, and which part of rome was to blame."""
    verdicts = {method: collapses(of(data.records, method)) for method in methods_of(data.records)}
    broken = [method for method, (bad, _) in verdicts.items() if bad]
    safe = [method for method, (bad, measured) in verdicts.items() if measured and not bad]
    if not broken:
        return [Text("No edited model collapsed.")] if safe else []
    cures = [f"No collapse with: {', '.join(safe)}." if safe else "No method was free of collapses."]
    for method in safe:
        edits = of(data.records, method, True)
        found = {
            "without a prefix": mean(r.probability for r in edits),
            "behind an editing context": mean(r.probability_prefixed for r in edits),
            "behind an unseen one": mean(r.probability_unseen for r in edits),
        }
        known = [f"{value:.3f} {where}" for where, value in found.items() if value is not None]
        if known:
            cures.append(f"{method} on first-token requests: mean P(target) is {', '.join(known)}.")
    reasons = []
    for method in broken:
        first, normal = (mean(abs(r.denominator) for r in of(data.records, method, group)) for group in (True, False))
        if first and normal:
            reasons.append(
                f"{method} divides by |uᵀk|, which is {cell(first)} in the mean over first-token requests and "
                f"{cell(normal)} over normal ones."
            )
    reasons += _one_part_changed(data)
    why: list[Block] = [Text("Why:"), Bullets(reasons)] if reasons else []
    return [Text("What cured it, and whether the fact is then there:"), Bullets(cures), *why]


def _one_part_changed(data: StudyData) -> list[str]:
    """What becomes of rome's collapses when one of its three parts is changed and the others stay."""
    rome = parts_of_method(METHODS["rome"])

    def outcome(parts: tuple[str, ...]) -> str:
        return share(r for r in data.factors if r.first_token and parts_of(r) == parts)

    if not outcome(rome):
        return []
    changes = []
    names = ("the key that u is made from", "the key in the denominator", "the residual")
    for i, (name, choices) in enumerate(zip(names, (LEFT_KEYS, DENOMINATOR_KEYS, RESIDUALS), strict=True)):
        other = next(choice for choice in choices if choice != rome[i])
        if left := outcome((*rome[:i], other, *rome[i + 1 :])):
            changes.append(f"{name}: {left}")
    whole = f"rome's own parts collapse {outcome(rome)} first-token requests"
    return [f"{whole}; with one part changed, {'; '.join(changes)}." if changes else f"{whole}."]


def _collapse(data: StudyData, pictures: dict[str, Picture]) -> list[Block]:
    groups = [
        f"{share(r for r in data.records if r.first_token == first)} edits of {name} requests"
        for first, name in ((True, "first-token"), (False, "normal"))
        if any(r.first_token == first and r.collapsed is not None for r in data.records)
    ]
    return [
        Heading("Collapse and normal cases"),
        Text(
            "An edit adds Δ = r uᵀ / (uᵀk) to the weight W: u = C⁻¹k̄ or C⁻¹kᵤ, k the key in the denominator, r what "
            "is added to the value at that key. ‖r uᵀ‖ is the numerator's norm. Ratios are of perplexities, edited / "
            "unedited. A cell is empty where nothing was measured."
        ),
        Text(f"Collapsed over all methods: {', '.join(groups) or 'no perplexity was measured'}."),
        norms_table(data.records),
        pictures["denominators"],
        Heading("Perplexity of the edited models"),
        perplexity_table(data),
        pictures["perplexity"],
    ]


def _quality(records: Sequence[StudyRecord]) -> list[Block]:
    blocks: list[Block] = [
        Heading("Whether the edit takes"),
        Text(
            "Efficacy: P(new target) > P(true one). Decoded right: greedy decoding gives the target. Argmax: every "
            "token of the target leads, teacher forced. Paraphrase: efficacy on other wordings. Neighbourhood, without "
            "a prefix only: P(true answer) > P(new target) on other subjects. All are means over edits."
        ),
    ]
    for first, name in ((True, "First-token requests:"), (False, "Normal requests:")):
        blocks += [Text(name), quality_table(records, first)]
    return blocks


def _factors(data: StudyData) -> list[Block]:
    heading = Heading("What explains the collapse")
    if not data.factors:
        return [heading, _missing("The combinations of rome's parts with their repairs", "factors.jsonl")]
    blocks: list[Block] = [
        heading,
        Text(
            "rome takes u from the mean key, divides by the unprefixed one and adds δ. Each of the three is exchanged "
            "for its repair, in every combination; first-token requests by each part alone:"
        ),
        parts_table(data.factors),
    ]
    for first, name in ((True, "First-token requests, all combinations:"), (False, "Normal requests:")):
        if any(r.first_token == first for r in data.factors):
            blocks += [Text(name), factors_table(data.factors, first)]
    return blocks


def _keys(data: StudyData, pictures: dict[str, Picture]) -> list[Block]:
    heading = Heading("Where the keys lie")
    if data.keys is None:
        return [heading, _missing("The keys of the requests", "keys.safetensors")]
    return [heading, pictures["projection"], pictures["key_norms"]]


def _prefixes(data: StudyData, pictures: dict[str, Picture]) -> list[Block]:
    heading = Heading("A prefix before a first-token subject")
    if not data.prefixes:
        return [heading, _missing("The effect of a prefix", "prefix.jsonl")]
    return [
        heading,
        Text("First-token requests edited by rome with a neutral prefix before the subject, by its number of words."),
        prefix_table(data.prefixes, data.collapse_ratio),
        pictures["prefix"],
    ]


def _guard(data: StudyData) -> list[Block]:
    judged = [r for r in data.records if r.collapsed is not None]
    caught = sum(r.predicted for r in judged if r.collapsed)
    alarms = sum(r.predicted for r in judged if not r.collapsed)
    bad = sum(bool(r.collapsed) for r in judged)
    blocks: list[Block] = [
        Heading("The guard"),
        Text(
            f"Before any perplexity was measured, the guard predicted {caught} of the {bad} collapses among "
            f"{len(judged)} edits, and {alarms} that did not happen."
        ),
    ]
    if data.guard is None:
        return [*blocks, _missing("How its limit was fitted and tested", "guard.json")]
    fitted, tested = (shown(data.guard.get(key)) or "requests not named" for key in ("fitted_on", "tested_on"))
    words = f"Its limit and those of other rules, fitted on {fitted} and tested on {tested}:"
    return [*blocks, Text(words), guard_table(data.guard)]


def _missing(part: str, file: str) -> Text:
    return Text(f"{part}: not measured ({file} is not there, because the study was interrupted or left this part out).")


def _conditions_line(data: StudyData) -> str:
    """What stands below a figure."""
    c = data.conditions
    known = [str(c[name]) for name in ("model", "dtype", "device") if name in c]
    known.append(f"layer {data.records[0].layer}")
    if "statistics" in c:
        known.append(f"C: {c['statistics']}")
    if "contexts" in c:
        known.append(f"{c['contexts']} contexts")
    return ", ".join([*known, "one edit at a time"])
