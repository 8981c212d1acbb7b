"""The verbs of the command line on a saved toy, run in this process."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from helpers import CONTEXTS, FORWARD, LAYER, all_bits, changed, relative_error, rounding
from rome_fast import Statistics, apply_edits, load_edits, methods
from rome_fast.cli import main
from rome_fast.cli.shared import METHODS, read_contexts
from rome_fast.errors import CheckpointError
from rome_fast.evaluation import UNSEEN, distractors, evaluate, sentence_perplexity, summarise
from rome_fast.evaluation.metrics import measure
from rome_fast.models.runner import Runner
from rome_fast.opening.defaults import default_settings
from toys import D_FF, SENTENCES, save_toy, toy_model

USUAL = (0, LAYER)
"""The layers that an edit of the toys is spread over, as nothing is published for them."""

EDIT = {
    "prompt": "The city of {}",
    "subject": "Chicago",
    "target_new": "Rome",
    "target_true": "Paris",
    "paraphrase_prompts": ["In the city of Chicago"],
    "neighborhood_prompts": ["The city of Berlin"],
}


@pytest.fixture
def toy(tmp_path, toy_tokenizers, monkeypatch, empty_cache):
    """A folder to work in, with a model, a corpus and an edits file."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    (tmp_path / "corpus.txt").write_text("\n\n".join(SENTENCES))
    (tmp_path / "edits.jsonl").write_text(json.dumps(EDIT) + "\n")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES[:3]) + "\n")
    return tmp_path


SHORT = ("edit", "model", "--edits", "edits.jsonl", "--identity", "--guard", "off", "--unconverged", "write")
FEW = ("--settings", "steps=3", "stop=loss")


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    """The message of a run that ends with status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    # A progress bar may stand before it.
    bar, _, message = captured.err.partition("rome-fast: ")
    assert bar == "" or bar.endswith("\n")
    return message


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def test_options_of_edit_reach_it(toy):
    run(
        *("edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "edited", "--json", "edit.json"),
        *("--method", "p-rome", "--layer", 2, "--schedule", "sequential", "--guard", "off", "--seed", 9),
    )
    report = read(toy / "edit.json")
    assert (report["method"], report["layer"], report["schedule"]) == ("p-rome", 2, "sequential")
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    result = apply_edits(
        model,
        load_edits("edits.jsonl"),
        tokenizer=tokenizer,
        statistics="identity",
        method="p-rome",
        layer=2,
        guard="off",
        seed=9,
    )
    assert report["contexts"] == list(result.contexts)
    assert report["edits"] == [record.to_json() for record in result.records]


@pytest.mark.parametrize("given", [("0-2",), ("2", "0", "1"), ("0", "1-2")])
def test_layers_in_a_row_or_one_by_one(given, toy):
    run(*SHORT, "--out", "edited", "--layers", *given, "--json", "edit.json", *FEW)
    report = read(toy / "edit.json")
    assert (report["layer"], report["layers"], report["layer_source"]) == (2, [0, 1, 2], "given")
    run("verify", "edited", "--json", "verify.json")
    assert read(toy / "verify.json")["edited"] == [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(3)]


def test_a_plan_of_several_layers_names_them(toy, capsys):
    run(*SHORT, "--plan", "--layers", "0-2", "--json", "plan.json")
    assert "edit layers 0, 1, 2" in capsys.readouterr().out
    assert read(toy / "plan.json")["layers"] == [0, 1, 2]


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


# Faults


def test_a_broken_line_of_the_edits_file(toy, capsys):
    lines = [json.dumps(EDIT | {"subject": f"Chicago {i}"}) for i in range(9)]
    lines[6] = lines[6][:-9]
    (toy / "edits.jsonl").write_text("\n".join(lines))
    message = fails(capsys, "edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "edited")
    assert re.fullmatch(r"edits\.jsonl, line 7: not valid JSON \(.*\)\n", message)
    assert fails(capsys, "evaluate", "model", "--edits", "edits.jsonl") == message
    assert not (toy / "edited").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "model", "--edits", "none.jsonl", "--out", "o"], r"path: cannot read the edits file none\.jsonl"),
        (["edit", "nowhere/at/all", "--edits", "edits.jsonl", "--out", "o"], "model: nowhere/at/all is neither"),
        (["edit", "model", "--edits", "edits.jsonl", "--out", "model"], "out: model exists already"),
        (
            ["edit", "model", "--edits", "edits.jsonl", "--out", "o"],
            "(?s)statistics: none for layers 0, 1 .*rome-fast stat",
        ),
        (
            ["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--statistics", "model"],
            r"no layer-\*\.safetensors",
        ),
        (
            ["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--statistics", "s", "--identity"],
            "statistics: got both --statistics and --identity",
        ),
        (["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--identity", "--method", "ft"], "method: got 'ft'"),
        (["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--identity", "--layer", "7"], "layer: got 7"),
        (["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--identity", "--layers", "2-4"], "layer: got 4"),
        (
            ["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--identity", "--layers", "1", "--layer", "1"],
            r"layers: got \[1\] and layer=1, wanted one of the two",
        ),
        (
            ["edit", "model", "--edits", "edits.jsonl", "--out", "o", "--identity", "--layers", "0-1", "1"],
            r"layers: got \[0, 1, 1\], wanted at least one, none of them twice",
        ),
        (["evaluate", "model", "--edits", "edits.jsonl", "--delta", "none"], "none: no such file"),
        (["evaluate", "model", "--edits", "edits.jsonl", "--perplexity", "none"], "none: cannot be read"),
        (["statistics", "model", "--corpus", "none.txt"], r"none\.txt: cannot be read"),
        (
            ["statistics", "model", "--corpus", "corpus.txt", "--layers", "9"],
            r"layer: got 9, wanted one of 0 .. 3",
        ),
        (["statistics", "model", "--corpus", "corpus.txt", "--tokens", "0"], "tokens.*: got 0"),
        (["statistics", "model", "--corpus", "model/model.safetensors"], "is not UTF-8 text"),
        (["statistics", "model", "--corpus", "bad.jsonl"], r'bad\.jsonl, line 2: wanted a JSON object with a "text"'),
        (["revert", "model"], "it was not edited by rome_fast"),
        (["revert", "nowhere"], "it was not edited by rome_fast"),
    ],
)
def test_faults_end_in_one_message_and_status_2(arguments, message, toy, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (toy / "bad.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    before = sorted(path.name for path in toy.iterdir())
    assert re.search(message, fails(capsys, *arguments))
    assert sorted(path.name for path in toy.iterdir()) == before


def test_a_report_that_cannot_be_written_is_no_traceback(toy, capsys):
    message = fails(capsys, "evaluate", "model", "--edits", "edits.jsonl", "--json", "no/folder/scores.json")
    assert "no/folder" in message


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


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["edit"], ["edit", "m", "--edits", "e", "--out", "o", "--guard", "maybe"]]
)
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: rome-fast" in capsys.readouterr().err


def test_edit_in_place_under_a_budget_verify_and_revert(toy, capsys):
    original = files(toy / "model")
    usual = ("--edits", "edits.jsonl", "--identity", "--guard", "off", "--unconverged", "write")
    run("edit", "model", *usual, "--plan", "--memory", "400kB", "--json", "plan.json")
    assert "through a buffer of" in capsys.readouterr().out
    assert read(toy / "plan.json")["memory_bytes"] == 400_000
    assert files(toy / "model") == original
    assert "out: got None" in fails(capsys, "edit", "model", *usual)
    run("edit", "model", *usual, "--out", "edited")
    run("edit", "model", *usual, "--in-place", "--memory", "400kB", "--json", "edit.json")
    captured = capsys.readouterr()
    assert "undo with: rome-fast revert model" in captured.out
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in USUAL]
    assert files(toy / "model")["model.safetensors"] == files(toy / "edited")["model.safetensors"]
    run("verify", "model", "--json", "verify.json")
    assert read(toy / "verify.json")["edited"] == names
    assert f"edited: {', '.join(names)}; the original bytes are there" in capsys.readouterr().out
    twice = ("evaluate", "model", "--edits", "edits.jsonl", "--delta", "model/rome_fast/0001/delta.safetensors")
    again = fails(capsys, *twice)
    assert f"delta: {names[0]} has this very update in it already, and would get it twice" in again
    run(*twice, "--force")
    run("edit", "model", *usual, "--in-place")
    run("verify", "model")
    assert f"rome_fast/0002: 1 request, dual: {', '.join(names)}\n" in capsys.readouterr().out
    run("revert", "model", "--json", "revert.json")
    assert "edits before that one: 1; undo them with: rome-fast revert model --all" in capsys.readouterr().out
    assert read(toy / "revert.json") == {"directory": "model", "restored": names, "edits_left": 1}
    assert files(toy / "model")["model.safetensors"] == files(toy / "edited")["model.safetensors"]
    run("edit", "model", *usual, "--in-place")
    assert "memory: got '7 cats'" in fails(capsys, "edit", "edited", *usual, "--out", "x", "--memory", "7 cats")
    run("revert", "model", "--all")
    assert files(toy / "model") == original
    run("verify", "model")
    assert "all in order" in capsys.readouterr().out
    (toy / "model" / "model.safetensors").write_bytes(original["model.safetensors"][:-1])
    assert "damaged" in fails(capsys, "verify", "model")


# Options of edit

QUICK = ("--identity", "--guard", "off", "--unconverged", "write", "--contexts", "contexts.txt")


@pytest.fixture
def contexts(toy):
    (toy / "contexts.txt").write_text("".join(f"{context}\n" for context in CONTEXTS))
    return toy


def test_edit_says_on_the_command_line_what_a_pipeline_can_say(contexts):
    options = ("--schedule", "sequential", "--batch-size", 2, "--dtype", "bfloat16", "--device", "cpu", "--no-measure")
    second = EDIT | {"prompt": "The harbour of {}", "subject": "Istanbul"}
    (contexts / "edits.jsonl").write_text(json.dumps(EDIT) + "\n" + json.dumps(second))
    settings = ("--settings", "steps=3", "lr=0.25", "stop=loss", "clamp=2")
    run("edit", "model", "--edits", "edits.jsonl", "--lora", "lora", "--json", "e.json", *QUICK, *options, *settings)
    report = read(contexts / "e.json")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    usual = default_settings(model.config)
    wanted = replace(usual, steps=3, learning_rate=0.25, stop="loss", clamp=2.0)
    assert report["settings"] == asdict(wanted)
    assert report["contexts"] == list(CONTEXTS)
    assert report["dtype"] == "bfloat16"
    assert [e["probability_after"] for e in report["edits"]] == [None, None]
    result = apply_edits(
        model,
        load_edits("edits.jsonl"),
        tokenizer=AutoTokenizer.from_pretrained("model"),
        statistics="identity",
        schedule="sequential",
        batch_size=2,
        contexts=CONTEXTS,
        settings=wanted,
        guard="off",
        unconverged="write",
        measure=False,
    )
    assert [e["loss"] for e in report["edits"]] == [record.loss for record in result.records]
    # The adapter is the edit, and nothing else was written.
    adapter = load_file("lora/adapter_model.safetensors")
    assert len(adapter) == 2 * len(USUAL)
    for layer in USUAL:
        module = f"base_model.model.transformer.h.{layer}.mlp.c_proj"
        found = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        update = result.delta.updates[f"transformer.h.{layer}.mlp.c_proj.weight"]
        assert relative_error(found, update.dense().double()) < 1e-6  # fp32 sums over the rank, of 4
    names = {"model", "corpus.txt", "edits.jsonl", "sentences.txt", "contexts.txt", "lora", "e.json"}
    assert {path.name for path in contexts.iterdir()} == names


def test_an_adapter_beside_a_checkpoint(contexts, capsys):
    run("edit", "model", "--edits", "edits.jsonl", "--out", "edited", "--lora", "lora", *QUICK, *FEW)
    text = capsys.readouterr().out
    assert "adapter: lora, for model as it is" in text
    assert "edited checkpoint: edited" in text
    assert {"adapter_model.safetensors", "adapter_config.json"} == set(files(contexts / "lora"))
    for bad, message in (
        (("--out", "new", "--lora", "lora"), "lora: lora exists already"),
        (("--out", "new", "--lora", "new"), "lora: got new, the same as out"),
        (("--out", "new", "--lora", "new/in"), "lora: got new/in, the same as out or inside"),
        (("--in-place", "--lora", "new"), "lora: got it with in_place=True"),
        (("--lora", "corpus.txt/new"), "corpus.txt"),
    ):
        assert message in fails(capsys, "edit", "model", "--edits", "edits.jsonl", *bad, *QUICK, *FEW)
        assert not (contexts / "new").exists()


def test_an_adapter_goes_where_its_checkpoint_could_not_be_written(contexts, capsys, monkeypatch):
    def fail(*_arguments, **_keywords):
        raise CheckpointError("writing edited: No space left on device")

    monkeypatch.setattr("rome_fast.updates.saving.save_edited", fail)
    usual = ("edit", "model", "--edits", "edits.jsonl", *QUICK, *FEW)
    assert "No space left" in fails(capsys, *usual, "--out", "edited", "--lora", "lora")
    assert not (contexts / "lora").exists()


def test_an_edit_that_goes_nowhere_is_refused_before_anything_is_read(capsys):
    message = fails(capsys, "edit", "nowhere", "--edits", "nothing.jsonl")
    assert re.fullmatch(
        r"out: got None, wanted --out or --lora .*, or --in-place, which changes MODEL itself\n", message
    )


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        (["steps=ten", "lr=fast", "speed=3", "steps"], ["'steps=ten' has no whole number", "'lr=fast' has no number",
            "'speed=3' is no key=value of a known key", "'steps' is no key=value"]),
        (["steps=0", "clamp=-1", "stop=never"], ["steps 0", "clamp -1.0", "stop 'never', wanted 'argmax' or 'loss'"]),
        (["lr=nan", "kl_factor=inf"], ["learning_rate nan", "kl_factor inf"]),
        (["lr=0.1", "learning_rate=0.2"], ["learning_rate is given twice"]),
        (["steps=1.5", "=3", "lr="], ["'steps=1.5' has no whole number", "'=3' is no", "'lr=' has no number"]),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_listed_with_the_valid_names(given, faults, capsys):
    usual = ("edit", "nowhere", "--edits", "nothing.jsonl", "--out", "o")
    message = fails(capsys, *usual, "--settings", *given)
    assert message.startswith("settings: ")
    assert all(fault in message for fault in faults)
    assert "the keys are steps, learning_rate, weight_decay, clamp, kl_factor, stop, stop_loss, margin" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("It rained. \nIt rained.\n \nAgain. ", r"line 2: got 'It rained\.'; line 3: got ' ', wanted texts"),
        ("", "which is empty, wanted texts"),
        ('["a ", "b", 3]', "item 2: got 'b'; item 3: got 3, wanted texts"),
        ('["a ", ', "begins as a JSON list but is none"),
        ("[]", "which is empty"),
    ],
)
def test_contexts_that_cannot_be_are_named_by_their_lines(text, message, tmp_path, capsys):
    (tmp_path / "c.txt").write_text(text)
    usual = ("edit", "nowhere", "--edits", "nothing.jsonl", "--out", "o")
    assert re.search(message, fails(capsys, *usual, "--contexts", tmp_path / "c.txt"))


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_edits_and_questions_through_the_chat_template(contexts, capsys):
    for arguments in (("edit", "model", "--out", "o", *QUICK), ("evaluate", "model")):
        message = fails(capsys, *arguments, "--edits", "edits.jsonl", "--chat")
        assert message.startswith("edits[0]: ")
        assert "template" in message
        assert "system: got a system prompt without --chat" in fails(
            capsys, *arguments, "--edits", "edits.jsonl", "--system", "Be brief."
        )
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("model")
    chat = ("--edits", "edits.jsonl", "--chat", "--system", "Be brief.")
    run("edit", "model", *chat, "--out", "edited", "--json", "e.json", *QUICK, *FEW)
    (record,) = read(contexts / "e.json")["edits"]
    asked = "<s>system\nBe brief.</s>\n<s>user\nThe city of Chicago</s>\n<s>assistant\n"
    assert record["text"] == asked
    assert record["target_tokens"][-1] == "</s>"
    capsys.readouterr()
    run("evaluate", "edited", *chat, "--json", "scores.json")
    assert "Chicago → Rome" in capsys.readouterr().out
    (scores,) = read(contexts / "scores.json")["edits"]
    assert scores["probability"] == pytest.approx(record["probability_after"], rel=1e-5)
    # The same by the model's own forward.
    model = AutoModelForCausalLM.from_pretrained("edited")
    ids = tokenizer(asked + "Rome</s>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        found = model(ids).logits.log_softmax(-1)[0, start - 1 : -1].gather(1, ids[0, start:, None])
    assert scores["probability"] == pytest.approx(float(found.mean().exp()), rel=1e-4)


def test_contexts_of_several_lines_come_in_a_json_list(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(["One.\n", "Two lines,\nof one context. "]))
    assert read_contexts(tmp_path / "c.json") == ["One.\n", "Two lines,\nof one context. "]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfIt rained. \r\nThe sun. \r\n")
    assert read_contexts(tmp_path / "c.txt") == ["It rained. ", "The sun. "]


# What is printed, and where it goes

MARKUP = {
    "prompt": "[INST] The city of {} [/INST]",
    "subject": "Chicago",
    "target_new": "Rome [/b] \u001b]0;owned\u0007 \u202e$x_{",
}


@pytest.mark.filterwarnings("always::rome_fast.closing.guard.CollapseWarning")
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_text_with_markup_and_controls_is_edited_and_shown(encoding, contexts, monkeypatch):
    (contexts / "edits.jsonl").write_text(json.dumps(MARKUP))
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    # As guard="warn" does, a warning tells the request.
    wanted = (*QUICK[:1], "--guard", "warn", *QUICK[3:])
    monkeypatch.setattr("rome_fast.closing.flow.predicts_collapse", lambda *_: True)
    assert main(["edit", "model", "--edits", "edits.jsonl", "--out", "edited", *wanted, *FEW, "--json", "e.json"]) == 0
    shown = {}
    for name, stream in streams.items():
        stream.flush()
        shown[name] = stream.buffer.getvalue().decode(encoding)
        assert not set(shown[name]) & {"\x1b", "\x07", "\u202e"}
    assert "edited checkpoint: edited" in shown["stdout"]
    assert "[/INST]" in shown["stdout"]
    assert r"Rome [/b] \x1b]0;owned\x07 \u202e$x_{" in shown["stderr"]
    assert read(contexts / "e.json")["edits"][0]["target"] == MARKUP["target_new"]


def test_an_edit_is_made_whatever_becomes_of_its_printing(contexts, capfd, monkeypatch):
    usual = ["edit", "model", "--edits", "edits.jsonl", *QUICK, *FEW]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        run(*usual, "--out", "one")
    assert "all was done, but standard output did not take" in capfd.readouterr().err
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        run(*usual, "--out", "two")
    assert "rome-fast:" not in capfd.readouterr().err
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        run(*usual, "--out", "three")
    weights = [files(contexts / name)["model.safetensors"] for name in ("one", "two", "three")]
    assert weights[0] == weights[1] == weights[2] != files(contexts / "model")["model.safetensors"]


def test_a_report_that_fails_after_the_edit_says_that_the_edit_is_there(contexts, capsys, monkeypatch):
    def fail(*_):
        raise CheckpointError("writing e.json: No space left on device")

    monkeypatch.setattr("rome_fast.cli._write_json", fail)
    usual = ["edit", "model", "--edits", "edits.jsonl", *QUICK, *FEW]
    assert main([*usual, "--out", "edited", "--json", "e.json"]) == 3
    captured = capsys.readouterr()
    assert "edited checkpoint: edited" in captured.out
    assert "rome-fast: all was done, but its report could not be written: writing e.json: No space" in captured.err
    assert (contexts / "edited" / "model.safetensors").exists()


def test_a_warning_that_is_to_be_an_error_is_one_message(contexts, capsys, monkeypatch):
    """As with PYTHONWARNINGS=error, which is how these tests run."""
    monkeypatch.setattr("rome_fast.closing.flow.predicts_collapse", lambda *_: True)
    usual = ("edit", "model", "--edits", "edits.jsonl", "--out", "edited", *QUICK[:1], "--guard", "warn", *QUICK[3:])
    assert "would collapse the model" in fails(capsys, *usual, *FEW)
    assert not (contexts / "edited").exists()


def test_an_interrupt_ends_with_its_status(toy, capsys, monkeypatch):
    def stop(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("rome_fast.closing.flow.Flow.solve", stop)
    assert main(["edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "edited"]) == 130
    assert capsys.readouterr().err.endswith("rome-fast: interrupted; nothing half-written is left behind\n")
    assert not (toy / "edited").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("edits.jsonl", "json: edits.jsonl is what edits names; choose another name"),
        ("sentences.txt", "json: sentences.txt is what perplexity names"),
        ("./model/../edits.jsonl", "is what edits names"),
        ("model/config.json", "json: model/config.json is a file of the model model"),
        ("model", "json: model is a folder, wanted the name of a file"),
        ("corpus.txt/report.json", "json: the folder corpus.txt does not exist"),
    ],
)
def test_a_report_in_place_of_an_input_is_refused(place, message, toy, capsys):
    before = {**files(toy / "model"), "edits": (toy / "edits.jsonl").read_bytes()}
    usual = ("evaluate", "model", "--edits", "edits.jsonl", "--perplexity", "sentences.txt")
    assert message in fails(capsys, *usual, "--json", place)
    assert {**files(toy / "model"), "edits": (toy / "edits.jsonl").read_bytes()} == before


def test_names_that_are_no_text_are_told_and_reported(toy, capsys):
    """An argument with bytes that are no UTF-8 has halves of surrogate pairs."""
    odd = "mod\udcffel[b]\x1b"
    os.rename("model", odd)
    run("verify", odd, "--json", "verify.json")
    assert read(toy / "verify.json")["directory"] == odd
    assert r"mod\udcffel[b]\x1b: " in capsys.readouterr().out
    assert "cannot be loaded: " in fails(capsys, "evaluate", odd, "--edits", "edits.jsonl")
    message = fails(capsys, "edit", odd + "2", "--edits", "edits.jsonl", "--identity", "--out", "o")
    assert message.startswith(r"model: mod\udcffel[b]\x1b2 is neither")
    with pytest.raises(SystemExit):
        main(["edit", "m", "--edits", "e", "--\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


# Devices

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
    run(*arguments, "--json", "wanted.json")
    wanted = read(toy / "wanted.json")
    assert wanted["intervals"].keys() == wanted["summary"].keys()
    low, high = wanted["intervals"]["probability"]
    assert low < wanted["summary"]["probability"] < high

    calls = []
    monkeypatch.setattr("rome_fast.evaluation.command._TOGETHER", 8)

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "edits.jsonl/o"),
            "edits.jsonl does not exist; make it first",
        ),
        (("edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "model/o"), "out: model/o lies inside the"),
        (("edit", "model", "--edits", "edits.jsonl", "--identity", "--lora", "model/o"), "lora: model/o lies inside"),
        (("study", "model", "--edits", "edits.jsonl", "--out", "corpus.txt"), "out: corpus.txt is a file, wanted a f"),
        (("study", "model", "--edits", "edits.jsonl", "--out", "s", "--layer", "9"), "layer: got 9, wanted one of 0"),
        (("bench", "model", "--identity", "--layer", "9"), "layer: got 9, wanted one of 0"),
        (("bench", "model", "--identity", "--threads", "-1"), "threads: got -1, wanted at least 1"),
        (("bench", "model", "--identity", "--csv", "model"), "csv: got model, wanted the name of a file"),
        (("bench", "model", "--identity", "--keep", "no/x"), "keep: got no/x, wanted the name of a file, in a folder"),
        (("bench", "model", "--identity", "--sentences", "corpus.bin"), "corpus.bin: cannot be read"),
        (("demo", "--out", "corpus.txt"), "out: corpus.txt exists and is not an earlier demo's"),
        (("demo", "--device", "tpu"), "device: got 'tpu', wanted 'cpu'"),
    ],
)
def test_what_was_a_traceback_or_a_late_error_is_one_message_at_once(arguments, message, toy, capsys, monkeypatch):
    before = sorted(path.name for path in toy.iterdir())

    def late(*_arguments, **_keywords):
        raise AssertionError("an edit was begun")

    monkeypatch.setattr("rome_fast.closing.flow.Flow.solve", late)
    assert message in fails(capsys, *arguments)
    assert sorted(path.name for path in toy.iterdir()) == before
