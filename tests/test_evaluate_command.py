"""`rome-fast evaluate`: streamed as resident, samples, ages, ledgers, and a kill on the way."""

import json
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import CONTEXTS, END, MIDDLE, SETTINGS, START, edited
from on_disk import forks, killed_after
from rome_fast import Edit, Ledger
from rome_fast.cli import main
from rome_fast.edits import Probe
from rome_fast.errors import ArgumentError, EditError
from rome_fast.evaluation import bootstrap, by_age, evaluate
from rome_fast.evaluation.metrics import EditMetrics
from rome_fast.opening import checkpoints
from rome_fast.updates.delta import Delta
from rome_fast.weights import Stream, Task
from toys import SENTENCES, save_toy, toy_model
from zoo import zoo_model

REQUESTS = [
    replace(
        e,
        target_true="Vienna",
        paraphrase_prompts=("They say that Chicago is near",),
        neighborhood_prompts=("The capital of France is",),
        portability=(Probe("From Rome one flies to", ("Paris", "Rome"), "reversal"),),
        negation_prompts=(f"{e.subject} is not",),
        relation=f"P{i}",
    )
    for i, e in enumerate((START, MIDDLE, END))
]


def line_of(edit):
    """A request as a file has it."""
    values = {name: value for name, value in asdict(edit).items() if value and name != "slot"}
    return json.dumps(values | {"target_new": values.pop("target")}) + "\n"


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.partition("rome-fast: ")[2]


def scores(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path, monkeypatch, empty_cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edits.jsonl").write_text("".join(map(line_of, REQUESTS)))
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES[:3]) + "\n")
    return tmp_path


def least(source):
    """The smallest budget that is accepted."""
    with pytest.raises(ArgumentError, match="memory: got 1 bytes, wanted at least") as caught:
        checkpoints.outline(source, memory=1, identity=True)
    return int(re.search(r"at least ([\d,]+)", str(caught.value))[1].replace(",", ""))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("bloom", None),
        pytest.param("gpt2", torch.float32, marks=pytest.mark.slow),  # as Llama, and seldom asked
    ],
)
def test_streamed_figures_are_those_of_a_resident_model(kind, dtype, place, toy_tokenizers):
    """To the bit, answers included: with a delta, and of an edited checkpoint, whose weights before are in it."""
    model = zoo_model(kind) if dtype is None else toy_model(kind, dtype=dtype)
    tokenizer = toy_tokenizers[True]
    save_toy("model", model, tokenizer, max_shard_size="100KB")
    result = edited(model, tokenizer, REQUESTS, method="dual", layer=None, layers=(0, 1, 2))
    result.delta.save("delta.safetensors")
    result.save("edited", "model")
    usual = ("--edits", "edits.jsonl", "--perplexity", "sentences.txt")
    for name, source in (("delta", ("model", "--delta", "delta.safetensors")), ("edited", ("edited",))):
        run("evaluate", *source, *usual, "--json", f"{name}.json")
        # Beside the edited weights next to nothing is in memory.
        budget = least("model") + sum(2 * model.get_parameter(n).nbytes for n in result.delta.updates)
        run("evaluate", *source, *usual, "--memory", budget, "--json", f"{name}-streamed.json")
        streamed = scores(place / f"{name}-streamed.json")
        assert streamed.pop("streaming")["bytes_read"] > 0
        assert streamed == scores(place / f"{name}.json")
    by_delta, by_checkpoint = scores(place / "delta.json"), scores(place / "edited.json")
    assert by_delta["edits"] == by_checkpoint["edits"]
    assert all(None not in figures.values() for figures in by_delta["edits"])
    assert all(figures["essence_kl"] > 0 for figures in by_delta["edits"])


def test_all_texts_share_the_readings_of_a_streamed_model(place, toy_tokenizers, monkeypatch):
    """Three requests take no more of them than the one with the longest target alone."""
    source = save_toy("model", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")
    unbind, readings = Stream._unbind, []

    def counted(stream, block):
        if block is stream._bound and block.name == "layer 2":
            readings[-1] += 1
        unbind(stream, block)

    monkeypatch.setattr(Stream, "_unbind", counted)
    (place / "one.jsonl").write_text(line_of(REQUESTS[2]))
    for file in ("one.jsonl", "edits.jsonl"):
        readings.append(0)
        run("evaluate", source, "--edits", file, "--memory", least(source), "--json", "scores.json")
    assert readings[1] == readings[0] >= 16


def test_a_failure_of_one_computation_ends_all(place, toy_tokenizers):
    source = save_toy("model", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")
    stream = checkpoints.outline(source, memory=least(source), identity=True).stream()
    ids, ran = torch.tensor([[5, 6, 7]]), []

    def good():
        with torch.no_grad():
            ran.append(stream.model(ids).logits)

    def bad():
        stream.model.get_input_embeddings()(ids)
        stream.take(0)
        raise EditFailed

    class EditFailed(Exception):
        pass

    with pytest.raises(EditFailed):
        stream.in_turn([Task(1, good), Task(1, bad), Task(1, good)], 3)
    stream.in_turn([Task(1, good), Task(1, good)], 1)
    assert torch.equal(ran[-1], ran[-2])
    stream.in_turn([], 1)
    stream.close()


def test_a_sample_and_its_ages(place, toy_tokenizers, capsys):
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    edits = [Edit("The city of {}", name, "Rome", relation=f"P{i % 2}") for i, name in enumerate("abcdefgh")]
    (place / "many.jsonl").write_text("".join(map(line_of, edits)))
    usual = ("evaluate", "model", "--edits", "many.jsonl")
    run(*usual, "--ages", "--json", "all.json")
    printed = capsys.readouterr().out
    assert "figure by age" in printed
    assert "the last" in printed
    found = scores(place / "all.json")
    metrics = [EditMetrics(**each) for each in found["edits"]]
    assert found["ages"] == [group.to_json() for group in by_age(metrics)]
    assert [(age["first"], age["last"]) for age in found["ages"]] == [(1, 1), (2, 3), (4, 4), (5, 6), (7, 8)]
    mean, low, high = bootstrap([m.probability for m in metrics[6:]])
    assert found["ages"][-1]["figures"]["probability"] == {"mean": mean, "low": low, "high": high}
    run(*usual, "--sample", 4, "--json", "some.json")
    some = scores(place / "some.json")
    assert "ages" not in some
    subjects = [figures["subject"] for figures in some["edits"]]
    assert sorted("abcdefgh".index(s) % 2 for s in subjects) == [0, 0, 1, 1]
    by_subject = {figures["subject"]: figures for figures in found["edits"]}
    assert [figures["decoded"] for figures in some["edits"]] == [by_subject[s]["decoded"] for s in subjects]
    for count in (9, 0):
        assert f"sample: got {count} of 8 requests" in fails(capsys, *usual, "--sample", count)


def test_a_ledger_is_measured_in_the_order_of_its_events(place, toy_tokenizers, capsys):
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    save_toy("model", model, tokenizer)
    with_settings = {"statistics": "identity", "contexts": CONTEXTS, "settings": SETTINGS, "guard": "off"}
    ledger = Ledger.create("ledger", model, tokenizer, unconverged="write", layer=1, method="c-rome", **with_settings)
    for edit in (END, START, MIDDLE):
        ledger.add(edit)
    ledger.add(END, tags=["late"])
    ledger.close().save("delta.safetensors")
    run("evaluate", "model", "--ledger", "ledger", "--delta", "delta.safetensors", "--json", "scores.json")
    found = scores(place / "scores.json")
    assert [figures["subject"] for figures in found["edits"]] == [e.subject for e in (END, START, MIDDLE)]
    assert [(age["first"], age["last"]) for age in found["ages"]] == [(1, 1), (2, 2), (3, 3)]
    ledger.compact()
    run("evaluate", "model", "--ledger", "ledger", "--json", "compact.json")
    assert {f["subject"] for f in scores(place / "compact.json")["edits"]} == {e.subject for e in (END, START, MIDDLE)}
    for entry in ledger.entries():
        ledger.remove([entry.id])
    assert "ledger: ledger has no entries to measure" in fails(capsys, "evaluate", "model", "--ledger", "ledger")
    assert "it is no ledger" in fails(capsys, "evaluate", "model", "--ledger", "nowhere")
    both = ("--ledger", "ledger", "--edits", "edits.jsonl")
    assert "edits: wanted --edits FILE or --ledger FOLDER" in fails(capsys, "evaluate", "model", *both)
    assert "edits: wanted --edits FILE or --ledger FOLDER" in fails(capsys, "evaluate", "model")


def test_what_cannot_be_had_under_a_budget_is_said(place, toy_tokenizers, capsys):
    save_toy("model", toy_model("llama"), toy_tokenizers[True])
    usual = ("evaluate", "model", "--edits", "edits.jsonl", "--memory")
    assert "memory: got 'lots'" in fails(capsys, *usual, "lots")
    assert "memory: got 1 bytes, wanted at least" in fails(capsys, *usual, "1")
    assert "tasks: got them with --memory" in fails(capsys, *usual, "1GiB", "--tasks", "arc_easy")
    assert "dtype: got torch.bfloat16 with a budget" in fails(capsys, *usual, "1GiB", "--dtype", "bfloat16")
    # A delta of a weight that no edit changes is not in memory.
    Delta({"lm_head.weight": edited_factors()}).save("odd.safetensors")
    message = fails(capsys, *usual, least("model"), "--delta", "odd.safetensors")
    assert "lm_head.weight is not in memory" in message


def test_a_checkpoint_that_was_trained_after_its_edit_is_measured_without_essence(place, toy_tokenizers, capsys):
    """What its edit overwrote is not what was before the weights that it has."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    save_toy("model", model, tokenizer)
    result = edited(model, tokenizer, REQUESTS[:1], method="dual", layer=None, layers=(0, 1))
    result.save("edited", "model")
    weights = load_file("edited/model.safetensors")
    weights[next(iter(result.delta.updates))] += 1
    save_file(weights, "edited/model.safetensors", {"format": "pt"})
    run("evaluate", "edited", "--edits", "edits.jsonl", "--json", "scores.json")
    assert "essence is left out, as the weights before the edits are not known" in capsys.readouterr().out
    assert [figures["essence_kl"] for figures in scores(place / "scores.json")["edits"]] == [None] * 3


def test_what_strangers_ask(toy_tokenizers):
    """Nothing at all, one request, any script, braces, a subject that is missing from its paraphrase."""
    model, before, tokenizer = toy_model("llama"), toy_model("llama"), toy_tokenizers[True]
    delta = edited(model, tokenizer, REQUESTS[0]).delta
    for nothing in ([], (), iter([])):
        assert evaluate(model, tokenizer, nothing, CONTEXTS, unedited=delta) == []
    assert by_age([]) == []
    odd = [
        Edit("{} is in", "\u65e5\u672c {}", "\u05e2\u05d1\u05e8", paraphrase_prompts=("It is", "\U0001f980")),
        Edit("Where? In {}", " Rome\n", "a\u0301", essence_prompts=("{} \u2028{}",), negation_prompts=("no",)),
    ]
    found = evaluate(model, tokenizer, odd, unedited=delta)
    assert [m.essence_text for m in found] == ["\u65e5\u672c {} is", " Rome\n \u2028 Rome\n"]
    assert all(m.essence_kl >= 0 and m.efficacy is None and m.paraphrase is None for m in found)
    assert [evaluate(model, tokenizer, edit, unedited=delta)[0].essence_before for edit in odd] == [
        m.essence_before for m in evaluate(before, tokenizer, odd, unedited=dict(delta.originals))
    ]
    with pytest.raises(EditError, match="wanted at most the 256 the model attends to"):
        evaluate(model, tokenizer, replace(START, essence_prompts=("word " * 300,)), unedited=delta)
    with pytest.raises(EditError, match="essence_prompts: got str, wanted a tuple or list"):
        replace(START, essence_prompts="Chicago has")
    with pytest.raises(EditError, match=r"negation_prompts\[0\]: got ' '"):
        replace(START, negation_prompts=(" ",))
    with pytest.raises(EditError, match="relation: got int, wanted a string"):
        replace(START, relation=7)


def edited_factors():
    from rome_fast.updates.delta import LowRank
    from toys import HIDDEN, VOCABULARY

    return LowRank(torch.ones(VOCABULARY, 1), torch.ones(1, HIDDEN))


@forks
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_to_the_same_report(place, toy_tokenizers, monkeypatch):
    """Killed at any time, whatever was written; the report is the same to the byte."""
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    monkeypatch.setattr("rome_fast.evaluation.command._TOGETHER", 1)
    usual = ("evaluate", "model", "--edits", "edits.jsonl", "--perplexity", "sentences.txt", "--out")
    run(*usual, "whole")
    for seconds in (0.05, 0.3, 0.6):
        killed_after(lambda: main([*usual, "part"]), seconds)
    run(*usual, "part")
    whole, part = (place / name / "evaluate.json" for name in ("whole", "part"))
    assert part.read_bytes() == whole.read_bytes()
    assert len(os.listdir(place / "part" / "parts")) == len(REQUESTS)
