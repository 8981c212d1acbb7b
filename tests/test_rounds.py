"""Values searched again with the update in the model, against the oracle and against the parts they are made of."""

import json
from dataclasses import replace

import pytest
import torch

import oracle
from helpers import (
    CONTEXTS,
    END,
    LAYER,
    MIDDLE,
    SETTINGS,
    START,
    all_bits,
    changed,
    delta_w,
    edited,
    relative_error,
    rounding_of_edit,
)
from rome_fast import Edit, apply_edits, plan
from rome_fast.cli import main
from rome_fast.closing.flow import Flow
from rome_fast.closing.geometry import Geometries
from rome_fast.closing.rebasing import rebased
from rome_fast.errors import ArgumentError, CollapseError
from rome_fast.methods import METHODS
from rome_fast.models.runner import Runner
from rome_fast.search import search
from rome_fast.search.requests import tokenise
from toys import save_toy, toy_model

FP64 = torch.float64
SPREAD = {"method": "dual", "layer": None, "layers": (0, 1, 2)}
FACTS = (START, Edit("The museum of {}", START.subject, "Paris"), Edit("{} lies on", START.subject, "Rome"))

pytestmark = [
    pytest.mark.usefixtures("empty_cache"),
    # Few edits of a toy are met but in part.
    pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning"),
]


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_rounds_are_those_of_the_textbook(kind, bos, rounds, toy_tokenizers, toy_statistics, toy_moment):
    """At one layer: what the update so far adds at k̄, and the δ that is found with it in the weights."""
    tokenizer, edits = toy_tokenizers[bos], (MIDDLE, END)
    moment = toy_moment(kind, bos, LAYER)[0]
    wanted = None
    for _ in range(rounds):
        model = oracle.double_copy(toy_model(kind))
        if wanted is not None:
            oracle.add_to_weight(model, LAYER, wanted)
        found = [
            oracle.rome(
                model,
                tokenizer,
                edit.prompt,
                edit.subject,
                edit.target,
                layer=LAYER,
                method="c-rome",
                contexts=CONTEXTS,
                second_moment=moment,
                steps=SETTINGS.steps,
                stop_loss=SETTINGS.stop_loss,
            )
            for edit in edits
        ]
        if wanted is not None:
            found = [replace(one, residual=wanted @ one.k_mean + one.residual) for one in found]
        wanted = oracle.joint(found, moment)
    model = toy_model(kind, dtype=FP64)
    statistics = toy_statistics(model, bos)
    result = edited(model, tokenizer, edits, statistics=statistics, rounds=rounds)
    condition = float(torch.linalg.cond(moment.double()))
    assert relative_error(delta_w(result), wanted) < rounds * rounding_of_edit(FP64, condition)
    result.revert()
    once = edited(model, tokenizer, edits, statistics=statistics)
    assert relative_error(delta_w(once), wanted) > 0.01


def parts_of(model, tokenizer, edits, layers):
    """A flow and its requests, as of an edit by `dual`."""
    runner, method = Runner(model), METHODS["dual"]
    flow = Flow.measuring(runner, tokenizer, method, Geometries(runner, layers, None), CONTEXTS, SETTINGS)
    return flow, [tokenise(runner, tokenizer, edit, CONTEXTS, method) for edit in edits]


def shortened(solved):
    """Of which all, not `reach` times as much, is asked for."""
    return replace(solved, value=replace(solved.value, delta=solved.value.delta / METHODS["dual"].reach))


def bytes_of(delta):
    return {name: (update.left.tolist(), update.right.tolist()) for name, update in delta.updates.items()}


@pytest.mark.parametrize("schedule", ["joint", "sequential"])
def test_a_second_round_of_several_layers(schedule, toy_tokenizers, monkeypatch):
    """A search with the update in the model, brought back; the subject of the first edit is a first token."""
    monkeypatch.setattr("rome_fast.editor.first_token_statistics", lambda *_: {})
    tokenizer, edits, calls = toy_tokenizers[False], (START, MIDDLE, END), []
    model = toy_model("llama")
    result = edited(
        model,
        tokenizer,
        edits,
        **SPREAD,
        schedule=schedule,
        batch_size=3,
        rounds=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    other = toy_model("llama")
    flow, requests = parts_of(other, tokenizer, edits, (0, 1, 2))
    solved = flow.search.find(requests)
    update = flow.closing.delta(flow.closing.close(solved, flow.search))
    update.apply(other)
    more = flow.search.find(requests, merge=False)
    update.revert(other)
    moved = [shortened(each) for each in rebased(flow.runner, flow.search, more, update)]
    wanted = flow.closing.close(moved, flow.search)
    assert bytes_of(result.delta) == bytes_of(flow.closing.delta(wanted))
    assert bytes_of(result.delta) != bytes_of(update)
    assert calls[-1] == (6, 6)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert result.delta.report["rounds"] == 2
    assert changed(model, all_bits(other))
    result.revert()
    assert not changed(model, all_bits(other))


@pytest.mark.parametrize("bos", [True, False])
def test_facts_of_one_subject_still_share_a_value(bos, toy_tokenizers, monkeypatch):
    """The mean of what a value of the second round becomes for each of them."""
    flow, requests = parts_of(toy_model("llama"), toy_tokenizers[bos], (MIDDLE, *FACTS), (0, 1, 2))
    find = flow.search._find_all

    def led(each):
        # In toys no target ever leads, and what is not found together is searched apart.
        return replace(each, value=replace(each.value, led=1.0), bare=each.bare and led(each.bare))

    monkeypatch.setattr(flow.search, "_find_all", lambda group: [[led(one) for one in found] for found in find(group)])
    solved = flow.find(requests)
    before, parts = all_bits(flow.runner.model), []

    def kept(*given):
        parts.append(rebased(*given))
        return list(parts[-1])

    monkeypatch.setattr("rome_fast.closing.flow.rebased", kept)
    (other, *shared), (found,) = flow.find_again(requests, solved), parts
    alone, *moved = map(shortened, found)
    assert not changed(flow.runner.model, before)
    assert torch.equal(other.value.delta, alone.value.delta)
    assert not torch.equal(moved[0].value.delta, moved[1].value.delta)
    mean = torch.stack([each.value.delta for each in moved]).mean(0)
    assert all(torch.equal(each.value.delta, mean) for each in shared)
    # A first token's own value is that of the first round.
    assert [each.bare is None for each in shared] == [bos, True, bos]
    assert all(new.bare is old.bare for new, old in zip(shared, solved[1:], strict=True))
    assert flow.search.done == 8


@pytest.mark.parametrize("what", ["nothing is found", "found before", "not a number"])
def test_a_value_stays_where_none_is_found_on_top_of_it(what, toy_tokenizers, monkeypatch):
    flow, requests = parts_of(toy_model("llama"), toy_tokenizers[True], (MIDDLE, END), (0, 1, 2))
    solved = [replace(each, value=replace(each.value, led=1.0)) for each in flow.find(requests)]
    led, finite = {"nothing is found": (0.2, True), "found before": (1.0, True), "not a number": (1.0, False)}[what]
    find = flow.search.find

    def found(group, **options):
        return [replace(each, value=replace(each.value, led=led, finite=finite)) for each in find(group, **options)]

    monkeypatch.setattr(flow.search, "find", found)
    again = flow.find_again(requests, solved)
    kept = [torch.equal(a.value.delta, b.value.delta) for a, b in zip(solved, again, strict=True)]
    assert kept == [what != "found before"] * 2


def test_no_round_with_an_update_that_collapses_the_model(toy_tokenizers, monkeypatch):
    searched = []
    find = search.Search.find
    monkeypatch.setattr(search.Search, "find", lambda *a, **k: searched.append(1) or find(*a, **k))
    monkeypatch.setattr("rome_fast.closing.guard.UPDATE_RATIO_LIMIT", 1e-6)
    model = toy_model("llama")
    before = all_bits(model)
    with pytest.raises(CollapseError):
        edited(model, toy_tokenizers[True], MIDDLE, rounds=3, guard="raise")
    assert searched == [1]
    assert not changed(model, before)


def test_a_round_that_fails_leaves_the_model(toy_tokenizers, monkeypatch):
    """In the middle of it, with the update of the first one in the weights."""
    find, calls = search.Search.find, []

    def failing(self, group, **options):
        calls.append(1)
        if len(calls) == 4:
            assert changed(model, before)
            raise KeyboardInterrupt
        return find(self, group, **options)

    monkeypatch.setattr(search.Search, "find", failing)
    model = toy_model("llama", dtype=torch.bfloat16)
    before = all_bits(model)
    with pytest.raises(KeyboardInterrupt):
        edited(model, toy_tokenizers[True], (MIDDLE, END), **SPREAD, schedule="sequential", rounds=2)
    assert not changed(model, before)
    assert edited(model, toy_tokenizers[True], MIDDLE).delta.is_applied


@pytest.mark.parametrize("rounds", [0, -1, 1.0, True, "2", None])
def test_no_number_of_rounds(rounds, toy_tokenizers, tmp_path):
    source = save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[True])
    for ask in (
        lambda: edited(toy_model("llama"), toy_tokenizers[True], MIDDLE, rounds=rounds),
        lambda: plan(source, MIDDLE, statistics="identity", rounds=rounds),
    ):
        with pytest.raises(ArgumentError, match=r"rounds: got .*, wanted at least 1, a whole number"):
            ask()


def test_a_checkpoint(toy_tokenizers, tmp_path, monkeypatch, capsys):
    """By the command line as by the call; of one that is read while it runs, a round alone."""
    monkeypatch.chdir(tmp_path)
    save_toy(tmp_path / "model", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")
    usual = {"statistics": "identity", "layer": LAYER, "contexts": CONTEXTS, "unconverged": "write", "guard": "off"}
    result = apply_edits("model", MIDDLE, out="called", method="c-rome", rounds=2, **usual)
    contexts = tmp_path / "contexts.json"
    contexts.write_text(json.dumps(CONTEXTS))
    request = {"prompt": MIDDLE.prompt, "subject": MIDDLE.subject, "target_new": MIDDLE.target}
    (tmp_path / "edits.jsonl").write_text(json.dumps(request) + "\n")
    command = ["edit", "model", "--edits", "edits.jsonl", "--identity", "--layer", str(LAYER), "--method", "c-rome"]
    command += ["--contexts", "contexts.json", "--unconverged", "write", "--guard", "off"]
    assert main([*command, "--rounds", "2", "--out", "commanded", "--json", "report.json"]) == 0
    for file in (tmp_path / "called").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "commanded" / file.name).read_bytes()
    assert result.rounds == 2
    assert '"rounds": 2' in (tmp_path / "report.json").read_text()
    for ask in (
        lambda: apply_edits("model", MIDDLE, out="streamed", memory=220_000, rounds=2, **usual),
        lambda: plan("model", MIDDLE, memory=220_000, rounds=2, statistics="identity", layer=LAYER),
    ):
        monkeypatch.setattr("rome_fast.opening.checkpoints.anonymous_bytes", lambda: 0)
        with pytest.raises(ArgumentError, match="rounds: got 2 for a model whose weights are read while it runs"):
            ask()
    assert not (tmp_path / "streamed").exists()
    one, two = (plan("model", MIDDLE, rounds=rounds, statistics="identity", layer=LAYER) for rounds in (1, 2))
    assert one.closing_columns == two.closing_columns
