"""The life of a ledger as the documentation tells it, and from the command line."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
import rome_fast
from helpers import CONTEXTS, LAYER, all_bits, bits, changed, rounding, rounding_of_log_p
from ledgers import SEVERAL, bytes_of
from rome_fast import Ledger, Statistics
from rome_fast.cli import main
from rome_fast.models.runner import Runner
from rome_fast.report.edit_data import read_run
from rome_fast.statistics.store import cache_folder
from rome_fast.updates import chains
from toys import save_toy, toy_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "ledger.md"
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture
def toy(tmp_path, toy_tokenizers, monkeypatch, empty_cache):
    """A folder to work in, with a model."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("llama"), toy_tokenizers[False])
    return tmp_path


def test_the_whole_life_of_ten_facts(toy, toy_statistics, capsys):
    """The example of the page, on a toy that hardly knows anything: few steps, and nothing is left out for that."""
    model = AutoModelForCausalLM.from_pretrained("model")
    # Where a reader's come from: the cache.
    entries = [toy_statistics(model, False, layer).layers[layer] for layer in (0, LAYER)]
    Statistics(entries).save(cache_folder(Runner(model), "model", [0, LAYER]))
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    usual = "guard='off', unconverged='write', settings={'steps': 3, 'stop': 'loss'}"
    made = 'Ledger.create("facts", model, tokenizer'
    assert code.count(made) == 1
    names = {}
    exec(compile(code.replace(made, f"{made}, {usual}"), str(PAGE), "exec"), names)
    ledger = names["ledger"]
    # Vienna's cook and its piano have one value, which the merged ledger did not have: each had another cook for it.
    kinds = ["add", "replace", "remove", "merge", "remove", "find", "replace"]
    assert [event.kind for event in ledger.log()] == kinds
    targets = {entry.edit.text: entry.edit.target for entry in ledger.entries()}
    assert len(targets) == 10
    assert [t for text, t in targets.items() if "piano" in text] == ["Chicago"]
    assert sum(t == "Paris" for t in targets.values()) == 3
    assert len(names["before"].report["edits"]) == 10
    printed = capsys.readouterr().out.splitlines()
    assert sum("→ 'Paris' ('houses',)" in line for line in printed) == 3
    assert printed[-7].startswith("1 20")
    assert printed[-7].endswith("add ada the houses as of May")
    # What is in memory is the copy that was written in June.
    june = AutoModelForCausalLM.from_pretrained("edited-in-june")
    assert changed(june, all_bits(names["model"])) == []
    served = load_file("served/model.safetensors")
    delta = ledger.close()
    for layer in (0, LAYER):
        name = DOWN.format(layer)
        assert bytes(bits(served[name])) == bytes(bits(delta.edited(model)[name]))
    chains.revert("served")
    assert Path("served/model.safetensors").read_bytes() == Path("model/model.safetensors").read_bytes()
    assert json.loads(Path("houses/adapter_config.json").read_text())["r"] == 2 * 9
    # From its folder, its base and statistics, everything comes out as it did.
    assert bytes_of(Ledger.open("facts", "./model", device="cpu").close(at=1)) == bytes_of(names["before"])


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.partition("rome-fast: ")[2]


def mean_keys(folder):
    """(d_ff,) of every entry, in their order."""
    ledger = Ledger.open(folder)
    events = ledger.log()
    found = ledger._store.values(events, [entry.id for entry in ledger.entries()])
    return [each.keys.double().mean(0) for each in found.values()]


def edits_file(path, edits):
    lines = [{"prompt": e.prompt, "subject": e.subject, "target_new": e.target} for e in edits]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_from_the_command_line(toy, capsys):
    """The same folder and the same updates as from Python."""
    edits = SEVERAL[:3]
    edits_file(toy / "edits.jsonl", edits)
    edits_file(toy / "june.jsonl", [type(edits[0])(edits[0].prompt, edits[0].subject, "Berlin")])
    edits_file(toy / "other.jsonl", [type(edits[0])("{} is", "Rome", "Paris")])
    (toy / "contexts.txt").write_text("\n".join(CONTEXTS) + "\n")
    make = ("--identity", "--layers", LAYER, "--method", "c-rome", "--contexts", "contexts.txt", "--guard", "off")
    make = (*make, "--unconverged", "write", "--settings", "steps=3", "stop=loss", "--device", "cpu")
    run("ledger", "create", "facts", "model", *make)
    run("ledger", "create", "more", "model", *make)
    assert "an empty ledger for model (llama-4x48x80-" in capsys.readouterr().out
    run("ledger", "add", "facts", "--edits", "edits.jsonl", "--tags", "a", "b", "--who", "ada", "--json", "add.json")
    report = json.loads((toy / "add.json").read_text())
    assert report["edits_in_it"] == 3
    assert capsys.readouterr().out.splitlines()[-1] == "facts: 3 edits"
    run("ledger", "replace", "facts", "--edits", "june.jsonl", "--why", "June")
    assert "'Chicago is a twin city of' → 'Berlin' (was 'Melbourne')" in capsys.readouterr().out
    run("ledger", "remove", "facts", report["ids"][1][:8], "--who", "bob")
    assert f"removed {report['ids'][1]}" in capsys.readouterr().out
    run("ledger", "list", "facts", "--tags", "a")
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert all(re.search(r"  \[a, b(, no value was found)?\]$", line) for line in listed)
    run("ledger", "list", "facts", "--at", 1, "--json", "list.json")
    assert sorted(e["id"] for e in json.loads((toy / "list.json").read_text())["entries"]) == sorted(report["ids"])
    capsys.readouterr()
    run("ledger", "show", "facts", report["ids"][2])
    assert "target_tokens: (' Rome'" in capsys.readouterr().out
    run("ledger", "log", "facts")
    kinds = [(line.split()[0], line.split()[2:]) for line in capsys.readouterr().out.splitlines()]
    assert kinds == [
        ("1", ["add", "+3", "-0", "ada"]),
        ("2", ["replace", "+1", "-1", "June"]),
        ("3", ["remove", "+0", "-1", "bob"]),
    ]
    run("ledger", "add", "more", "--edits", "other.jsonl", "--model", "model")
    capsys.readouterr()
    run("ledger", "diff", "facts", "more")
    assert sorted(line[:1] for line in capsys.readouterr().out.splitlines()) == ["+", "+", "-"]
    run("ledger", "diff", "facts", 1)
    assert [line[:1] for line in capsys.readouterr().out.splitlines()] == ["-", "-", "+"]
    run("ledger", "merge", "facts", "more", "--why", "both")
    assert capsys.readouterr().out.splitlines()[-1] == "facts: 3 edits"

    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    delta = Ledger.open("facts", model, tokenizer).close()
    wanted = bytes(bits(delta.edited(model)[DOWN.format(LAYER)]))
    capsys.readouterr()
    run("ledger", "write", "facts", "--out", "edited", "--device", "cpu", "--report", "page", "--json", "write.json")
    printed, report = capsys.readouterr().out, json.loads(Path("write.json").read_text())
    assert "undo with: rome-fast revert edited" in printed
    nll = report["context_nll"]
    assert f"mean NLL of the contexts: {nll['before']:.3f} → {nll['after']:.3f} nats a token" in printed
    assert report["entries"] == [entry.id for entry in Ledger.open("facts").entries()]
    keys = [key / key.norm() for key in mean_keys("facts")]
    for i, record in enumerate(report["edits"]):
        cosines = [float(keys[i] @ key) if i != j else -1.0 for j, key in enumerate(keys)]
        assert record["nearest"] == cosines.index(max(cosines))
        assert record["nearest_cosine"] == pytest.approx(max(cosines), rel=rounding(torch.float32, 80))
        assert record["applied"]
    # Asked with the edits and without, as edit asks; the model is as the one that was written.
    asked = read_run(Path("page")).records
    edited = AutoModelForCausalLM.from_pretrained("edited")
    for record in asked:
        for model, p in (("model", record.probability_before), ("edited", record.probability_after)):
            loaded = edited if model == "edited" else AutoModelForCausalLM.from_pretrained(model)
            true = oracle.target_probability(loaded, AutoTokenizer.from_pretrained(model), record.text, record.target)
            true = float(torch.tensor(true).log().mean().exp())
            assert p == pytest.approx(true, rel=2 * rounding_of_log_p(torch.float32))
        assert record.answer_after is not None
    assert Path("page/report.html").read_bytes().startswith(b"<!")
    run("ledger", "write", "facts", "--in-place", "--at", 1)
    run("ledger", "write", "facts", "--in-place")
    for folder in ("edited", "model"):
        assert bytes(bits(load_file(f"{folder}/model.safetensors")[DOWN.format(LAYER)])) == wanted
    run("revert", "model")
    run("ledger", "write", "facts", "--delta", "delta.safetensors", "--tags", "a")
    run("ledger", "write", "facts", "--lora", "adapter")
    assert rome_fast.Delta.load("delta.safetensors").updates[DOWN.format(LAYER)].left.shape[1] == 2
    capsys.readouterr()
    run("ledger", "write", "facts", "--lora", "small", "--rank", 1, "--json", "small.json")
    (about,) = json.loads(Path("small.json").read_text())["truncation"].values()
    assert (about["rank"], about["of"], about["output_error"]) == (1, 3, None)
    said = f"{DOWN.format(LAYER)}: rank 1 of 3, off by {about['error']:.1%} of the update"
    assert said in capsys.readouterr().out.splitlines()
    assert sorted(os.listdir("adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    run("ledger", "compact", "facts")
    assert capsys.readouterr().out.splitlines()[-1] == "facts: 3 edits, without a past"

    for own in ("log.jsonl", "ledger.json", "values/000001.safetensors"):
        if Path("facts", own).exists():
            assert "is a file of the ledger facts" in fails(capsys, "ledger", "log", "facts", "--json", f"facts/{own}")
    assert "it is no ledger" in fails(capsys, "ledger", "list", "model")
    assert "wanted --out, --in-place, --lora or --delta" in fails(capsys, "ledger", "write", "facts")
    assert "wanted a model that can be asked" in fails(
        capsys, "ledger", "write", "facts", "--delta", "d", "--report", "other"
    )
    assert "page exists already" in fails(capsys, "ledger", "write", "facts", "--in-place", "--report", "page")
    assert "which is the ledger" in fails(capsys, "ledger", "write", "facts", "--in-place", "--report", "facts/page")
    assert "got one without --lora" in fails(capsys, "ledger", "write", "facts", "--delta", "d", "--rank", 1)
    assert "rank: got 0, wanted a whole number" in fails(
        capsys, "ledger", "write", "facts", "--lora", "none", "--rank", 0
    )
    assert "which no entry has" in fails(capsys, "ledger", "remove", "facts", "abcd")
    assert "ids: got none or conditions as well" in fails(capsys, "ledger", "remove", "facts")
    assert "there with another target" in fails(capsys, "ledger", "add", "facts", "--edits", "edits.jsonl")
    assert "that replace nothing" in fails(capsys, "ledger", "replace", "more", "--edits", "edits.jsonl")
    failed = fails(capsys, "ledger", "add", "facts", "--edits", "edits.jsonl", "--model", "facts")
    assert "wanted the directory of a safetensors checkpoint" in failed
    assert "facts exists already" in fails(capsys, "ledger", "create", "facts", "model", *make)
