"""The verbs of the command line on a saved toy, run in this process."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from commands import EDIT, FEW, USUAL, fails, files, read, run
from helpers import FORWARD, LAYER, all_bits, changed, relative_error, rounding
from rome_fast import Statistics, apply_edits, load_edits, methods
from rome_fast.cli import main
from rome_fast.cli.shared import METHODS
from rome_fast.evaluation import UNSEEN, distractors, evaluate, sentence_perplexity, summarise
from rome_fast.evaluation.metrics import measure
from rome_fast.models.runner import Runner
from toys import D_FF, SENTENCES, save_toy, toy_model


def test_from_statistics_to_revert(toy, capsys):
    """The whole way, each step checked against the same step in Python."""
    original = files(toy / "model")
    run("statistics", "model", "--corpus", "corpus.txt", "--tokens", 600, "--out", "stats", "--json", "stats.json")
    collected = read(toy / "stats.json")
    statistics = Statistics.load(toy / "stats")
    conditions = {str(layer): entry.condition(torch.device("cpu")) for layer, entry in statistics.layers.items()}
    assert collected.pop("conditions") == pytest.approx(conditions)
    assert collected == {"model": "model", "layers": list(USUAL), "tokens": 600, "ridge": 0.0, "out": "stats"}
    assert "600 tokens, 7.5 per dimension of the keys" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    texts, left = [], 600
    for sentence in SENTENCES:
        ids = tokenizer(sentence)["input_ids"][:left]
        left -= len(ids)
        texts += [tokenizer.decode(ids)] if ids else []
    for layer in USUAL:
        wanted, count = oracle.second_moment(model, tokenizer, texts, layer, 512)
        assert count == 600
        assert relative_error(statistics.layers[layer].moment, wanted) < 2 * rounding(torch.float32, FORWARD / 2)

    run(
        *("edit", "model", "--edits", "edits.jsonl", "--statistics", "stats", "--out", "edited"),
        *("--seed", 4, "--guard", "off", "--json", "edit.json"),
    )
    captured = capsys.readouterr()
    assert "Chicago" in captured.out
    assert "undo with: rome-fast revert edited" in captured.out
    assert "layers 0, 1: by its depth alone" in captured.out
    result = apply_edits(
        model, load_edits("edits.jsonl"), tokenizer=tokenizer, statistics=statistics, seed=4, guard="off"
    )
    assert changed(AutoModelForCausalLM.from_pretrained("edited"), all_bits(model)) == []
    report = read(toy / "edit.json")
    assert report["edits"] == [record.to_json() for record in result.records]
    assert report["contexts"] == list(result.contexts)
    assert {"model", "method", "layer", "schedule", "seconds"} <= report.keys()
    assert (report["method"], report["layers"]) == ("dual", list(USUAL))
    nll = result.context_nll
    assert f"mean NLL of the contexts: {nll.before:.3f} → {nll.after:.3f} nats a token\n" in captured.out
    least, most = sorted(f"{ratio:.2f}" for ratio in result.records[0].update_ratios)
    assert f" {least} – {most} " in captured.out
    assert files(toy / "model") == original

    run("evaluate", "edited", "--edits", "edits.jsonl", "--perplexity", "sentences.txt", "--json", "scores.json")
    scores = read(toy / "scores.json")
    edits = load_edits("edits.jsonl")
    behind = {"unseen_contexts": UNSEEN, "distracting": distractors(edits)}
    metrics = evaluate(model, tokenizer, edits, result.contexts, **behind, unedited=result.delta)
    assert metrics[0].essence_kl > 0
    assert scores["edits"] == [m.to_json() for m in metrics]
    assert scores["summary"] == pytest.approx(summarise(metrics))
    perplexity = sentence_perplexity(Runner(model), tokenizer, SENTENCES[:3])
    assert scores["perplexity"] == pytest.approx(perplexity)
    assert f"perplexity {perplexity:.2f}" in capsys.readouterr().out

    # The same figures from the model and the delta, which knows its contexts.
    delta = "edited/rome_fast/0001/delta.safetensors"
    run("evaluate", "model", "--edits", "edits.jsonl", "--delta", delta, "--json", "delta.json")
    assert read(toy / "delta.json")["edits"] == scores["edits"]

    run("revert", "edited", "--json", "revert.json")
    assert read(toy / "revert.json") == {
        "directory": "edited",
        "restored": [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in USUAL],
        "edits_left": 0,
    }
    assert files(toy / "edited") == original


def test_statistics_go_to_the_cache_where_edit_finds_them(toy, empty_cache):
    run("statistics", "model", "--corpus", "corpus.txt", "--layers", 0, 1)
    (folder,) = (empty_cache / "statistics").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]
    # Ten per dimension by default, or all there are.
    assert Statistics.load(folder).layers[0].tokens == min(10 * D_FF, 929)
    run("edit", "model", "--edits", "edits.jsonl", "--out", "edited", "--layer", 0, "--guard", "off")
    assert read(toy / "edited/rome_fast/0001/record.json")["layer"] == 0


def test_two_models_of_one_folder_name_do_not_share_statistics(toy, toy_tokenizers, empty_cache):
    """The second one replaced the first one's."""
    save_toy("other/model", toy_model("gpt2", seed=1), toy_tokenizers[False])
    for model in ("model", "other/model"):
        run("statistics", model, "--corpus", "corpus.txt", "--tokens", 600)
    for model in ("model", "other/model"):
        runner = Runner(AutoModelForCausalLM.from_pretrained(model))
        assert Statistics.cached(runner, [LAYER]).layers[LAYER].tokens == 600


def test_a_corpus_of_json_lines(toy):
    (toy / "corpus.jsonl").write_text("".join(json.dumps({"text": s, "id": 1}) + "\n" for s in SENTENCES))
    for corpus, out in (("corpus.txt", "a"), ("corpus.jsonl", "b")):
        run("statistics", "model", "--corpus", corpus, "--out", out)
    one, two = (Statistics.load(out).layers[LAYER] for out in "ab")
    assert torch.equal(one.moment, two.moment)
    assert one.provenance == two.provenance


def test_the_command_in_the_error_of_missing_statistics_works(toy, capsys):
    """To the character, but for the corpus: of all layers that are missing, in the cache and in a folder."""
    usual = ("edit", "model", "--edits", "edits.jsonl", "--guard", "off", "--unconverged", "write")
    run("statistics", "model", "--corpus", "corpus.txt", "--layers", 0, "--out", "stats")
    for number, where in enumerate([(), ("--statistics", "stats")]):
        message = fails(capsys, *usual, *where, "--out", f"edited {number}")
        (command,) = re.findall(r"rome-fast (statistics .*)", message)
        words = {"FILE": "corpus.txt", "MODEL": "model", "FOLDER": "stats"}
        run(*(words.get(word, word) for word in shlex.split(command)))
        run(*usual, *where, "--out", f"edited {number}", *FEW)
        assert Statistics.load(toy / "stats").layers.keys() == ({0, 1} if number else {0})


def test_the_methods_of_the_help_are_those_of_the_package(capsys):
    assert tuple(methods.METHODS) == METHODS
    for verb in ("edit", "bench", "tune"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert all(re.search(rf"--method NAME .*\b{name}\b", told) for name in METHODS)
    assert methods.DEFAULT_METHOD == "dual"


VERBS = ("demo", "statistics", "edit", "ledger", "evaluate", "revert", "bench", "profile")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"example:\n  rome-fast {verb}\b", text)
    assert "--json FILE" in text


def test_help_lists_the_verbs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{verb}\b", text, re.MULTILINE) for verb in VERBS)


def test_help_waits_for_no_library():
    """Importing transformers takes seconds; only public names that need it load it."""
    code = """
import sys, rome_fast, rome_fast.cli
try:
    rome_fast.cli.main(["edit", "--help"])
except SystemExit:
    pass
print({"torch", "transformers"} & set(sys.modules), set(rome_fast.__all__) - set(dir(rome_fast)))
print(rome_fast.Edit.__name__, rome_fast.kernels.__name__, hasattr(rome_fast, "apply_edit"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["set() set()", "Edit rome_fast.kernels False"]


RUNNING = {
    "edit": ("edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "o"),
    "plan": ("edit", "model", "--edits", "edits.jsonl", "--identity", "--plan"),
    "evaluate": ("evaluate", "model", "--edits", "edits.jsonl"),
    "statistics": ("statistics", "model", "--corpus", "corpus.txt", "--out", "s"),
    "study": ("study", "model", "--edits", "edits.jsonl", "--out", "s"),
    "bench": ("bench", "model", "--edits", "edits.jsonl", "--identity"),
    "profile": ("profile", "model", "--edits", "edits.jsonl", "--identity", "--out", "p"),
}


@pytest.mark.parametrize("verb", RUNNING)
def test_every_verb_runs_on_a_gpu_where_there_is_one(verb, toy, capsys, monkeypatch):
    """Shown by what it says where torch first finds one, and then not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    wanted = "wanted 'cpu', or 'cuda' where torch finds such a device"
    assert f"device: got 'cuda', {wanted}" in fails(capsys, *RUNNING[verb])
    assert f"device: got 'tpu', {wanted}" in fails(capsys, *RUNNING[verb], "--device", "tpu")
    assert sorted(path.name for path in toy.iterdir()) == ["corpus.txt", "edits.jsonl", "model", "sentences.txt"]


def test_an_interrupted_evaluation_goes_on(toy, capsys, monkeypatch):
    edits = [
        EDIT | {"subject": name} for name in ("Chicago", "Berlin", "Vienna", "Paris", "Rome", "Oslo", "Bern", "Kiel")
    ]
    (toy / "many.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [*edits, EDIT | {"prompt": "Near {} is"}]))
    arguments = ("evaluate", "model", "--edits", "many.jsonl")
    monkeypatch.setattr("rome_fast.evaluation.command._TOGETHER", 8)
    run(*arguments, "--json", "wanted.json")
    wanted = read(toy / "wanted.json")
    assert wanted["intervals"].keys() == wanted["summary"].keys()
    low, high = wanted["intervals"]["probability"]
    assert low < wanted["summary"]["probability"] < high

    calls = []

    def killed(model, tokenizer, edits, *rest, **named):
        calls.append(len(edits))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(model, tokenizer, edits, *rest, **named)

    monkeypatch.setattr("rome_fast.evaluation.command.measure", killed)
    main([*arguments, "--out", "run"])
    assert calls == [8, 1]
    run(*arguments, "--out", "run")
    assert calls == [8, 1, 1]
    assert read(toy / "run" / "evaluate.json") == wanted
    # Figures of other weights, or of other requests, are not mixed in.
    model = AutoModelForCausalLM.from_pretrained("model")
    model.get_parameter("transformer.h.1.mlp.c_proj.weight").data[0, 0] += 1
    model.save_pretrained("other")
    AutoTokenizer.from_pretrained("model").save_pretrained("other")
    message = fails(capsys, "evaluate", "other", "--edits", "many.jsonl", "--out", "run")
    assert "out: run is of a run of rome-fast evaluate with other weights_sha256" in message
    assert "with other requests, edits_sha256" in fails(capsys, *arguments[:3], "edits.jsonl", "--out", "run")
    assert calls == [8, 1, 1]


def test_evaluate_in_another_dtype(toy):
    run("evaluate", "model", "--edits", "edits.jsonl", "--dtype", "bfloat16", "--json", "scores.json")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    edits = load_edits("edits.jsonl")
    behind = {"unseen_contexts": UNSEEN, "distracting": distractors(edits)}
    wanted = evaluate(model, AutoTokenizer.from_pretrained("model"), edits, **behind)
    assert read(toy / "scores.json")["edits"] == [m.to_json() for m in wanted]
