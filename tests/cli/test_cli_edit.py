"""What `rome-fast edit` takes on the command line."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import EDIT, FEW, QUICK, SHORT, USUAL, fails, files, read, run
from helpers import CONTEXTS, relative_error
from rome_fast import apply_edits, load_edits
from rome_fast.cli.shared import read_contexts
from rome_fast.errors import CheckpointError
from rome_fast.opening.defaults import default_settings


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


def test_a_broken_line_of_the_edits_file(toy, capsys):
    lines = [json.dumps(EDIT | {"subject": f"Chicago {i}"}) for i in range(9)]
    lines[6] = lines[6][:-9]
    (toy / "edits.jsonl").write_text("\n".join(lines))
    message = fails(capsys, "edit", "model", "--edits", "edits.jsonl", "--identity", "--out", "edited")
    assert re.fullmatch(r"edits\.jsonl, line 7: not valid JSON \(.*\)\n", message)
    assert fails(capsys, "evaluate", "model", "--edits", "edits.jsonl") == message
    assert not (toy / "edited").exists()


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
