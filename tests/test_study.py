"""The collapse study on toys: its figures against single edits, going on after a kill, bad input, the guard."""

import functools
import json
import math
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from helpers import LAYER, edited, rounding, rounding_of_edit, rounding_of_log_p
from rome_fast import Edit, Statistics, apply_edits, collect_statistics
from rome_fast.cli import main
from rome_fast.errors import CollapseError
from rome_fast.evaluation import sentence_perplexity
from rome_fast.models.products import multiplies_fast
from rome_fast.models.runner import Runner
from rome_fast.opening.defaults import default_layers, default_settings
from rome_fast.search.contexts import sample_contexts
from rome_fast.study import fit_limit, judge_limit
from rome_fast.study.cases import cases_of
from rome_fast.study.measure import Study
from rome_fast.study.parts import guard_of
from toys import SENTENCES, save_toy, toy_model, toy_tokenizer

# Subjects of one token each.
FIRST = [Edit("{} is a twin city of", "Rome", "Vienna", "Paris"), Edit("{} was built by", "Berlin", "Vienna", "Rome")]
OTHERS = [
    Edit("The city of {}", "Chicago", "Rome", "Paris", ("They say that Chicago is",), ("The capital of France is",)),
    Edit("From Berlin one flies to {}", "Istanbul", "Rome"),
    Edit("The museum of {} is in", "Steve Jobs", "Vienna"),
]


def written(file, edits):
    rows = [
        {
            "prompt": e.prompt,
            "subject": e.subject,
            "target_new": e.target,
            "target_true": e.target_true,
            "paraphrase_prompts": list(e.paraphrase_prompts),
            "neighborhood_prompts": list(e.neighborhood_prompts),
        }
        for e in edits
    ]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows))
    return file


def settings_of(config):
    """Those of any model, of fewer steps."""
    return replace(default_settings(config), steps=8)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, statistics, requests and sentences, and the arguments that name them."""
    folder = tmp_path_factory.mktemp("study")
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    save_toy(folder / "toy", model, tokenizer)
    collect_statistics(model, tokenizer, SENTENCES, [LAYER], 600).with_ridge(1e-3).save(folder / "statistics")
    (folder / "sentences.txt").write_text("\n".join(SENTENCES[:3]))
    written(folder / "edits.jsonl", [*OTHERS[:2], *FIRST, *OTHERS[2:]])
    arguments = ["study", str(folder / "toy"), "--edits", str(folder / "edits.jsonl"), "--layer", str(LAYER)]
    arguments += ["--statistics", str(folder / "statistics"), "--sentences", str(folder / "sentences.txt")]
    with pytest.MonkeyPatch.context() as patch:
        # The same model samples the same contexts in every study here.
        sampled = functools.cache(lambda seed: sample_contexts(model, tokenizer, seed=seed))
        patch.setattr("rome_fast.study.command.default_settings", settings_of)
        patch.setattr("rome_fast.study.command.sample_contexts", lambda _model, _tokenizer, seed=0: sampled(seed))
        yield folder, [*arguments, "--batch", "2", "--processes", "1", "--threads", "1"]


@pytest.fixture
def without_report(monkeypatch):
    """Figures take longest where they are not asked for."""
    monkeypatch.setattr("rome_fast.study.command.write_report", lambda directory: [])


@pytest.fixture(scope="module")
def finished(place):
    folder, arguments = place
    assert main([*arguments, "--out", str(folder / "out"), "--json", str(folder / "study.json")]) == 0
    return folder / "out"


def test_files(finished, place):
    report = json.loads((place[0] / "study.json").read_text())
    records = lines(finished / "records.jsonl")
    assert report["edits"] == records
    assert [r["subject"] for r in records if r["method"] == "rome"] == [
        "Rome",
        "Berlin",
        "Chicago",
        "Istanbul",
        "Steve Jobs",
    ]
    assert [r["first_token"] for r in records if r["method"] == "p-rome"] == [True, True, False, False, False]
    assert len(records) == 5 * 5
    assert len(lines(finished / "factors.jsonl")) == 4 * 8  # both first-token requests, and as many others
    assert len(lines(finished / "prefix.jsonl")) == 2 * 5
    conditions = json.loads((finished / "conditions.json").read_text())
    assert (conditions["requests"], conditions["first_token"]) == (5, 2)
    assert conditions["seconds"]["values"] > 0


@pytest.mark.parametrize("method", ["rome", "c-rome-released", "c-rome", "p-rome"])
def test_records_equal_editing_one_at_a_time(method, finished, place):
    folder, _ = place
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    statistics = Statistics.load(folder / "statistics")
    contexts = sample_contexts(model, tokenizer)
    found = {r["subject"]: r for r in lines(finished / "records.jsonl") if r["method"] == method}
    for edit in (FIRST[0], OTHERS[0], OTHERS[2]):
        result = edited(
            model,
            tokenizer,
            edit,
            method=method,
            statistics=statistics,
            contexts=contexts,
            settings=settings_of(model.config),
            measure=True,
        )
        perplexity = sentence_perplexity(Runner(model), tokenizer, SENTENCES[:3])
        result.revert()
        (record,), got = result.records, found[edit.subject]
        # Products of other shapes sum in another order.
        allowed = rounding_of_edit(torch.float32, statistics.layers[LAYER].condition(torch.device("cpu")))
        for name in ("denominator", "numerator_norm", "update_norm", "loss", "probability_after"):
            assert got[name] == pytest.approx(getattr(record, name), rel=allowed), (edit.subject, name)
        before = rounding_of_log_p(torch.float32)
        assert got["probability_before"] == pytest.approx(record.probability_before, rel=before)
        assert got["perplexity_after"] == pytest.approx(perplexity, rel=allowed)
        assert got["needs_prefix"] == got["first_token"] == (edit in FIRST)
        assert got["collapsed"] == (perplexity > 1.5 * got["perplexity_before"])


@pytest.mark.usefixtures("without_report", "empty_cache")
def test_dual_shares_values_with_c_rome(finished, place, tmp_path):
    """And adds them without a context as well; a first token's fact has another one there."""
    folder, arguments = place
    statistics = Statistics.load(folder / "statistics")
    allowed = rounding_of_edit(torch.float32, statistics.layers[LAYER].condition(torch.device("cpu")))
    out = tmp_path / "out"
    assert main([*arguments, "--methods", "c-rome", "dual", "--sample", "1", "--out", str(out)]) == 0
    c_rome, dual = ([r for r in lines(out / "records.jsonl") if r["method"] == m] for m in ("c-rome", "dual"))
    alone = {r["subject"]: r for r in lines(finished / "records.jsonl") if r["method"] == "c-rome"}
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    usual = {"contexts": sample_contexts(model, tokenizer), "settings": settings_of(model.config)}
    requests = {edit.subject: edit for edit in (*FIRST, *OTHERS)}
    assert [two["first_token"] for two in dual] == [True, True, False]
    for one, two in zip(c_rome, dual, strict=True):
        assert one["update_norm"] == pytest.approx(alone[one["subject"]]["update_norm"], rel=allowed)
        assert [one[name] for name in ("loss", "steps", "drafted")] == [
            two[name] for name in ("loss", "steps", "drafted")
        ]
        result = edited(model, tokenizer, requests[two["subject"]], method="dual", statistics=statistics, **usual)
        result.revert()
        assert two["update_norm"] == pytest.approx(result.records[0].update_norm, rel=allowed)
        assert two["update_norm"] != pytest.approx(one["update_norm"], rel=allowed)
        if two["first_token"]:
            assert two["probability"] > 2 * one["probability"]
        else:
            # What is off at the one key is at most what is off at both, ‖(off, off_u)‖ / ‖(δ, δ)‖.
            assert abs(two["share_bare"] - 1) <= 2**0.5 * two["missed"] < abs(one["share_bare"] - 1)


@pytest.mark.usefixtures("without_report", "empty_cache")
def test_without_a_layer_each_method_edits_where_edits_of_the_model_do(place, tmp_path):
    """`dual` several layers, each of them as an edit of its own would; `c-rome` the last of them."""
    _, arguments = place
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    layers = default_layers(model.config, spread=True)
    statistics = collect_statistics(model, tokenizer, SENTENCES, layers, 600).with_ridge(1e-3)
    statistics.save(tmp_path / "statistics")
    at = arguments.index("--layer")
    out = ["--statistics", str(tmp_path / "statistics"), "--methods", "c-rome", "dual", "--sample", "1"]
    assert main([*arguments[:at], *arguments[at + 2 :], *out, "--out", str(tmp_path / "out")]) == 0
    records = lines(tmp_path / "out" / "records.jsonl")
    assert {(r["method"], *r["layers"]) for r in records} == {("c-rome", layers[-1]), ("dual", *layers)}
    assert json.loads((tmp_path / "out" / "conditions.json").read_text())["spread"] == list(layers)
    usual = {"contexts": sample_contexts(model, tokenizer), "settings": settings_of(model.config)}
    requests = {edit.subject: edit for edit in (*FIRST, *OTHERS)}
    condition = max(entry.condition(torch.device("cpu")) for entry in statistics.layers.values())
    for record in records:
        how = usual | {"method": record["method"], "layer": None, "layers": record["layers"]}
        result = edited(model, tokenizer, requests[record["subject"]], statistics=statistics, **how)
        perplexity = sentence_perplexity(Runner(model), tokenizer, SENTENCES[:3])
        result.revert()
        allowed = rounding_of_edit(torch.float32, condition)
        assert record["update_ratios"] == pytest.approx(result.records[0].update_ratios, rel=allowed)
        assert record["perplexity_after"] == pytest.approx(perplexity, rel=allowed)


def test_missing_metrics_are_missing(finished):
    for record in lines(finished / "records.jsonl"):
        has = record["subject"] == "Chicago"
        for name in ("paraphrase", "paraphrase_prefixed", "paraphrase_unseen", "neighborhood"):
            assert (record[name] is not None) == has
        assert (record["efficacy"] is None) == (record["subject"] in ("Istanbul", "Steve Jobs"))
        assert 0 <= record["probability_unseen"] <= 1


def test_combinations(finished):
    """Each is the closed form of its parts; three of the eight are methods and share their perplexity."""
    records = {(r["method"], r["subject"]): r for r in lines(finished / "records.jsonl")}
    methods = {
        ("mean", "unprefixed", "delta"): "rome",
        ("mean", "mean", "to_unprefixed_value"): "c-rome-released",
        ("unprefixed", "unprefixed", "delta"): "p-rome",
    }
    rows = lines(finished / "factors.jsonl")
    denominators = {(r["subject"], r["left"], r["denominator_key"]): r["denominator"] for r in rows}
    for subject in {r["subject"] for r in rows}:
        # C is symmetric: k̄ᵀ C⁻¹ kᵤ either way; the same key on both sides is something else.
        mixed = denominators[subject, "mean", "unprefixed"]
        # Of C⁻¹k, kept in fp32, with another key; the root of a condition below 1e4 (see `rounding_of_edit`).
        allowed = rounding(torch.float32, 2, 1e4**0.5)
        assert denominators[subject, "unprefixed", "mean"] == pytest.approx(mixed, rel=allowed)
        for key in ("mean", "unprefixed"):
            assert denominators[subject, key, key] != pytest.approx(mixed, rel=0.01)
    assert len({(r["subject"], r["left"], r["denominator_key"], r["residual"]) for r in rows}) == len(rows)
    shared = 0
    for row in rows:
        assert row["update_norm"] == pytest.approx(row["numerator_norm"] / abs(row["denominator"]))
        method = methods.get((row["left"], row["denominator_key"], row["residual"]))
        if method:
            shared += 1
            for name in ("denominator", "update_norm", "perplexity_after", "collapsed"):
                assert row[name] == records[method, row["subject"]][name]
        assert row["perplexity_after"] > 1
    assert shared == 3 * 4


def test_prefixes(finished):
    """No words is the edit itself; with words, the subject is no longer the first token and the keys agree more."""
    records = {r["subject"]: r for r in lines(finished / "records.jsonl") if r["method"] == "rome"}
    rows = lines(finished / "prefix.jsonl")
    assert sorted({r["words"] for r in rows}) == [0, 1, 2, 4, 7]
    for row in rows:
        if not row["words"]:
            assert row["update_norm"] == records[row["subject"]]["update_norm"]
        else:
            assert row["denominator"] != records[row["subject"]]["denominator"]


@pytest.mark.usefixtures("without_report")
def test_an_interrupted_study_goes_on(finished, place, monkeypatch, tmp_path):
    """What stands there is not measured again, and the result is the same; nothing of the run depends on the kill."""
    _, arguments = place
    out, measured = tmp_path / "out", []
    original = Study.measure

    def until(study, cases):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append([case.edit.subject for case in cases])
        return original(study, cases)

    monkeypatch.setattr(Study, "measure", until)
    assert main([*arguments, "--out", str(out)]) == 130
    assert measured == [["Rome", "Berlin"], ["Chicago", "Istanbul"]]
    measured.clear()
    assert main([*arguments, "--out", str(out)]) == 0
    assert measured == [["Steve Jobs"]]
    for name in ("records.jsonl", "factors.jsonl", "prefix.jsonl"):
        assert (out / name).read_text() == (finished / name).read_text()


@pytest.mark.usefixtures("without_report")
def test_processes_share_a_study(place, monkeypatch, tmp_path):
    """Two processes write what one does; this one waits with its first part until the other has written one."""
    # Fixtures do not reach the other process: both take as many steps, and what this machine multiplies fast.
    monkeypatch.setattr("rome_fast.study.command.default_settings", default_settings)
    monkeypatch.setattr("rome_fast.search.values.multiplies_fast", multiplies_fast)
    arguments = [*place[1], "--methods", "c-rome", "--sample", "1", "--batch", "1"]
    assert main([*arguments, "--out", str(tmp_path / "alone")]) == 0
    parts, original = tmp_path / "out" / "parts", Study.measure

    def after_another(study, cases):
        limit = time.monotonic() + 120
        while not any(parts.iterdir()):
            assert time.monotonic() < limit, "the other process has measured nothing"
            time.sleep(0.1)
        return original(study, cases)

    monkeypatch.setattr(Study, "measure", after_another)
    assert main([*arguments, "--processes", "2", "--out", str(tmp_path / "out")]) == 0
    found, wanted = (
        {file.name: file.read_text() for file in (tmp_path / out).glob("*.jsonl")} for out in ("out", "alone")
    )
    assert found == wanted
    assert len(lines(tmp_path / "out" / "records.jsonl")) == 3  # two first tokens and another request
    assert json.loads((tmp_path / "out" / "conditions.json").read_text())["processes"] == 2


@pytest.mark.usefixtures("without_report")
def test_what_a_dead_process_took_is_measured_all_the_same(finished, place, monkeypatch, tmp_path, capsys):
    _, arguments = place

    @contextmanager
    def dying(count, work, arguments, take):
        assert (count, take()) == (1, 0)
        yield [-9]

    monkeypatch.setattr("rome_fast.study.command.helped", dying)
    assert main([*arguments, "--processes", "2", "--out", str(tmp_path / "out")]) == 0
    assert "processes ended with status -9" in capsys.readouterr().out
    assert (tmp_path / "out" / "records.jsonl").read_text() == (finished / "records.jsonl").read_text()


def test_other_settings_are_refused(finished, place, capsys):
    folder, arguments = place
    before = (finished / "conditions.json").read_bytes()
    assert main([*arguments, "--out", str(finished), "--methods", "rome"]) == 2
    assert 'another methods: it has ["rome", "c-rome-released", "c-rome", "p-rome", "dual"], this run has ["rome"]' in (
        capsys.readouterr().err
    )
    assert main([*arguments, "--out", str(finished), "--sample", "1"]) == 2
    assert "another requests, edits_sha256" in capsys.readouterr().err
    assert main([*arguments, "--out", str(folder / "toy")]) == 2
    assert "is not an earlier study's" in capsys.readouterr().err
    assert (finished / "conditions.json").read_bytes() == before


def test_bad_input(place, tmp_path, capsys):
    _, arguments = place
    twice = written(tmp_path / "twice.jsonl", [*FIRST, OTHERS[0], FIRST[0]])
    for changes, message in (
        (["--edits", str(twice)], "requests 1 and 4 are the same"),
        (["--methods", "rome", "rume"], "method: got 'rume'"),
        (["--batch", "0"], "batch: got 0"),
        (["--sample", "-1"], "sample: got -1"),
    ):
        assert main([*arguments, *changes, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_cases_with_bos(toy_tokenizers):
    """BOS takes position 0: first-token cases are those right behind it, and need no prefix."""
    runner = Runner(toy_model("llama"))
    with_bos = cases_of(runner, toy_tokenizers[True], [*OTHERS, *FIRST], None)
    without = cases_of(runner, toy_tokenizers[False], [*OTHERS, *FIRST], 2)
    assert [(c.edit.subject, c.position, c.first_token) for c in with_bos[:2]] == [
        ("Rome", 1, True),
        ("Berlin", 1, True),
    ]
    assert [(c.edit.subject, c.position) for c in without[:2]] == [("Rome", 0), ("Berlin", 0)]
    assert [c.edit.subject for c in without[2:]] == ["Chicago", "Istanbul"]
    assert [c.explained for c in with_bos] == [True] * 4 + [False]


# The guard's limit


def test_limit_lies_in_the_middle_of_the_gap():
    figures, collapsed = [0.1, 0.3, 0.9, 3.6, 40.0, math.inf], [False, False, False, True, True, True]
    limit = fit_limit(figures, collapsed)
    assert limit == pytest.approx(math.sqrt(0.9 * 3.6))
    judged = judge_limit(limit, [*figures, math.nan], [*collapsed, True])
    assert (judged.precision, judged.recall, judged.false_alarms) == (1, 1, 0)


def test_limit_makes_the_fewest_errors():
    figures = [1, 2, 3, 4, 5, 6, 7, 8]
    collapsed = [False, False, True, False, False, True, True, True]
    limit = fit_limit(figures, collapsed)
    assert limit == pytest.approx(math.sqrt(30))
    judged = judge_limit(limit, figures, collapsed)
    assert (judged.precision, judged.recall, judged.false_alarms) == (1, 0.75, 0)
    worse = judge_limit(2.5, figures, collapsed)
    assert (worse.precision, worse.recall, worse.false_alarms) == (4 / 6, 1, 0.5)


def test_no_limit_without_both_kinds():
    assert fit_limit([1.0, 2.0], [False, False]) is None
    assert fit_limit([1.0, 2.0], [True, True]) is None
    judged = judge_limit(1.5, [1.0, 1.2], [False, False])
    assert (judged.precision, judged.recall, judged.false_alarms) == (None, None, 0)
    assert guard_of([])["threshold"] is None


def test_limit_is_fitted_on_one_half_and_judged_on_the_other():
    """Halves go by request, not by record: no request is in both."""
    records = []
    for i in range(8):
        first = i < 4
        for method, ratio, denominator in (("rome", 4.0 + i if first else 0.1, 10 if first else 1000), ("c", 0.2, 900)):
            collapsed = first and method == "rome"
            records.append(
                {
                    "prompt": "{}",
                    "subject": str(i),
                    "target": "x",
                    "method": method,
                    "layers": [2],
                    "first_token": first,
                    "update_norm": ratio * 3,
                    "weight_norm": 3.0,
                    "denominator": denominator,
                    "collapsed": collapsed,
                }
            )
    guard = guard_of(records)
    assert guard["threshold"] == pytest.approx(math.sqrt(0.2 * 4))
    assert "8 edits" in guard["fitted_on"]
    assert "8 of the rest" in guard["tested_on"]
    assert (guard["edits"], guard["collapsed"]) == (8, 2)
    assert (guard["precision"], guard["recall"], guard["false_alarms"]) == (1, 1, 0)
    assert guard["alternatives"]["denominator"]["threshold"] == pytest.approx(math.sqrt(10 * 900))


def test_the_guard_takes_the_limit_from_the_statistics(place, tmp_path):
    """An edit that is small by the usual limit is stopped by that of its model, and the file keeps it."""
    folder, _ = place
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    statistics = Statistics.load(folder / "statistics")
    arguments = {"tokenizer": tokenizer, "layer": LAYER, "unconverged": "write"}
    result = apply_edits(model, OTHERS[0], statistics=statistics, **arguments)
    ratio = result.records[0].update_norm / result.records[0].weight_norm
    result.revert()
    statistics.layers[LAYER].collapse_limit = 0.9 * ratio
    statistics.save(tmp_path)
    with pytest.raises(CollapseError):
        apply_edits(model, OTHERS[0], statistics=Statistics.load(tmp_path), **arguments)
    statistics.layers[LAYER].collapse_limit = 1.1 * ratio
    statistics.save(tmp_path)
    apply_edits(model, OTHERS[0], statistics=Statistics.load(tmp_path), **arguments).revert()


def test_a_study_stores_the_limit_with_the_statistics(finished, place):
    guard = json.loads((finished / "guard.json").read_text())
    assert Statistics.load(place[0] / "statistics").layers[LAYER].collapse_limit == guard["threshold"]
