"""The report of an edit run: what it measures against transformers alone, its data, its page and its figures."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CONTEXTS, END, MIDDLE, START, all_bits, changed, edited, rounding_of_log_p
from rome_fast import Edit
from rome_fast.cli import main
from rome_fast.errors import ArgumentError, CheckpointError, ConvergenceError
from rome_fast.evaluation import evaluate
from rome_fast.report import edit as edit_report
from rome_fast.report.document import to_html
from rome_fast.report.drawing import BINS, bars, five_numbers, histogram, scatter, spreads
from rome_fast.report.edit import check_new_report, page, write_report, write_run
from rome_fast.report.edit_data import AskedRecord, EditRun, asked_run, failed_run, read_run
from rome_fast.report.edit_figures import figures
from rome_fast.report.outcomes import REMEDIES, outcome
from toys import save_toy, toy_model

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onclick="alert(1)',
    "&lt;b&gt; <!-- ]]>",
    "[/INST] {} {{}}",
    "a\u202eb\u2066c\u200f",
    "one\u2028two\u2029three\x85",
    "nul\x00 escape\x1b[31m",
    "half \ud800 a pair",
    "\u05e2\u05d1\u05e8\u05d9\u05ea",
)
CONDITIONS = {
    "kind": "edit run",
    "date": "2026-11-29",
    "unasked": None,
    "model": "toy",
    "method": "dual",
    "contexts": list(CONTEXTS),
    "context_nll": {"before": 3.0, "after": 3.25, "origin": 3.0, "since_origin": 3.25},
    "seconds": {"keys": 2.0, "values": 61.5},
}
VOID = {"meta", "input", "img", "br"}


def record(**changes):
    """An edit that went well."""
    usual = {
        "prompt": "{} is in",
        "subject": "Rome",
        "target": "France",
        "method": "dual",
        "layer": 4,
        "layers": [3, 4],
        "loss": 0.25,
        "steps": 12,
        "drafted": 3,
        "converged": True,
        "denominator": 600.0,
        "numerator_norm": 60.0,
        "update_norm": 5.0,
        "weight_norm": 100.0,
        "update_ratios": [0.02, 0.05],
        "missed": 0.01,
        "share_bare": 0.9,
        "needs_prefix": False,
        "collapsed": False,
        "target_tokens": [" France"],
        "probability_before": 0.02,
        "probability_after": 0.97,
        "probability_before_prefixed": 0.03,
        "probability_after_prefixed": 0.88,
        "argmax_after": True,
        "argmax_after_prefixed": 1.0,
        "answer_before": " Italy, and",
        "answer_after": " France",
        "answer_right": True,
    }
    return AskedRecord(**{**usual, **changes})


def one_of_each():
    """Edits of every outcome, the best first."""
    failed = {"applied": False, "argmax_after": False, "argmax_after_prefixed": 0.0}
    return [
        record(subject="edited"),
        record(subject="applied", argmax_after=None, argmax_after_prefixed=None),
        record(subject="met in part", missed=0.6),
        record(subject="edited, but not behind a prefix", argmax_after_prefixed=0.4),
        record(subject="edited, answers behind a prefix", argmax_after=False),
        record(subject="fact lost", argmax_after=False, argmax_after_prefixed=0.4),
        record(subject="collapse", collapsed=True, update_norm=200.0),
        record(subject="left out: unknown why", **failed),
        record(subject="left out: would collapse", left_out="would collapse", collapsed=True, **failed),
        record(subject="left out: did not converge", left_out="did not converge", converged=False, **failed),
        record(subject="left out: loss not finite", left_out="loss not finite", loss=math.nan, steps=7, **failed),
    ]


class Page(HTMLParser):
    """A page as a browser takes it apart: tags that open and close as they should, rows, what could load or run."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.rows, self.cell, self.listed, self.options, self.buttons = [], None, False, [], 0
        self.feed(content.decode("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attrs.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.listed = attrs.get("class") == "list"
        if tag == "tr" and "data-kind" in attrs:
            self.rows.append(
                {"kind": attrs["data-kind"], "bad": attrs.get("class") == "bad", "cells": [], "values": []}
            )
        if tag == "td" and self.listed:
            self.cell = []
            self.rows[-1]["values"].append(attrs.get("data-v"))
        if tag == "option":
            self.options.append(attrs["value"])
        self.buttons += tag == "button"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td" and self.cell is not None:
            self.rows[-1]["cells"].append("".join(self.cell))
            self.cell = None

    def handle_data(self, data):
        self.words.append(data)
        if self.cell is not None and "details" not in self.open:
            self.cell.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def taken_apart(records, **changes):
    return Page(page(EditRun({**CONDITIONS, **changes}, records)))


# What it measures


@pytest.fixture
def toy(tmp_path, toy_tokenizers, monkeypatch, empty_cache):
    """A folder to work in, with a model, contexts and an edits file of two requests."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    lines = [{"prompt": e.prompt, "subject": e.subject, "target_new": e.target} for e in (MIDDLE, END)]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "contexts.txt").write_text("".join(f"{context}\n" for context in CONTEXTS))
    return tmp_path


EDIT = ("edit", "model", "--edits", "edits.jsonl", "--identity", "--guard", "off", "--unconverged", "write")
EDIT += ("--contexts", "contexts.txt", "--settings", "steps=3", "stop=loss")


def greedy(directory, text, tokens):
    """What transformers' own loop says behind a text until it stops, as text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    asked = tokenizer(text, return_tensors="pt")
    said = model.generate(**asked, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)
    ids = said[0, asked["input_ids"].shape[1] :].tolist()
    stop = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:stop])


def probability(directory, text, answer):
    """The geometric mean of the answer's tokens in float64, from one plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start, ids = len(tokenizer(text)["input_ids"]), tokenizer(text + answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logs = model(ids).logits[0].log_softmax(-1)
    found = [logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]
    return math.exp(sum(found) / len(found))


def test_what_the_model_says_is_what_transformers_says(toy, capsys):
    assert main([*EDIT, "--out", "edited", "--report", "report", "--json", "edit.json"]) == 0
    assert "report: report/report.html\n" in capsys.readouterr().out
    run = read_run(toy / "report")
    tokenizer = AutoTokenizer.from_pretrained("model")
    for record, edit in zip(run.records, (MIDDLE, END), strict=True):
        text, answer = edit.text, f" {edit.target}"
        tokens = 16 + len(tokenizer(answer)["input_ids"])
        assert record.answer_before == greedy("model", text, tokens)
        assert record.answer_after == greedy("edited", text, tokens)
        assert record.answer_right == (record.answer_after.strip() == edit.target)
        before = [probability("model", context + text, answer) for context in CONTEXTS]
        wanted = sum(before) / len(before)
        assert record.probability_before_prefixed == pytest.approx(wanted, rel=rounding_of_log_p(torch.float32))
    # The rest is what the edit says of itself.
    told = json.loads((toy / "edit.json").read_text())
    own = [{name: getattr(r, name) for name in told["edits"][0]} for r in run.records]
    assert own == told["edits"]
    assert {name: run.conditions[name] for name in ("method", "contexts", "seconds", "context_nll")} == {
        name: told[name] for name in ("method", "contexts", "seconds", "context_nll")
    }
    assert run.conditions["edits"] == "edits.jsonl"

    # The same edit without a report, and the page from its data alone.
    assert main([*EDIT, "--out", "plain"]) == 0
    assert (toy / "plain/model.safetensors").read_bytes() == (toy / "edited/model.safetensors").read_bytes()
    written = (toy / "report/report.html").read_bytes()
    (toy / "report/report.html").unlink()
    assert main(["report", "report", "--json", "again.json"]) == 0
    assert (toy / "report/report.html").read_bytes() == written
    assert json.loads((toy / "again.json").read_text()) == {"report": "report/report.html"}
    assert sorted(path.name for path in (toy / "report").iterdir()) == [
        "conditions.json",
        "records.jsonl",
        "report.html",
    ]


def test_a_model_that_is_read_in_parts_is_not_asked(toy):
    assert main([*EDIT, "--in-place", "--memory", "400kB", "--report", "report"]) == 0
    run = read_run(toy / "report")
    assert run.conditions["unasked"] == "read in parts"
    assert {r.answer_before for r in run.records} == {r.probability_before_prefixed for r in run.records} == {None}
    assert all(r.probability_after is not None for r in run.records)
    found = Page((toy / "report/report.html").read_bytes())
    assert "The model was read in parts (--memory), so that it was not asked" in found.text
    assert "says now" not in found.words
    assert len(found.rows[0]["cells"]) == found.buttons == 9


def test_a_run_without_measures_says_so(toy):
    assert main([*EDIT, "--out", "edited", "--no-measure", "--report", "report"]) == 0
    found = Page((toy / "report/report.html").read_bytes())
    assert "The model was not asked for any of them." in found.text
    assert "Probabilities and answers were left out (--no-measure)." in found.text
    for title in ("P(target) behind the bare prompt: not measured.", "the NLL of the contexts was not measured."):
        assert title in found.text
    assert {row["kind"] for row in found.rows} <= {"made, not asked", "answers, met in part"}


def test_a_model_has_its_edit_afterwards_as_before(toy_tokenizers, monkeypatch):
    monkeypatch.setattr("rome_fast.report.edit_data._TOGETHER", 1)
    model, edits = toy_model("llama"), [MIDDLE, START]
    result = edited(model, toy_tokenizers[True], edits, measure=True)
    bits, counted = all_bits(model), []
    run = asked_run(result, edits, {"made_by": "a test"}, lambda done, total: counted.append((done, total)))
    assert changed(model, bits) == []
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # The shorter one was asked first.
    answers = [m.answer for m in evaluate(model, toy_tokenizers[True], edits)]
    assert [r.answer_after for r in run.records] == answers
    assert answers[0] != answers[1]
    assert run.conditions["made_by"] == "a test"
    assert run.conditions["model"] == ""
    result.revert()
    assert result.delta.is_applied is False
    with pytest.raises(ArgumentError, match="edits: got others than those of the result"):
        asked_run(result, [START, MIDDLE])


def test_probes_of_an_edit_are_not_asked(toy_tokenizers, monkeypatch):
    """They would cost as much again, and no figure shows them."""
    edit = replace(MIDDLE, target_true="Paris", paraphrase_prompts=("In {} one",), neighborhood_prompts=("Berlin is",))
    result = edited(toy_model("llama"), toy_tokenizers[True], edit, measure=True)
    seen = []
    monkeypatch.setattr("rome_fast.report.edit_data.evaluate", lambda *given: seen.append(given[2]) or evaluate(*given))
    asked_run(result, [edit])
    assert [[(e.target_true, e.paraphrase_prompts, e.neighborhood_prompts) for e in some] for some in seen] == [
        [(None, (), ())],
        [(None, (), ())],
    ]


# Places and files


def test_a_report_has_a_folder_of_its_own(toy, capsys):
    (toy / "taken").mkdir()
    for place, words in (
        ("taken", "report: taken exists already; choose a new name or remove it"),
        ("no/where", "does not exist; make it first"),
        ("model/report", "report: model/report lies in model, which is the model"),
        ("edited", "report: edited lies in edited, which is that of --out"),
    ):
        assert main([*EDIT, "--out", "edited", "--report", place]) == 2
        assert words in capsys.readouterr().err
        assert not (toy / "edited").exists()


def test_an_edit_whose_report_cannot_be_written_is_made_and_told(toy, capsys, monkeypatch):
    def full(*_):
        raise CheckpointError("writing report: No space left on device")

    monkeypatch.setattr(edit_report, "write_run", full)
    assert main([*EDIT, "--out", "edited", "--report", "report", "--json", "edit.json"]) == 3
    message = "rome-fast: all was done, but its report could not be written: writing report: No space left on device"
    assert message in capsys.readouterr().err
    assert (toy / "edited/model.safetensors").exists()
    assert len(json.loads((toy / "edit.json").read_text())["edits"]) == 2


@pytest.mark.parametrize("reason", ["guard", "convergence"])
def test_a_run_that_ends_in_an_error_has_a_report_that_says_so(reason, toy, capsys, monkeypatch):
    how = [] if reason == "convergence" else ["--unconverged", "write"]
    if reason == "guard":
        monkeypatch.setattr("rome_fast.closing.guard.UPDATE_RATIO_LIMIT", 0.0)
        how += ["--guard", "raise", "--method", "rome"]
    else:
        how += ["--unconverged", "raise", "--guard", "off"]
    usual = [each for each in EDIT if each not in ("--guard", "off", "--unconverged", "write")]
    assert main([*usual, *how, "--out", "edited", "--report", "report"]) == 2
    said = capsys.readouterr().err
    assert "report: report/report.html" in said
    assert not (toy / "edited").exists()
    failure = read_run(toy / "report").conditions["failure"]
    assert failure["kind"] == {"guard": "CollapseError", "convergence": "ConvergenceError"}[reason]
    assert failure["message"] in said
    content = (toy / "report/report.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub(r"<[^>]*>", "", content))
    assert all(line.strip() in text for line in failure["message"].splitlines())
    assert "none was edited" in text
    assert main(["report", "report"]) == 0
    assert (toy / "report/report.html").read_text(encoding="utf-8") == content


def test_what_is_said_of_a_failure_is_text(tmp_path):
    edits = [Edit("{} is", text, text) for text in HOSTILE if text.isprintable() and "{" not in text]
    write_run(tmp_path / "report", failed_run(ConvergenceError("".join(HOSTILE)), edits, CONDITIONS))
    content = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in content
    assert len(read_run(tmp_path / "report").conditions["failure"]["requests"]) == len(edits) > 1
    for damage in (lambda _: {}, lambda f: f | {"requests": [["a"]]}, lambda f: f | {"message": 7}):
        file = tmp_path / "report/conditions.json"
        conditions = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(conditions | {"failure": damage(conditions["failure"])}), encoding="utf-8")
        with pytest.raises(CheckpointError, match='as "failure", wanted what went wrong'):
            read_run(tmp_path / "report")
        file.write_text(json.dumps(conditions), encoding="utf-8")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edit_report, "rename_new", fails)
    with pytest.raises(CheckpointError, match=r"writing .*report: No space left"):
        write_run(tmp_path / "report", EditRun(CONDITIONS, [record()]))
    assert list(tmp_path.iterdir()) == []


def test_data_come_back_as_they_were(tmp_path):
    """Infinite and missing numbers, and any text, half a surrogate pair among it."""
    records = [record(subject=text, target=text, answer_after=text) for text in HOSTILE]
    records += [*one_of_each(), record(loss=math.inf, nearest=2, nearest_cosine=0.5)]
    run = EditRun({**CONDITIONS, "model": HOSTILE[8]}, records)
    write_run(tmp_path / "report", run)
    again = read_run(tmp_path / "report")
    assert again.conditions == run.conditions
    # NaN is no number, not even itself.
    assert [repr(asdict(r)) for r in again.records] == [repr(asdict(r)) for r in run.records]
    assert (tmp_path / "report/report.html").read_bytes() == page(run)
    assert write_report(tmp_path / "report").read_bytes() == page(run)
    with pytest.raises(ArgumentError, match="exists already"):
        write_run(tmp_path / "report", run)
    with pytest.raises(ArgumentError, match=r"lies in .*, which is the model"):
        check_new_report(tmp_path / "report/x/y", ("the model", tmp_path / "report"))


def rewritten(name, change):
    def damage(folder):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(change(text), encoding="utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a directory"),
        (lambda f: (f / "conditions.json").unlink(), r"conditions\.json is missing"),
        (lambda f: (f / "records.jsonl").unlink(), r"records\.jsonl is missing or empty"),
        (rewritten("conditions.json", lambda t: t[:-4]), r"conditions\.json: not JSON"),
        (rewritten("conditions.json", lambda t: "[" * 100_000), r"conditions\.json: not JSON"),
        (rewritten("conditions.json", lambda t: t.replace("edit run", "study")), "got 'study' as \"kind\""),
        (rewritten("conditions.json", lambda t: t.replace("61.5", '"long"')), 'as "seconds", wanted numbers'),
        (rewritten("conditions.json", lambda t: t.replace("since_origin", "x")), 'as "context_nll", wanted before'),
        (rewritten("records.jsonl", lambda t: t + "{}\n"), 'line 3: got None as "prompt", wanted str'),
        (
            rewritten("records.jsonl", lambda t: t.replace('"steps": 12', '"steps": "x"')),
            "line 1: got 'x' as \"steps\"",
        ),
        (
            rewritten("records.jsonl", lambda t: t.replace("[0.02, 0.05]", '[0.02, "y"]')),
            'as "update_ratios", wanted list',
        ),
        (rewritten("records.jsonl", lambda t: t.replace("[0.02, 0.05]", "[0.02]")), "got 1 update ratios of 2 layers"),
        (
            rewritten("records.jsonl", lambda t: t.replace('"nearest": 1', '"nearest": 9')),
            "got 9 as nearest of 2 edits",
        ),
        (
            rewritten("records.jsonl", lambda t: t.replace('"left_out": null', '"left_out": "z"')),
            'as "left_out", wanted',
        ),
        (rewritten("records.jsonl", lambda t: t.replace("0.25", "1" * 400)), 'as "loss", wanted float'),
        (rewritten("conditions.json", lambda t: t.replace("61.5", "1" * 400)), 'as "seconds", wanted numbers'),
        (lambda f: (f / "records.jsonl").write_bytes(b"\xff"), r"reading .*records\.jsonl"),
    ],
)
def test_a_folder_that_is_no_report_is_refused_by_one_error(damage, message, tmp_path, capsys):
    folder = tmp_path / "report"
    write_run(folder, EditRun(CONDITIONS, [record(nearest=1, nearest_cosine=0.5), record()]))
    (folder / "report.html").unlink()
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        write_report(folder)
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("rome-fast: ") == 1
    assert not (folder / "report.html").exists()


# The page


def test_failed_edits_come_first_and_are_told_what_to_try():
    records = one_of_each()
    assert [outcome(r) for r in records] == [r.subject for r in records]
    assert [outcome(r) for r in reversed(records)] == [*list(REMEDIES)[:9], *("applied", "edited")]
    found = taken_apart(records)
    assert [row["cells"][0] for row in found.rows] == [str(i) for i in range(11, 0, -1)]
    assert [row["bad"] for row in found.rows] == [True] * 9 + [False] * 2
    # The filter has every kind once, in the same order.
    assert found.options == ["", *(row["kind"] for row in found.rows)]
    for r in records:
        if REMEDIES[outcome(r)]:
            assert f"Try: {REMEDIES[outcome(r)]}." in found.text
    assert found.text.count("1 edit, ") == 9
    verdicts = [row["cells"][2] for row in found.rows]
    assert verdicts[0] == "left out: loss not finite: loss nan after 7 steps"
    assert verdicts[1] == "left out: did not converge: loss 0.250 after 12 steps"
    assert verdicts[2] == "left out: would collapse: ‖Δ‖ is 0.05 ‖W‖"
    assert verdicts[4] == "collapse predicted: ‖Δ‖ is 2.00 ‖W‖"
    assert verdicts[8] == "edited, met in part (60% off)"
    # Seven were applied; of all eleven, four are said bare, and five behind half of the contexts.
    assert "11 edits were asked for; 7 were made and 4 left out." in found.text


def test_a_row_has_before_and_now_beside_each_other():
    first = record(nearest=1, nearest_cosine=0.987, answer_right=None)
    second = record(subject="Bay", target="Spain", probability_after=None, update_ratios=[], missed=math.nan)
    found = taken_apart([first, second])
    cells, values = found.rows[0]["cells"], found.rows[0]["values"]
    assert cells == [
        *("1", "Rome is in → France", "edited", "Italy, and", "France"),
        *("0.020", "0.970", "0.030", "0.880", "0.050", "0.010"),
    ]
    assert values == ["1", None, None, None, None, "0.02", "0.97", "0.03", "0.88", "0.05", "0.01"]
    assert found.rows[1]["cells"][4:] == ["France ✓", "0.020", "–", "0.030", "0.880", "–", "nan"]
    assert found.rows[1]["values"][6] == found.rows[1]["values"][9] == found.rows[1]["values"][10] == ""
    assert "nearest key: no. 2, Bay → Spain, cosine 0.987" in found.text
    assert "‖Δ‖/‖W‖ by layer 3: 0.020, 4: 0.050" in found.text
    assert found.buttons == len(cells)


def test_nothing_went_wrong():
    found = taken_apart([record()])
    assert "Nothing: every edit was made, and answers as far as it was asked." in found.text
    assert found.options == ["", "edited"]


def test_hostile_text_is_text():
    names = ("prompt", "subject", "target", "text", "answer_before", "answer_after")
    records = [record(**dict.fromkeys(names, text), target_tokens=[text]) for text in HOSTILE]
    records += [record(text=HOSTILE[0] * 40, left_out=None, applied=False)]
    content = page(EditRun({**CONDITIONS, "model": HOSTILE[1], "contexts": list(HOSTILE), HOSTILE[0]: 1}, records))
    found = Page(content)
    others = [record()] * len(HOSTILE) + [record(text="a" * 1000, applied=False)]
    harmless = Page(page(EditRun({**CONDITIONS, "contexts": list(HOSTILE), "x": 1}, others)))
    # No tag or attribute more than of a page with other words.
    assert found.tags.count("script") == harmless.tags.count("script") == 1
    assert {(tag, name) for tag, name, _ in found.attributes} == {(tag, name) for tag, name, _ in harmless.attributes}
    assert set(found.tags) == set(harmless.tags)
    shown = {row["cells"][3] for row in found.rows}
    assert set(HOSTILE[:5]) <= shown
    assert {r"a\u202eb\u2066c\u200f", r"nul\x00 escape\x1b[31m", r"half \ud800 a pair"} <= shown
    # Each piece of foreign text has a direction of its own.
    assert b"<bdi>\xd7\xa2\xd7\x91\xd7\xa8\xd7\x99\xd7\xaa</bdi>" in content
    # Nothing that steers a terminal or turns a direction is in the page, wherever it stood.
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", content.decode())
    assert f"asked in full: {HOSTILE[0] * 40}" in " ".join(found.words)


def test_a_page_needs_no_other_file_and_runs_no_other_script():
    content = page(EditRun(CONDITIONS, one_of_each()))
    found = Page(content)
    text = content.decode()
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not set(found.tags) & {"link", "iframe", "object", "a", "img", "base", "embed"}
    names = {name for _, name, _ in found.attributes}
    assert not names & {"src", "href", "action", "style"}
    assert not {name for name in names if name.startswith("on")}
    (policy,) = (value for tag, name, value in found.attributes if name == "content" and "default-src" in value)
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert re.sub("'sha256-[^']*'", "#", policy) == "default-src 'none'; img-src data:; style-src #; script-src #"
    # One colour scheme for each, and the width of the device.
    assert "color-scheme: light dark" in text
    assert text.count("@media (prefers-color-scheme: dark)") == 2
    assert ("meta", "content", "width=device-width, initial-scale=1") in found.attributes
    assert found.tags.count("h1") == found.tags.count("main") == 1
    # Without a script there is no policy: nothing runs anyway.
    assert "Content-Security-Policy" not in to_html("title", [])


def test_a_long_prompt_is_cut_in_the_middle_and_there_in_full():
    text = f"{'a' * 300}{'b' * 300}"
    found = taken_apart([record(text=text)])
    assert found.rows[0]["cells"][1] == f"{'a' * 200} … {'b' * 200} → France"
    assert f"asked in full: {text}" in found.text


# Figures


def marks(svg):
    """(colour, height, words) of the rectangles that say something, and what all marks say."""
    found = re.findall(r'<rect class="fill(\d)"[^>]*height="([\d.]+)"><title>([^<]*)</title>', svg)
    return found, re.findall(r"<title>([^<]*)</title>", svg)


def test_a_histogram_counts_as_numpy_does():
    draw = np.random.default_rng(0)
    values = {"before": draw.beta(1, 8, 400).tolist(), "now": [*draw.beta(8, 1, 300).tolist(), math.nan]}
    rectangles, _ = marks(histogram("title", "P", values, 0, 1))
    for colour, (name, some) in zip("01", values.items(), strict=True):
        wanted, edges = np.histogram(some, BINS, (0, 1))
        got = {said: float(height) for c, height, said in rectangles if c == colour}
        said = {
            f"{name}: {n} of {wanted.sum()} edits, {a:.3g} to {b:.3g}": n
            for n, a, b in zip(wanted.tolist(), edges, edges[1:], strict=False)
            if n
        }
        assert list(got) == list(said)
        most = max(np.histogram(v, BINS, (0, 1))[0].max() for v in values.values())
        # 142 units high, to a tenth; two at least, so that few can be seen beside many.
        assert list(got.values()) == [pytest.approx(max(2, 142 * n / most), abs=0.05) for n in said.values()]


def test_what_lies_outside_a_histogram_is_in_its_last_bins():
    rectangles, _ = marks(histogram("title", "x", {"edits": [-3.0, 0.0, 1.0, 7.0]}, 0, 1))
    assert [said for *_, said in rectangles] == ["edits: 2 of 4 edits, 0 to 0.05", "edits: 2 of 4 edits, 0.95 to 1"]


def test_quartiles_are_numpys():
    for count in (1, 2, 5, 100):
        values = np.random.default_rng(count).normal(size=count).tolist()
        assert five_numbers(values) == pytest.approx(np.percentile(values, [0, 25, 50, 75, 100]).tolist())
    svg = spreads("title", "layer", {"3": [1.0, 2.0, 3.0, 4.0, 8.0], "4": [math.inf]})
    assert marks(svg)[1] == ["layer 3: least 1, median 3, most 8, of 5 edits"]
    # From 8 at the top, 28, to 0 at the bottom, 170: quartiles 4 and 2, and the median 3.
    assert 'y="99.0"' in svg
    assert 'height="35.5"' in svg
    assert " 116.8h" in svg


def test_points_and_bars_lie_where_their_numbers_are():
    svg = scatter("title", "x", "y", [(0.0, 0.0), (0.5, 2.0), (1.0, 4.0), (math.nan, 1.0)], 1.0)
    assert 'd="M48.0 170.0h0M189.0 99.0h0M330.0 28.0h0"' in svg
    svg = bars("title", {"keys": 15.0, "values": 1500.0, "update": math.nan}, "s")
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', svg)]
    assert widths == [pytest.approx(1.54, abs=0.05), 154.0, 1.0]
    assert marks(svg)[1] == ["keys: 15 s", "values: 1,500 s", "update: no number"]


def test_figures_say_what_the_records_say():
    records = [
        record(probability_before=0.1, probability_after=0.9, share_bare=0.3, nearest=1, nearest_cosine=0.99),
        record(probability_before=0.3, probability_after=0.5, update_ratios=[0.1, 0.2], nearest=0, nearest_cosine=0.99),
        record(probability_before=0.2, probability_after=0.8, update_ratios=[0.3, 0.1], share_bare=None),
    ]
    drawn, missing = figures(EditRun(CONDITIONS, records))
    found = {title: (svg, caption) for title, svg, caption in drawn}
    assert missing == ["Perplexity with each edit alone: not measured by an edit; rome-fast study does."]
    assert found["P(target) behind the bare prompt"][1].startswith("Median 0.200 → 0.800.")
    assert found["P(target) behind the editing contexts"][1].startswith("Median 0.030 → 0.880.")
    assert "1 of 2 below 0.4" in found["Share of an edit that arrives without a context"][1]
    norms = found["Size of the updates by layer"]
    assert "The most is 0.300, in layer 3, whose median is 0.100 and least 0.020." in norms[1]
    assert marks(norms[0])[1] == [
        "layer 3: least 0.02, median 0.1, most 0.3, of 3 edits",
        "layer 4: least 0.05, median 0.1, most 0.2, of 3 edits",
    ]
    reading = found["How well the model still reads"]
    # e³ and e^3.25
    assert "perplexity 20.1 → 25.8. It rose by 0.250 nats a token" in reading[1]
    assert marks(reading[0])[1] == ["before: 3 nats", "now: 3.25 nats"]
    assert "2 of 2 have a neighbour above 0.95" in found["Near keys among the edits"][1]
    seconds = found["Where the time went"]
    assert seconds[1] == "63.5 s in all, 21.2 s an edit; wall time."
    assert marks(seconds[0])[1] == ["values: 61.5 s", "keys: 2 s"]


def test_perplexities_are_shown_where_a_run_has_them():
    records = [record(perplexity_before=40.0, perplexity_after=after) for after in (44.0, 42.0, 120.0, None)]
    found = {title: caption for title, _, caption in figures(EditRun(CONDITIONS, records))[0]}
    assert found["Perplexity with each edit alone"] == "Perplexity after / before: median 1.100, most 3.000."


def test_a_run_of_which_little_is_known():
    nothing = dict.fromkeys(
        ("share_bare", "probability_after", "probability_after_prefixed", "argmax_after", "argmax_after_prefixed")
    )
    records = [record(update_ratios=[], applied=False, left_out="loss not finite", **nothing)]
    drawn, missing = figures(EditRun({**CONDITIONS, "seconds": {}, "context_nll": None}, records))
    assert drawn == []
    assert len(missing) == 8
    found = taken_apart(records, seconds={}, context_nll=None)
    assert all(sentence in found.text for sentence in missing)


def test_a_reading_that_is_no_number():
    nll = {"before": 3.0, "after": math.nan, "origin": 2.5, "since_origin": math.inf}
    drawn, _ = figures(EditRun({**CONDITIONS, "context_nll": nll}, [record()]))
    ((svg, caption),) = [(s, c) for title, s, c in drawn if title == "How well the model still reads"]
    assert "perplexity 20.1 → no number" in caption
    assert marks(svg)[1] == ["before: 3 nats", "now: no number", "before all edits: 2.5 nats"]
