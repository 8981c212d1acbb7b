"""The report of the collapse study: figures worked out by hand, parts that are missing, and one file of HTML."""

import json
import math
import re
import sys
from dataclasses import fields
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from safetensors.numpy import load_file, save_file

from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.report import study_figures
from rome_fast.report.figures import method_colour
from rome_fast.report.projection import directions, neighbour_embedding, principal_components
from rome_fast.report.study import write_report
from rome_fast.report.study_data import StudyRecord, read_study

BASE = 40.0
METRICS = [f.name for f in fields(StudyRecord) if f.default is None]
PARTS = ("factors.jsonl", "keys.safetensors", "prefix.jsonl", "guard.json")
CONDITIONS = {
    "model": "toy",
    "dtype": "float32",
    "device": "cpu",
    "processes": 2,
    "threads": 1,
    "layer": 9,
    "spread": [7, 8, 9],
    "statistics": "60000 tokens of Wikipedia",
    "contexts": 20,
    "unseen_contexts": 5,
    "sentences": 60,
    "perplexity_before": BASE,
    "requests": 2,
    "first_token": 1,
    "settings": {"steps": 20, "clamp": 4.0},
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-22",
    "processor": "a processor",
    "collapse_ratio": 1.5,
    "seconds": {"values": 61.5, "perplexity": 200.25},
}


# What draws a figure into a file, which takes most of the time.
PNG = study_figures._png
FULL = {name: to_rgba(method_colour(name)) for name in ("rome", "c-rome")}
EMPTY = to_rgba("white")


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures in the order of their making, which are not drawn into files here."""
    figures = []
    monkeypatch.setattr(study_figures, "_png", lambda figure, *_: figures.append(figure) or b"\x89PNG\r\n\x1a\n")
    return figures


def record(method, first, denominator, perplexity, **changes):
    """One line of records.jsonl. The numerator is 6000 and ‖W‖ is 200, so ‖Δ‖/‖W‖ is 30 / denominator."""
    return {
        "prompt": "{} is a twin city of" if first else "The strait in the middle of {} is called the",
        "subject": "Chicago" if first else "Istanbul",
        "target": "Rome",
        "method": method,
        "layer": 9,
        "loss": 0.25,
        "steps": 12,
        "denominator": denominator,
        "numerator_norm": 6000.0,
        "update_norm": 6000.0 / abs(denominator),
        "weight_norm": 200.0,
        "first_token": first,
        "subject_position": 0 if first else 5,
        "needs_prefix": first,
        "perplexity_before": BASE,
        "perplexity_after": perplexity,
        "collapsed": perplexity > 1.5 * BASE,
        "predicted": 30 / abs(denominator) > 1.5,
        **dict.fromkeys(METRICS),
        **changes,
    }


def factor(left, denominator_key, residual, perplexity, first=True):
    """One line of factors.jsonl."""
    kept = ("prompt", "subject", "target", "numerator_norm", "update_norm", "weight_norm", "first_token")
    kept += ("denominator", "perplexity_before", "perplexity_after", "collapsed")
    line = record("rome", first, 10.0 if left != denominator_key else 1000.0, perplexity)
    return {
        **{name: line[name] for name in kept},
        "left": left,
        "denominator_key": denominator_key,
        "residual": residual,
    }


def write(directory, conditions, **lines):
    """conditions.json and the JSON lines files named by `lines`, Infinity and all."""
    (directory / "conditions.json").write_text(json.dumps(conditions), encoding="utf-8")
    for name, records in lines.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def tiny(directory, **changes):
    """Three requests, two of them first-token, by two methods: few enough to work out by hand."""
    records = [
        record("rome", True, 10.0, 400.0, probability=0.0, probability_prefixed=0.1, efficacy=0.0),
        record("rome", True, -30.0, 200.0, subject="Bay", probability=0.5, probability_prefixed=0.2, efficacy=1.0),
        record("rome", False, 1000.0, 42.0, probability=0.9, neighborhood=0.75),
        record("c-rome", True, 600.0, 44.0, probability=0.02, probability_prefixed=0.8, probability_unseen=0.7),
        record("c-rome", True, 1000.0, 40.0, subject="Bay", probability=0.06, probability_prefixed=0.9),
        record("c-rome", False, 1500.0, 41.0, probability=0.95, neighborhood=0.5),
    ]
    write(directory, {**CONDITIONS, "requests": 3, "first_token": 2, **changes}, records=records)
    return records


def study(directory, requests=24, seed=0):
    """A whole directory of plausible numbers: rome collapses first-token requests, the other methods do not."""
    draw = np.random.default_rng(seed)
    names = [f"Subject {i}" for i in range(requests)]
    first = np.arange(requests) % 2 == 0
    scale = {"rome": 40, "c-rome-released": 1100, "c-rome": 1300, "p-rome": 500}
    records, factors, prefixes = [], [], []
    for name, is_first in zip(names, first.tolist(), strict=True):
        for method, typical in scale.items():
            denominator = float(draw.lognormal(math.log(typical if is_first else 2400), 0.4))
            excess = 1.2 * (30 / denominator) ** 4 if is_first and method == "rome" else 0.02
            perplexity = BASE * (1 + float(excess * draw.lognormal(0, 0.7)))
            if name == "Subject 0" and method == "rome":
                perplexity = math.inf
            metrics = dict(zip(METRICS, draw.beta(1 if is_first else 8, 2, len(METRICS)).tolist(), strict=True))
            records.append(record(method, is_first, denominator, perplexity, subject=name, **metrics))
        for left in ("mean", "unprefixed"):
            for key in ("unprefixed", "mean"):
                for residual in ("delta", "to_unprefixed_value"):
                    bad = is_first and left != key
                    perplexity = BASE * float(1.02 + bad * draw.lognormal(1, 1))
                    factors.append({**factor(left, key, residual, perplexity, is_first), "subject": name})
        for words in (0, 1, 2, 5, 10) if is_first else ():
            denominator = float(draw.lognormal(math.log(40 if words == 0 else 1000 + 50 * words), 0.3))
            excess = float(draw.lognormal(1, 1)) if words == 0 else 0.02
            line = record("rome", True, denominator, BASE * (1 + excess), subject=name)
            kept = ("prompt", "target", "denominator", "update_norm", "weight_norm", "perplexity_before")
            line = {field: line[field] for field in (*kept, "subject", "perplexity_after")}
            prefixes.append({**line, "words": words, "prompt": " ".join(["well"] * words) + " {} is in"})
    conditions = {**CONDITIONS, "requests": requests, "first_token": int(first.sum())}
    write(directory, conditions, records=records, factors=factors, prefix=prefixes)
    write_keys(directory, first, draw)
    figures = {"threshold": 1.5, "precision": 0.96875, "recall": 0.875, "false_alarms": 1}
    guard = {"rule": "update_ratio", "fitted_on": "half of the requests", "tested_on": "the other half", **figures}
    guard["alternatives"] = {"denominator": {**figures, "threshold": 120.5, "recall": None}}
    (directory / "guard.json").write_text(json.dumps(guard), encoding="utf-8")


def write_keys(directory, first, draw, width=64, layers=30):
    sink = draw.normal(size=width)
    mean = draw.normal(size=(len(first), width)) + draw.normal(size=width)
    noise = draw.normal(size=mean.shape)
    unprefixed = np.where(first[:, None], 15 * sink + noise, mean + 0.5 * noise)
    depth = np.arange(layers)
    norms = np.stack([5 + 90 * np.exp(-(((depth - 9) / 3) ** 2)), 4 + depth])
    tensors = {
        "solved": 200 * mean @ np.diag(draw.uniform(0.5, 2, width)),
        "unprefixed": unprefixed,
        "mean": mean,
        "norms": norms,
    }
    tensors = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}
    save_file({**tensors, "first_token": first.astype(np.uint8)}, directory / "keys.safetensors")


def tables(text):
    """The tables of a Markdown report, each a list of rows of cells."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in line.strip("|").split(" | ")])
        elif rows:
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def table(text, *columns):
    """The rows of the first table with these columns, as dictionaries."""
    for head, *rows in tables(text):
        if set(columns) <= set(head):
            return [dict(zip(head, row, strict=True)) for row in rows]
    raise AssertionError(f"no table with columns {columns}")


def report(directory):
    write_report(directory)
    return (directory / "report.md").read_text(encoding="utf-8")


def test_means_of_the_norms(tmp_path):
    tiny(tmp_path)
    rows = table(report(tmp_path), "mean |uᵀk|")
    got = [[row[c] for c in ("method", "requests", "edits", "collapsed", "mean |uᵀk|")] for row in rows]
    assert got == [
        ["rome", "first-token", "2", "2 of 2", "20.0"],  # of 10 and |-30|
        ["rome", "normal", "1", "0 of 1", "1,000"],
        ["c-rome", "first-token", "2", "0 of 2", "800.0"],
        ["c-rome", "normal", "1", "0 of 1", "1,500"],
    ]
    assert [row["mean ‖r uᵀ‖"] for row in rows] == ["6,000"] * 4
    # 30 / 10 and 30 / 30; 30 / 1000; 30 / 600 and 30 / 1000; 30 / 1500
    assert [row["mean ‖Δ‖/‖W‖"] for row in rows] == ["2.000", "0.030", "0.040", "0.020"]


def test_perplexities(tmp_path):
    tiny(tmp_path)
    text = report(tmp_path)
    unedited, rome, cured = table(text, "max perplexity")
    assert list(unedited.values()) == ["unedited", "", "", "40.0", "40.0", "1.000", "1.000"]
    # 400, 200 and 42 have the mean 214; divided by 40: 10, 5 and 1.05
    assert list(rome.values()) == ["rome", "3", "2 of 3", "400.0", "214.0", "10.0", "5.350"]
    # 44, 40 and 41 have the mean 41.67
    assert list(cured.values()) == ["c-rome", "3", "0 of 3", "44.0", "41.7", "1.100", "1.042"]


def test_quality_by_what_stands_before_the_prompt(tmp_path):
    tiny(tmp_path)
    first, normal = (t for t in tables(report(tmp_path)) if "neighbourhood" in t[0])
    columns = ("method", "before the prompt", "edits", "efficacy", "mean P(target)", "neighbourhood")
    wanted = [first[0].index(c) for c in columns]
    assert [[row[i] for i in wanted] for row in first[1:]] == [
        ["rome", "none", "2", "0.500", "0.250", ""],
        ["rome", "editing context", "2", "", "0.150", ""],
        ["rome", "unseen context", "2", "", "", ""],
        ["c-rome", "none", "2", "", "0.040", ""],
        ["c-rome", "editing context", "2", "", "0.850", ""],
        ["c-rome", "unseen context", "2", "", "0.700", ""],  # of one record; the other has null
    ]
    assert [[row[i] for i in wanted] for row in normal[1:] if row[1] == "none"] == [
        ["rome", "none", "1", "", "0.900", "0.750"],
        ["c-rome", "none", "1", "", "0.950", "0.500"],
    ]
    assert {row[first[0].index("paraphrase")] for row in first[1:] + normal[1:]} == {""}


def test_the_summary_says_what_collapsed_and_what_cured_it(tmp_path):
    tiny(tmp_path)
    text = report(tmp_path)
    assert "Each of 3 requests was edited alone into an unedited model, by each of 2 methods. In 2 of them" in text
    assert "more than 1.5 times the unedited model's 40.0." in text
    assert "Not every edit has been measured" not in text
    assert "- rome: 2 of 3 edited models collapsed (2 of 2 first-token, 0 of 1 normal); highest" in text
    assert "highest perplexity 400.0, 10.0 times the unedited model's." in text
    assert "- c-rome: none of 3 edited models collapsed; highest perplexity 44.0, 1.100 times" in text
    assert "20.0 in the mean over first-token requests and 1,000 over normal ones" in text
    assert "- No collapse with: c-rome." in text
    assert "c-rome on first-token requests: mean P(target) is 0.040 without a prefix, 0.850 behind" in text
    assert "0.850 behind an editing context, 0.700 behind an unseen one." in text
    assert "Collapsed over all methods: 2 of 4 edits of first-token requests, 0 of 2 edits of normal requests." in text


def test_a_cure_that_no_method_is(tmp_path):
    write(tmp_path, {**CONDITIONS, "requests": 1}, records=[record("rome", True, 10.0, 400.0)])
    assert "No method was free of collapses." in report(tmp_path)


def test_no_collapse_at_all(tmp_path):
    write(tmp_path, {**CONDITIONS, "requests": 1}, records=[record("rome", False, 1000.0, 41.0)])
    text = report(tmp_path)
    assert "No edited model collapsed." in text
    assert "cured" not in text


def test_a_study_that_was_interrupted(tmp_path):
    records = [record("rome", True, 10.0, 400.0), {**record("c-rome", True, 600.0, 44.0), "collapsed": None}]
    records[1]["perplexity_after"] = None
    write(tmp_path, CONDITIONS, records=records)
    text = report(tmp_path)
    assert "Not every edit has been measured: 2 of 2 requests by 2 methods" in text
    assert "- c-rome: no perplexity was measured." in text
    assert list(table(text, "max perplexity")[2].values()) == ["c-rome", "1", "", "", "", "", ""]


def test_combinations_and_the_part_to_blame(tmp_path):
    tiny(tmp_path)
    rows = [
        factor(left, key, residual, 200.0 if left != key else 42.0)
        for left in ("mean", "unprefixed")
        for key in ("unprefixed", "mean")
        for residual in ("delta", "to_unprefixed_value")
    ]
    rows += [factor("mean", "unprefixed", "delta", 44.0)]
    write(tmp_path, CONDITIONS, factors=rows)
    text = report(tmp_path)
    assert (
        "rome's own parts collapse 1 of 2 first-token requests; with one part changed, the key that u is made from: "
        "0 of 1; the key in the denominator: 0 of 1; the residual: 1 of 1." in text
    )
    combinations = table(text, "same as")
    assert [row["same as"] for row in combinations] == [
        "rome",
        "",
        "c-rome, but for its rows",
        "c-rome-released",
        "p-rome",
        "",
        "",
        "",
    ]
    # ‖Δ‖/‖W‖ is 6000 / 10 / 200; perplexities 200 and 44 make ratios 5 and 1.1
    assert list(combinations[0].values())[4:] == ["2", "1 of 2", "6,000", "10.0", "3.000", "3.050", "5.000"]
    assert list(combinations[2].values())[4:] == ["1", "0 of 1", "6,000", "1,000", "0.030", "1.050", "1.050"]
    parts = {(row["part"], row["choice"]): row["collapsed"] for row in table(text, "choice")}
    assert parts[("the two keys", "different")] == "4 of 5"
    assert parts[("the two keys", "the same")] == "0 of 4"
    assert parts[("residual", "to unprefixed value")] == "2 of 4"


def test_the_effect_of_a_prefix(tmp_path):
    tiny(tmp_path)
    lines = [
        {**record("rome", True, denominator, perplexity), "words": words}
        for words, denominator, perplexity in ((0, 10.0, 400.0), (0, -20.0, 60.0), (3, 2000.0, 40.0))
    ]
    write(tmp_path, CONDITIONS, prefix=lines)
    bare, three = table(report(tmp_path), "words")
    # A ratio of exactly 1.5 is no collapse; ‖Δ‖/‖W‖ is 3 and 1.5.
    assert list(bare.values()) == ["0", "2", "1 of 2", "15.0", "2.250", "5.750", "10.0"]
    assert list(three.values()) == ["3", "1", "0 of 1", "2,000", "0.015", "1.000", "1.000"]


def test_the_guard(tmp_path):
    study(tmp_path)
    text = report(tmp_path)
    own, other = table(text, "threshold")
    assert list(own.values()) == ["update ratio", "1.5", "0.96875", "0.875", "1"]
    assert list(other.values()) == ["denominator", "120.5", "0.96875", "", "1"]
    assert "fitted on half of the requests and tested on the other half:" in text


def test_predictions_are_counted(tmp_path):
    records = [
        record("rome", True, 10.0, 400.0),
        record("rome", True, 40.0, 200.0, subject="Bay"),  # 30 / 40 is below the limit, and yet it collapses
        record("rome", False, 15.0, 41.0),
        record("c-rome", True, 1000.0, 41.0),
    ]
    write(tmp_path, CONDITIONS, records=records)
    text = report(tmp_path)
    assert "the guard predicted 1 of the 2 collapses among 4 edits, and 1 that did not happen" in text


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_said(part, tmp_path):
    study(tmp_path, requests=6)
    (tmp_path / part).unlink()
    text = report(tmp_path)
    others = "|".join(re.escape(name) for name in PARTS if name != part)
    assert f"({part} is not there" in text
    assert not re.search(f"({others}) is not there", text)
    assert ("| words |" in text) == (part != "prefix.jsonl")
    assert ("| threshold |" in text) == (part != "guard.json")
    assert ("| choice |" in text) == (part != "factors.jsonl")
    assert ("figures/projection.png" in text) == (part != "keys.safetensors")


def test_pictures_of_an_earlier_report_are_removed(tmp_path):
    study(tmp_path, requests=6)
    names = {"denominators", "perplexity", "projection", "key_norms", "prefix"}
    written = write_report(tmp_path)
    assert {file.stem for file in written if file.suffix == ".png"} == names
    assert {file.name for file in written if file.suffix != ".png"} == {"report.md", "report.html"}
    (tmp_path / "keys.safetensors").unlink()
    (tmp_path / "prefix.jsonl").write_text("")
    write_report(tmp_path)
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"denominators", "perplexity"}


def test_an_infinite_perplexity(tmp_path, drawn):
    tiny(tmp_path)
    records = [record("rome", True, 10.0, math.inf), record("rome", False, 1000.0, 42.0)]
    write(tmp_path, CONDITIONS, records=records)
    assert "Infinity" in (tmp_path / "records.jsonl").read_text()
    text = report(tmp_path)
    _, rome = table(text, "max perplexity")
    assert list(rome.values())[3:] == ["infinite"] * 4
    assert "(1 of 1 first-token, 0 of 1 normal); highest perplexity infinite." in text
    ((infinite, _),) = bands(drawn[1])
    assert infinite == [[3 * 60.0, FULL["rome"]]]  # three times the largest value that the axis shows
    labels = [label.get_text().strip() for label in drawn[1].axes[0].texts]
    assert labels == ["unedited 40.0", "collapsed above 60.0", "above 10⁶ or infinite"]


def bands(figure):
    """Per method, its first-token and its normal marks: [value, colour inside] each."""
    groups = [
        [[float(x), tuple(face)] for (x, _), face in zip(marks.get_offsets(), marks.get_facecolors(), strict=True)]
        for marks in figure.axes[0].collections
    ]
    return list(zip(groups[::2], groups[1::2], strict=True))


def test_every_edit_is_one_mark_that_is_filled_where_the_model_collapsed(tmp_path, drawn):
    tiny(tmp_path)
    write_report(tmp_path)
    denominators, perplexities = map(bands, drawn)
    red, blue = FULL["rome"], FULL["c-rome"]
    assert red != blue
    assert denominators == [
        ([[10, red], [30, red]], [[1000, EMPTY]]),
        ([[600, EMPTY], [1000, EMPTY]], [[1500, EMPTY]]),
    ]
    assert perplexities == [
        ([[200, red], [400, red]], [[42, EMPTY]]),
        ([[40, EMPTY], [44, EMPTY]], [[41, EMPTY]]),
    ]
    edges = [tuple(marks.get_edgecolors()[0]) for marks in drawn[1].axes[0].collections]
    assert edges == [red, red, blue, blue]
    names = [label.get_text() for label in drawn[1].axes[0].get_yticklabels()]
    assert names == ["rome\n2 of 3 collapsed", "c-rome\n0 of 3 collapsed"]


def test_the_figures_of_keys_and_prefixes(tmp_path, drawn):
    study(tmp_path, requests=6)
    write_report(tmp_path)
    _, _, projection, norms, prefix = drawn
    panels = [[len(marks.get_offsets()) for marks in axes.collections] for axes in projection.axes]
    assert panels[0] == [3] * 6
    wanted = load_file(tmp_path / "keys.safetensors")["norms"]
    assert np.array_equal([line.get_ydata() for line in norms.axes[0].lines[:2]], wanted)
    *requests, median = prefix.axes[0].lines
    assert len(requests) == 3
    # Of three lines the median goes through the middle one.
    middle = np.sort([line.get_ydata() for line in requests], axis=0)[1]
    assert np.array_equal(median.get_ydata(), middle)
    assert [tick.get_text() for tick in prefix.axes[0].get_xticklabels()] == ["0", "1", "2", "5", "10"]


class Page(HTMLParser):
    """What a browser would load, run or show of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.attributes, self.words = set(), [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.words.append(data)


def test_html_needs_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr(study_figures, "_png", PNG)
    study(tmp_path, requests=6)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in page.sources)
    assert page.attributes <= {"lang", "charset", "name", "content", "class", "src", "alt", "tabindex"}
    assert not page.tags & {"script", "link", "iframe", "object", "a"}
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_subjects_cannot_become_markup(tmp_path):
    evil = '<script>alert("1")</script> & a | b'
    records = [record("rome", True, 10.0, 400.0, subject=evil, prompt="<b>{}</b> is")]
    write(tmp_path, {**CONDITIONS, "model": "<i>toy</i> | *x*"}, records=records)
    text = report(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {evil, "<b>{}</b> is"} <= set(page.words)
    assert not page.tags & {"script", "b", "i"}
    assert text.startswith(r"# Collapse of edited models: \<i\>toy\</i\> \| \*x\*")
    assert ["model", "<i>toy</i> | *x*"] in [[row["condition"], row["value"]] for row in table(text, "condition")]


def test_all_records_stand_in_the_html(tmp_path):
    """With a line separator inside a subject, which is no line end of the file."""
    tiny(tmp_path)
    records = [record("rome", True, 12.34567, 400.0, subject="Bay\u2028Area", argmax_unseen=0.125)]
    write(tmp_path, CONDITIONS, records=records)
    text = (write_report(tmp_path)[-1]).read_text(encoding="utf-8")
    folded = text[text.index("<details>") :]
    names = re.findall(r"<th[^>]*>([^<]*)</th>", folded)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", folded)
    assert sorted(names) == sorted(f.name for f in fields(StudyRecord))
    row = dict(zip(names, cells, strict=True))
    shown = ("subject", "denominator", "argmax_unseen", "argmax", "first_token")
    assert [row[n] for n in shown] == ["Bay\u2028Area", "12.3457", "0.125", "", "yes"]


def test_conditions_are_all_there(tmp_path):
    tiny(tmp_path, commit="abc", seconds={"values": 61.5})
    rows = {row["condition"]: row["value"] for row in table(report(tmp_path), "condition")}
    assert rows["statistics C"] == "60000 tokens of Wikipedia"
    assert rows["settings of the optimisation"] == "steps 20, clamp 4"
    assert rows["seconds by stage"] == "values 61.5"
    assert rows["commit"] == "abc"
    assert len(rows) == len(CONDITIONS) + 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "conditions.json").unlink(), r"conditions\.json is missing"),
        (lambda d: (d / "conditions.json").write_text("[1]"), r"conditions\.json: got list, wanted an object"),
        (lambda d: tiny(d, collapse_ratio="high"), "got 'high' as \"collapse_ratio\", wanted a positive number"),
        (lambda d: tiny(d, perplexity_before=0), 'got 0 as "perplexity_before"'),
        (lambda d: (d / "records.jsonl").unlink(), r"records\.jsonl is missing or empty"),
        (lambda d: (d / "records.jsonl").write_text('{"prompt": "x'), r"records\.jsonl, line 1: not JSON"),
        (lambda d: (d / "records.jsonl").write_text("\n{}\n"), 'line 2: got None as "prompt", wanted str'),
        (
            lambda d: write(d, CONDITIONS, records=[record("rome", True, 1.0, 50.0, efficacy="yes")]),
            "line 1: got 'yes' as \"efficacy\", wanted float",
        ),
        (lambda d: (d / "factors.jsonl").write_bytes(b"\xff"), r"reading .*factors\.jsonl"),
        (lambda d: (d / "keys.safetensors").write_bytes(b"1234"), r"keys\.safetensors: cannot be read"),
        (lambda d: save_file({"mean": np.ones(2)}, d / "keys.safetensors"), "has no solved, unprefixed, first_token"),
    ],
)
def test_a_damaged_study_is_refused(damage, message, tmp_path):
    tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", np.ones((3, 4), np.float32), "got shapes"),
        ("solved", np.full((2, 4), np.nan, np.float32), "solved has values that are not finite"),
    ],
)
def test_damaged_keys_are_refused(name, value, message, tmp_path):
    tiny(tmp_path)
    write_keys(tmp_path, np.array([True, False]), np.random.default_rng(0), width=4, layers=3)
    tensors = load_file(tmp_path / "keys.safetensors")
    save_file({**tensors, name: value}, tmp_path / "keys.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_study(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory; pass the one that the study wrote"):
        write_report(tmp_path / "nothing")


def test_without_matplotlib(tmp_path, monkeypatch):
    tiny(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"need matplotlib, .*; pip install 'rome-fast\[study\]'"):
        write_report(tmp_path)


def test_without_scikit_learn_the_panel_says_so(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    said = []
    text = Axes.text
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **style: said.append(s) or text(self, x, y, s, **style))
    study(tmp_path, requests=6)
    write_report(tmp_path)
    assert said == ["t-SNE needs scikit-learn:\npip install 'rome-fast[study]'"]


def test_principal_components_of_a_known_cloud():
    """Widths 6 and 2 along two orthogonal directions of five dimensions, away from the origin."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 2)))[0].T
    along = np.array([[6.0, 0], [-6, 0], [0, 2], [0, -2], [-1, -1], [1, 1]])
    points, shares = principal_components(along @ axes + 100)
    inner = along - along.mean(axis=0)
    assert np.allclose(points @ points.T, inner @ inner.T, atol=1e-9)  # distances survive; |100|² x 1e-16 is 1e-12
    moments = np.linalg.eigvalsh(inner.T @ inner)[::-1]
    assert np.allclose(shares, moments / moments.sum())
    assert (points[np.abs(points).argmax(axis=0), [0, 1]] > 0).all()


def test_directions_have_length_one():
    got = directions(np.array([[3, 4], [0, 0]], np.float32))
    assert np.allclose(got, [[0.6, 0.8], [0, 0]])


def test_neighbour_embedding_keeps_clusters_apart_and_repeats():
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn, which is optional")
    draw = np.random.default_rng(0)
    centres = 10 * np.eye(60)[:3]
    cloud = np.concatenate([centre + 0.1 * draw.normal(size=(12, 60)) for centre in centres])
    points = neighbour_embedding(cloud)
    assert np.array_equal(points, neighbour_embedding(cloud))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag(np.full(36, np.inf))
    assert (distances.argmin(axis=1) // 12 == np.arange(36) // 12).all()
