"""rome-fast tune on toys: what is better, where edits are spent, figures against single edits, the choice used."""

import json
import math
from dataclasses import replace

import pytest

from helpers import CONTEXTS
from rome_fast import Edit, Statistics, ValueSettings, apply_edits, collect_statistics, plan
from rome_fast.cli import main
from rome_fast.closing.geometry import Geometries
from rome_fast.errors import ArgumentError, ModelError, StatisticsError
from rome_fast.evaluation import evaluate, sentence_perplexity
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.opening.defaults import default_layer, select, spread_below
from rome_fast.runs.costs import about, flops_per_second, layer_flops
from rome_fast.runs.parts import Parts
from rome_fast.statistics import Choice, statistics_cache, tuned_choice
from rome_fast.tune import Candidate, Figures, Sweep, compare, halve, rank, rounds, score
from rome_fast.tune.command import candidate_layers
from rome_fast.tune.halving import edits_in
from toys import SENTENCES, save_toy, toy_model, toy_tokenizer

EDITS = [
    Edit("The city of {}", "Chicago", "Rome", "Paris", ("They say that Chicago is",), ("The capital of France is",)),
    Edit("From Berlin one flies to {}", "Istanbul", "Rome", "Vienna", ("One likes Istanbul,",)),
    Edit("The museum of {} is in", "Steve Jobs", "Vienna", "Rome"),
    Edit("The capital of {}", "Vienna", "Paris"),
]


def figures(value=0.5, ratio=1.0, **changes):
    usual = {
        "probability": value,
        "probability_behind": value,
        "argmax": 1.0,
        "efficacy": 1.0,
        "efficacy_behind": 1.0,
        "paraphrase": value,
        "neighborhood": value,
        "perplexity_ratio": ratio,
        "update_ratio": 0.1,
    }
    return Figures(**(usual | changes))


def test_a_score_is_the_mean_of_the_figures_that_a_request_has():
    assert figures(0.8, neighborhood=0.0).score == pytest.approx(0.6)
    assert figures(0.8, paraphrase=None, neighborhood=None, probability=0.4).score == pytest.approx(0.6)
    assert score([figures(0.2), figures(0.6)]) == pytest.approx(0.4)


def test_the_perplexity_limit_comes_before_the_score():
    good, harmful, worse = [figures(0.3, 1.005)], [figures(0.9, 1.02)], [figures(0.99, 1.5)]
    broken = [figures(0.99, math.nan)]
    ranks = [rank(f, limit=1.01) for f in (good, harmful, worse)]
    assert ranks == sorted(ranks, reverse=True)
    assert rank(broken)[0] is False
    # One request may cost more where the mean keeps to the limit.
    assert rank([figures(0.5, 1.02), figures(0.5, 0.99)], limit=1.01) == (True, 0.5)


def test_a_difference_is_told_apart_where_every_request_agrees():
    better, other = [figures(0.1 * i + 0.05) for i in range(8)], [figures(0.1 * i) for i in range(8)]
    found = compare(better, other)
    assert [found.mean, found.low, found.high] == pytest.approx([0.05] * 3)
    assert found.told_apart
    # The interval of a mean of n numbers of deviation s: about 1.96 s / sqrt(n), here s = 0.1 and n = 100.
    noisy = [figures(0.5 + 0.1 * (-1) ** i) for i in range(100)]
    found = compare(noisy, [figures(0.5)] * 100)
    assert not found.told_apart
    assert found.mean == pytest.approx(0)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 / 10, rel=0.1)


def test_halving_spends_requests_on_the_better_half():
    candidates = [Candidate(layer, 1.0, 4.0) for layer in range(12)]
    asked = []

    def measure(candidate, start, stop):
        asked.append((candidate.layer, start, stop))
        # The higher the layer the better, to 10; the last one hurts the model.
        return [figures(candidate.layer / 20, 1.5 if candidate.layer == 11 else 1.0)] * (stop - start)

    found = halve(candidates, 16, measure, keep=candidates[2])
    assert rounds(12, 16) == [(12, 4), (6, 8), (3, 16)]
    assert [c.layer for c in found.candidates][:4] == [10, 9, 8, 2]
    assert [c.layer for c in found.finalists] == [10, 9, 8, 2]
    assert [len(found.figures[c]) for c in candidates] == [4, 4, 16, 4, 4, 8, 8, 8, 16, 16, 16, 4]
    assert found.candidates[-1].layer == 11
    assert sum(stop - start for _, start, stop in asked) == edits_in(12, 16) == 12 * 4 + 7 * 4 + 4 * 8
    assert [layer for layer, start, _ in asked if start == 4] == [2, 5, 6, 7, 8, 9, 10]


def test_halving_of_few():
    only = Candidate(3, 1.0, 4.0)
    found = halve([only], 1, lambda candidate, start, stop: [figures()] * (stop - start), keep=only)
    assert (found.best, found.finalists, edits_in(1, 1)) == (only, [only], 1)
    assert rounds(2, 3) == [(2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("count", "default", "layers"),
    [
        (30, 9, [*range(3, 15)]),
        (32, 5, [3, 5, 7, 9, 11, 13, 15]),
        (48, 17, [5, 7, 9, 11, 13, 15, 17, 19, 21, 23]),
        (80, 14, [8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38]),
        (4, 1, [0, 1]),
        (1, 0, [0]),
    ],
)
def test_layers_that_are_tried(count, default, layers):
    assert candidate_layers(count, default) == layers


def test_figures_equal_editing_one_at_a_time(tmp_path, toy_statistics):
    """Of both layers and of settings that differ, against the edited model itself."""
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    runner, sentences = Runner(model), list(SENTENCES[:3])
    unseen = ("It was late. ", "He said that. ")
    base = ValueSettings(steps=6, stop="loss", compute_dtype="float32")
    perplexity = sentence_perplexity(runner, tokenizer, sentences)
    of_layer = {layer: toy_statistics(model, False, layer) for layer in (1, 2)}
    sweep = Sweep(
        model,
        tokenizer,
        EDITS,
        "c-rome",
        base,
        lambda layer: Geometries(runner, (layer,), of_layer[layer])[layer],
        CONTEXTS,
        unseen,
        sentences,
        perplexity,
        Parts(tmp_path / "tune", "tune", {}),
        lambda done: None,
    )
    for candidate in (Candidate(1, 0.5, 4.0), Candidate(2, 20.0, 1.0)):
        found = sweep.measure(candidate, 1, 4)
        for edit, one in zip(EDITS[1:4], found, strict=True):
            result = apply_edits(
                model,
                edit,
                method="c-rome",
                tokenizer=tokenizer,
                statistics=of_layer[candidate.layer],
                layer=candidate.layer,
                contexts=CONTEXTS,
                settings=replace(base, weight_decay=candidate.weight_decay, clamp=candidate.clamp),
                guard="off",
                unconverged="write",
                measure=False,
            )
            (wanted,) = evaluate(model, tokenizer, [edit], unseen_contexts=unseen)
            ratio = sentence_perplexity(runner, tokenizer, sentences) / perplexity
            result.revert()
            # δ itself is found in other batches: fp32 rounding, amplified by six steps of Adam.
            assert one.probability == pytest.approx(wanted.probability, rel=1e-3)
            assert one.probability_behind == pytest.approx(wanted.probability_unseen, rel=1e-3)
            assert one.perplexity_ratio == pytest.approx(ratio, rel=1e-4)
            assert (one.efficacy, one.paraphrase) == (wanted.efficacy, wanted.paraphrase)
            assert one.neighborhood == wanted.neighborhood
            record = result.records[0]
            assert one.update_ratio == pytest.approx(record.update_norm / record.weight_norm, rel=1e-3)


def test_costs_are_those_of_the_weights():
    runner = Runner(toy_model("llama"))
    # Query and output 48 x 48, key and value 48 x 24, three MLP matrices of 48 x 80.
    assert layer_flops(runner) == 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80)
    assert flops_per_second(runner) > 0
    assert [about(s) for s in (0.2, 45.4, 123, 3000, 7322)] == ["0:00:01", "0:00:45", "0:02:00", "0:50:00", "2:02:00"]


def test_layers_that_cannot_be_edited_are_not_tried(place, monkeypatch, capsys):
    """As in models some of whose layers have routed experts only: the default goes to the nearest of the others."""
    weight = Runner.weight

    def weight_of_some(self, layer):
        if layer == 1:
            raise ModelError("layer 1 has routed experts only")
        return weight(self, layer)

    monkeypatch.setattr(Runner, "weight", weight_of_some)
    assert main(arguments(place, "--layers", "1")) == 2
    assert "layers: got 1, wanted some of 0, 2, 3" in capsys.readouterr().err
    report = tuned(place, "--layers", "2")
    assert sorted(row["layer"] for row in report["layers"]) == [0, 2]
    assert report["default"]["layer"] == 0


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


@pytest.fixture
def place(tmp_path, empty_cache, monkeypatch):
    """A checkpoint, requests, text and sentences, and the arguments that name them."""
    save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizer(False))
    written(tmp_path / "edits.jsonl", EDITS)
    (tmp_path / "text.txt").write_text("\n\n".join(SENTENCES))
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES[:2]))
    settings = ValueSettings(steps=4, compute_dtype="float32")
    monkeypatch.setattr("rome_fast.opening.defaults._LLAMA", settings)
    monkeypatch.setattr(
        "rome_fast.tune.command.sample_contexts",
        lambda model, tokenizer, seed=0: CONTEXTS if not seed else ("It was late. ",),
    )
    return tmp_path


def arguments(place, *more):
    command = ["tune", str(place / "toy"), "--edits", str(place / "edits.jsonl"), "--corpus", str(place / "text.txt")]
    command += ["--tokens", "600", "--sentences", str(place / "sentences.txt"), "--out", str(place / "out")]
    return [*command, "--layers", "1", "2", "--perplexity-limit", "10", "--weight-decay", "0.5", *more]


def tuned(place, *more):
    report = place / "report.json"
    assert main(arguments(place, "--json", str(report), *more)) == 0
    return json.loads(report.read_text())


def without_times(report):
    return {key: value for key, value in report.items() if "seconds" not in key}


def edit(model, **changes):
    usual = {
        "tokenizer": toy_tokenizer(False),
        "contexts": CONTEXTS,
        "guard": "off",
        "unconverged": "write",
        "measure": False,
    }
    return apply_edits(model, EDITS[0], **(usual | changes))


def test_the_choice_is_kept_and_used_by_later_edits(place, capsys):
    report = tuned(place)
    said = capsys.readouterr().out
    choice = report["choice"]
    assert "statistics of 2 layers in one pass first" in said
    assert f"chosen: layer {choice['layer']}, weight decay {choice['weight_decay']:g}" in said
    layers = {row["layer"]: row["score"] for row in report["layers"]}
    assert layers[choice["layer"]] == max(layers.values())
    assert choice["score"] >= report["default"]["score"]
    (folder,) = statistics_cache().iterdir()
    # Edits are spread over the layers below, of which 0 is none of those that were tried.
    assert (choice["layer"] == 1) == ("edits are spread over layers 0, 1: statistics of 0 as well" in said)
    own = {f"layer-{layer}.safetensors" for layer in (1, 2, *spread_below(choice["layer"]))}
    assert {file.name for file in folder.iterdir()} == own | {"tuned.json"}

    assert main(["statistics", "--list"]) == 0
    assert f"tuned: layer {choice['layer']}, weight decay {choice['weight_decay']:g}" in capsys.readouterr().out

    # Whatever the choice is, another one shows that it is what is used.
    kept = Choice.load(folder)
    other = {1: 2, 2: 1}[default_layer(toy_model("llama").config)]
    others = replace(kept.settings, steps=3, weight_decay=7.0)
    replace(kept, layer=other, fingerprint=_fingerprint(other), settings=others).save(folder)
    model = toy_model("llama")
    result = edit(model)
    assert (result.records[0].layer, result.layer_source, result.settings.steps) == (other, "tune", 3)
    assert result.records[0].layers == list(spread_below(other))
    assert result.report()["layer_source"] == "tune"
    result.revert()
    # What is given always wins.
    given = edit(model, layer=other, settings=ValueSettings(steps=2))
    assert (given.layer_source, given.settings.steps) == ("given", 2)
    given.revert()
    in_part = edit(model, settings={"steps": 2})
    assert (in_part.records[0].layer, in_part.settings) == (other, replace(others, steps=2))
    in_part.revert()
    elsewhere = edit(model, layer=3 - other)
    assert (elsewhere.records[0].layer, elsewhere.settings) == (3 - other, select(model.config).settings)
    elsewhere.revert()
    # On disk, whole and under the least budget: the layer has to be known before the weights are.
    requests = str(place / "edits.jsonl")
    command = ["edit", str(place / "toy"), "--edits", requests, "--guard", "off", "--unconverged", "write"]
    assert main([*command, "--out", str(place / "edited")]) == 0
    listed = ", ".join(map(str, spread_below(other)))
    assert f"layers {listed}: chosen by rome-fast tune" in capsys.readouterr().out
    assert plan(place / "toy", EDITS, contexts=CONTEXTS).layers == spread_below(other)
    streamed = edit(place / "toy", out=place / "streamed", memory=_least(place / "toy", spread_below(other)))
    assert (streamed.records[0].layers, streamed.layer_source) == (list(spread_below(other)), "tune")


def _fingerprint(layer, seed=0):
    return Fingerprint.of(Runner(toy_model("llama", seed=seed)), layer)


def _least(source, layer):
    with pytest.raises(ArgumentError, match="wanted at least") as caught:
        checkpoints.outline(source, memory=1, layer=layer)
    return int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))


def test_a_choice_of_another_model_of_the_same_sizes_is_not_used(place):
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    usual = default_layer(model.config)
    other = {1: 2, 2: 1}[usual]
    folder = statistics_cache() / "stranger"
    collect_statistics(model, tokenizer, SENTENCES, [0, 1, 2], 600, out=statistics_cache() / "toy")
    choice = Choice(other, ValueSettings(steps=3), _fingerprint(other, seed=1), "2030-01-01T00:00:00+00:00")
    choice.save(folder)
    for result in (
        edit(model),
        edit(place / "toy", out=place / "whole"),
        edit(
            place / "toy",
            out=place / "streamed",
            memory=max(_least(place / "toy", spread_below(layer)) for layer in (1, 2)),
        ),
    ):
        assert (result.records[0].layers, result.layer_source) == (list(spread_below(usual)), "depth rule")
        assert result.settings.steps == 4


def test_the_last_of_several_choices_counts_and_damaged_ones_do_not(empty_cache):
    runner = Runner(toy_model("llama"))
    for name, layer, made in (("a", 2, "2026-02-01"), ("b", 1, "2026-03-01"), ("c", 3, "2026-01-01")):
        Choice(layer, ValueSettings(), _fingerprint(layer), made).save(statistics_cache() / name)
    (statistics_cache() / "d").mkdir()
    (statistics_cache() / "d" / "tuned.json").write_text("{")
    assert tuned_choice(runner, None).layer == 1
    with pytest.raises(StatisticsError, match=r"tuned.json is no choice of rome-fast tune .* run rome-fast tune again"):
        Choice.load(statistics_cache() / "d")


def test_statistics_carry_their_choice(tmp_path, toy_statistics, empty_cache):
    """From folder to folder, and over a ridge; one that is given to an edit decides, not the cache."""
    model = toy_model("llama")
    statistics = Statistics(toy_statistics(model, False, layer).layers[layer] for layer in (1, 2))
    statistics.choice = Choice(2, ValueSettings(steps=3, clamp=2.5), _fingerprint(2), "2026-01-01", {"score": 0.5})
    statistics.with_ridge(1e-3).save(tmp_path)
    loaded = Statistics.load(tmp_path)
    assert loaded.choice.figures == {"score": 0.5}
    assert loaded.choice.settings == ValueSettings(steps=3, clamp=2.5)
    assert sorted(Statistics.load(tmp_path, [0, 2]).layers) == [2]
    result = edit(model, statistics=loaded)
    assert (result.records[0].layer, result.layer_source, result.settings.clamp) == (2, "tune", 2.5)


def test_an_interrupted_run_goes_on_to_the_same_result(place, monkeypatch):
    undisturbed = tuned(place)
    (place / "out").rename(place / "first")
    keep, kept = Parts.keep, []

    def dying(self, name, value):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(name)
        return keep(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "keep", dying)
        assert main(arguments(place)) == 130
    assert len(list((place / "out" / "parts").iterdir())) == 3
    measured = []
    sweep_edit = Sweep._edit
    monkeypatch.setattr(Sweep, "_edit", lambda self, c, edits: measured.append(c) or sweep_edit(self, c, edits))
    again = tuned(place)
    assert without_times(again) == without_times(undisturbed)
    assert len(measured) == len(list((place / "out" / "parts").iterdir())) - 3
    del measured[:]
    assert without_times(tuned(place)) == without_times(undisturbed)
    assert not measured


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "4"], "layers: got 4, wanted some of 0 .. 3"),
        (["--count", "0"], "count: got 0, wanted at least 1"),
        (["--method", "dual"], "method: got 'dual', wanted one without keys of first tokens"),
        (["--clamp", "-1"], "clamp: got [-1.0], wanted numbers from 0 on"),
        (["--perplexity-limit", "0"], "perplexity_limit: got 0.0, wanted a ratio above 0"),
        (["--edits", "none.jsonl"], "cannot read the edits file none.jsonl"),
    ],
)
def test_bad_arguments(place, capsys, more, message):
    assert main(arguments(place, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()


def test_statistics_that_are_missing_are_named_before_anything_runs(place, capsys):
    command = [a for a in arguments(place) if a not in ("--corpus", str(place / "text.txt"))]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "none for layers 1 2" in said
    assert f"rome-fast statistics {place / 'toy'} --corpus FILE --layers 1 2" in said


def test_another_run_does_not_go_into_the_same_folder(place, capsys):
    tuned(place)
    assert main(arguments(place, "--count", "2")) == 2
    assert "is of a run of rome-fast tune with other requests, edits_sha256" in capsys.readouterr().err


def test_an_edit_of_a_model_without_a_published_layer_says_so(place, capsys):
    collect_statistics(toy_model("llama"), toy_tokenizer(False), SENTENCES, tokens=600, out=statistics_cache() / "toy")
    command = ["edit", str(place / "toy"), "--edits", str(place / "edits.jsonl"), "--unconverged", "write"]
    assert main([*command, "--guard", "off", "--out", str(place / "edited"), "--json", str(place / "edit.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "layers 0, 1: by its depth alone, since none is published for this model; find its own with: rome-fast tune"
        in said
    )
    assert json.loads((place / "edit.json").read_text())["layer_source"] == "depth rule"
