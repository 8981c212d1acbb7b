"""How commands end: in one message and a status, whatever goes wrong, is shown or is interrupted."""

import io
import json
import os
import re
import sys

import pytest

from commands import FEW, QUICK, fails, files, read, run
from rome_fast.cli import main
from rome_fast.errors import CheckpointError


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


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["edit"], ["edit", "m", "--edits", "e", "--out", "o", "--guard", "maybe"]]
)
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: rome-fast" in capsys.readouterr().err


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
