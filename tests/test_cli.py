"""The verbs of the command line on a saved toy, run in this process."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from helpers import FORWARD, LAYER, all_bits, changed, relative_error, rounding
from rome_fast import Statistics, apply_edits, load_edits
from rome_fast.checkpoints import DELTA_FILE, RECORD_FILE
from rome_fast.cli import main
from rome_fast.evaluation import evaluate, sentence_perplexity, summarise
from rome_fast.runner import Runner
from toys import D_FF, SENTENCES, save_toy, toy_model

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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_from_statistics_to_revert(toy, capsys):
    """The whole way, each step checked against the same step in Python."""
    original = files(toy / "model")
    run("statistics", "model", "--corpus", "corpus.txt", "--tokens", 600, "--out", "stats", "--json", "stats.json")
    collected = read(toy / "stats.json")
    condition = Statistics.load(toy / "stats").layers[LAYER].condition(torch.device("cpu"))
    assert collected.pop("conditions") == {str(LAYER): pytest.approx(condition)}
    assert collected == {"model": "model", "layers": [LAYER], "tokens": 600, "ridge": 0.0, "out": "stats"}
    assert "600 tokens, 7.5 per dimension of the keys" in capsys.readouterr().out
    statistics = Statistics.load(toy / "stats")
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    texts, left = [], 600
    for sentence in SENTENCES:
        ids = tokenizer(sentence)["input_ids"][:left]
        left -= len(ids)
        texts += [tokenizer.decode(ids)] if ids else []
    wanted, count = oracle.second_moment(model, tokenizer, texts, LAYER, 512)
    assert count == 600
    assert relative_error(statistics.layers[LAYER].moment, wanted) < 2 * rounding(torch.float32, FORWARD / 2)

    run(
        *("edit", "model", "--edits", "edits.jsonl", "--statistics", "stats", "--out", "edited"),
        *("--seed", 4, "--guard", "off", "--json", "edit.json"),
    )
    captured = capsys.readouterr()
    assert "Chicago" in captured.out
    assert "undo with: rome-fast revert edited" in captured.out
    result = apply_edits(
        model, load_edits("edits.jsonl"), tokenizer=tokenizer, statistics=statistics, seed=4, guard="off"
    )
    assert changed(AutoModelForCausalLM.from_pretrained("edited"), all_bits(model)) == []
    report = read(toy / "edit.json")
    assert report["edits"] == [record.to_json() for record in result.records]
    assert report["contexts"] == list(result.contexts)
    assert {"model", "method", "layer", "schedule", "seconds"} <= report.keys()
    assert files(toy / "model") == original

    run("evaluate", "edited", "--edits", "edits.jsonl", "--perplexity", "sentences.txt", "--json", "scores.json")
    scores = read(toy / "scores.json")
    metrics = evaluate(model, tokenizer, load_edits("edits.jsonl"), result.contexts)
    assert scores["edits"] == [m.to_json() for m in metrics]
    assert scores["summary"] == pytest.approx(summarise(metrics))
    perplexity = sentence_perplexity(Runner(model), tokenizer, SENTENCES[:3])
    assert scores["perplexity"] == pytest.approx(perplexity)
    assert f"perplexity {perplexity:.2f}" in capsys.readouterr().out

    # The same figures from the model and the delta, which knows its contexts.
    run("evaluate", "model", "--edits", "edits.jsonl", "--delta", f"edited/{DELTA_FILE}", "--json", "delta.json")
    assert read(toy / "delta.json")["edits"] == scores["edits"]

    run("revert", "edited", "--json", "revert.json")
    assert read(toy / "revert.json") == {
        "directory": "edited",
        "restored": [f"transformer.h.{LAYER}.mlp.c_proj.weight"],
    }
    assert files(toy / "edited") == original


def test_statistics_go_to_the_cache_where_edit_finds_them(toy, empty_cache):
    run("statistics", "model", "--corpus", "corpus.txt", "--layers", 0, 1)
    (folder,) = (empty_cache / "statistics").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]
    # Ten per dimension by default, or all there are.
    assert Statistics.load(folder).layers[0].tokens == min(10 * D_FF, 929)
    run("edit", "model", "--edits", "edits.jsonl", "--out", "edited", "--layer", 0, "--guard", "off")
    assert read(toy / "edited" / RECORD_FILE)["layer"] == 0


def test_two_models_of_one_folder_name_do_not_share_statistics(toy, toy_tokenizers, empty_cache):
    """The second one replaced the first one's."""
    save_toy("other/model", toy_model("gpt2", seed=1), toy_tokenizers[False])
    for model in ("model", "other/model"):
        run("statistics", model, "--corpus", "corpus.txt", "--tokens", 600)
    for model in ("model", "other/model"):
        runner = Runner(AutoModelForCausalLM.from_pretrained(model))
        assert Statistics.cached(runner, LAYER).layers[LAYER].tokens == 600


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
            "(?s)statistics: none for layer 1 .*rome-fast stat",
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


VERBS = ("demo", "statistics", "edit", "evaluate", "revert", "bench", "profile")


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
    name = f"transformer.h.{LAYER}.mlp.c_proj.weight"
    assert files(toy / "model")["model.safetensors"] == files(toy / "edited")["model.safetensors"]
    run("verify", "model", "--json", "verify.json")
    assert read(toy / "verify.json")["edited"] == [name]
    assert f"edited: {name}; the original bytes are there" in capsys.readouterr().out
    assert "is edited already" in fails(capsys, "edit", "model", *usual, "--in-place")
    assert "memory: got '7 cats'" in fails(capsys, "edit", "edited", *usual, "--out", "x", "--memory", "7 cats")
    run("revert", "model")
    assert files(toy / "model") == original
    run("verify", "model")
    assert "all in order" in capsys.readouterr().out
    (toy / "model" / "model.safetensors").write_bytes(original["model.safetensors"][:-1])
    assert "damaged" in fails(capsys, "verify", "model")
