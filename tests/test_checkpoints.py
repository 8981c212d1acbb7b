"""Checkpoints edited on disk: the bytes of an edit in memory, a source that is only read, and the way back."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START, all_bits, bits, changed, edited
from rome_fast import Delta, apply_edits
from rome_fast.errors import ArgumentError, CheckpointError, ModelError
from rome_fast.opening import checkpoints
from rome_fast.updates import chains
from toys import save_toy, toy_model

EDITS = [START, MIDDLE, END]
RECORD_FILE, DELTA_FILE, ORIGINALS_FILE = (
    f"rome_fast/0001/{name}" for name in ("record.json", "delta.safetensors", "originals.safetensors")
)
EXTRA = {RECORD_FILE, DELTA_FILE, ORIGINALS_FILE}
NAMES = {
    "llama": f"model.layers.{LAYER}.mlp.down_proj.weight",
    "gpt2": f"transformer.h.{LAYER}.mlp.c_proj.weight",
    "gptj": f"transformer.h.{LAYER}.mlp.fc_out.weight",
    "gpt2 without prefix": f"h.{LAYER}.mlp.c_proj.weight",
}
# What is written, and not how it was found, is at stake here.
QUICK = replace(SETTINGS, steps=2)


def save(directory, kind, tokenizer, dtype=torch.float32, shards=False):
    """A saved toy; as GPT-2 was published, the names of its tensors lack the prefix of the head model."""
    family, _, without_prefix = kind.partition(" ")
    save_toy(
        directory,
        toy_model(family, dtype=dtype, tie=bool(without_prefix)),
        tokenizer,
        max_shard_size="100KB" if shards else "5GB",
    )
    if without_prefix:
        path = directory / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    (directory / "notes.txt").write_text("mine")
    return directory


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save(tmp_path / "source", "llama", toy_tokenizers[True], shards=True)


def edit_checkpoint(source, out, edits=EDITS, **changes):
    usual = {
        "method": "c-rome",
        "statistics": "identity",
        "layer": LAYER,
        "contexts": CONTEXTS,
        "settings": QUICK,
        "guard": "off",
        "unconverged": "write",
        "measure": False,
    }
    return apply_edits(source, edits, out=out, **(usual | changes))


def contents(directory):
    """SHA-256 of every file by its path."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("kind", "shards", "dtype"),
    [
        ("llama", False, torch.float32),
        ("llama", True, torch.bfloat16),
        ("gpt2", True, torch.float32),
        ("gptj", True, torch.bfloat16),
        ("gpt2 without prefix", False, torch.float32),
        ("gpt2 without prefix", False, torch.float16),
    ],
)
def test_the_edited_checkpoint_is_the_edited_model(kind, shards, dtype, tmp_path, toy_tokenizers):
    source = save(tmp_path / "source", kind, toy_tokenizers[True], dtype, shards)
    before = contents(source)
    assert len(list(source.glob("*.safetensors"))) > 2 or not shards
    out = tmp_path / "out"
    result = edit_checkpoint(str(source), str(out))
    assert contents(source) == before

    resident = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert resident.dtype == dtype
    pristine = all_bits(resident)
    name = f"transformer.{NAMES[kind]}" if "without" in kind else NAMES[kind]
    edited(resident, AutoTokenizer.from_pretrained(source), EDITS, settings=QUICK)
    assert changed(resident, pristine) == [name]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == dtype
    assert changed(loaded, all_bits(resident)) == []
    assert torch.equal(bits(result.model.get_parameter(name)), bits(resident.get_parameter(name)))

    # Every other file, and every other tensor, to the byte.
    after = contents(out)
    assert after.keys() == before.keys() | EXTRA
    different = [file for file in before if after[file] != before[file]]
    assert len(different) == 1
    old, new = load_file(source / different[0]), load_file(out / different[0])
    assert [n for n in old if not torch.equal(bits(old[n]), bits(new[n]))] == [NAMES[kind]]


def test_what_lies_beside_the_weights(tmp_path, source):
    result = edit_checkpoint(source, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record == chains.records(tmp_path / "out")[0]
    assert record["edits"] == [r.to_json() for r in result.records]
    assert record["contexts"] == list(CONTEXTS)
    assert record["versions"]["torch"] == torch.__version__
    assert record["model"] == str(source)

    name = NAMES["llama"]
    original = load_file(tmp_path / "out" / ORIGINALS_FILE)
    assert list(original) == [name]
    pristine = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(original[name], pristine.get_parameter(name))
    hashes = {
        "original": hashlib.sha256(original[name].numpy().tobytes()).hexdigest(),
        "edited": hashlib.sha256(result.model.get_parameter(name).detach().numpy().tobytes()).hexdigest(),
    }
    assert record["sha256"] == {name: hashes}

    # The delta alone makes the same model of the source.
    Delta.load(tmp_path / "out" / DELTA_FILE).apply(pristine)
    assert changed(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), all_bits(pristine)) == []


@pytest.mark.parametrize(("kind", "shards"), [("llama", True), ("gpt2", False), ("gpt2 without prefix", False)])
def test_revert_restores_every_byte(kind, shards, tmp_path, toy_tokenizers):
    source = save(tmp_path / "source", kind, toy_tokenizers[False], shards=shards)
    edit_checkpoint(source, tmp_path / "out")
    assert contents(tmp_path / "out") != contents(source)
    assert chains.revert(tmp_path / "out") == [NAMES[kind]]
    assert contents(tmp_path / "out") == contents(source)
    with pytest.raises(CheckpointError, match=r"it has no rome_fast/\*/record.json, so it was not edited by rome_fast"):
        chains.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_an_edited_checkpoint_can_be_edited_again(tmp_path, source):
    """The second one is reverted to the first; each knows its own originals."""
    edit_checkpoint(source, tmp_path / "one", END)
    edit_checkpoint(tmp_path / "one", tmp_path / "two", MIDDLE)
    chains.revert(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    chains.revert(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(source)


def test_a_model_in_memory_can_be_written_too(tmp_path, source):
    model = AutoModelForCausalLM.from_pretrained(source)
    result = edited(model, AutoTokenizer.from_pretrained(source), EDITS, settings=QUICK)
    result.save(tmp_path / "out")
    edit_checkpoint(source, tmp_path / "other")
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "other")
    # The record holds times, and safetensors writes metadata in any order.
    for each in (ours, theirs):
        del each[RECORD_FILE], each[DELTA_FILE]
    assert ours == theirs
    assert_equal_tensors(tmp_path / "out" / DELTA_FILE, tmp_path / "other" / DELTA_FILE)


def assert_equal_tensors(file, other):
    one, two = load_file(file), load_file(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(bits(one[name]), bits(two[name])) for name in one)


def test_out_that_exists_is_refused_before_anything_is_done(tmp_path, source):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("precious")
    before = contents(source)
    for out in (taken, taken / "file", source):
        with pytest.raises(ArgumentError, match=r"out: .* exists already; choose a new name or remove it"):
            # Without anything to find a model by: it is not even looked for.
            apply_edits(tmp_path / "no such model", END, out=out)
    assert contents(taken).keys() == {"file"}
    assert contents(source) == before


@pytest.mark.parametrize("out", ["no/such/place", "source/inside"])
def test_out_where_it_cannot_be_is_refused(out, tmp_path, source):
    before = contents(source)
    with pytest.raises(ArgumentError, match="out: "):
        edit_checkpoint(source, tmp_path / out)
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_edit_that_fails_leaves_no_out(tmp_path, source):
    before = contents(source)
    with pytest.raises(ArgumentError, match="layer: got 9"):
        edit_checkpoint(source, tmp_path / "out", layer=9)
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nothing_is_written_where_every_edit_is_left_out(tmp_path, source):
    with (
        pytest.warns(UserWarning, match="did not converge"),
        pytest.raises(ArgumentError, match="out: no edit was applied"),
    ):
        edit_checkpoint(source, tmp_path / "out", unconverged="skip")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Damage


@pytest.fixture
def out(tmp_path, source):
    edit_checkpoint(source, tmp_path / "out", END)
    return tmp_path / "out"


def assert_not_reverted(out, message):
    before = contents(out)
    with pytest.raises(CheckpointError, match=message):
        chains.revert(out)
    assert contents(out) == before


def test_originals_with_one_wrong_bit(out):
    content = bytearray((out / ORIGINALS_FILE).read_bytes())
    content[-1] ^= 1
    (out / ORIGINALS_FILE).write_bytes(content)
    assert_not_reverted(out, rf"{ORIGINALS_FILE}: .*down_proj.weight is missing or damaged; nothing was changed")


def test_originals_that_are_cut(out):
    (out / ORIGINALS_FILE).write_bytes((out / ORIGINALS_FILE).read_bytes()[:-8])
    assert_not_reverted(out, ORIGINALS_FILE)


def test_originals_that_are_gone(out):
    (out / ORIGINALS_FILE).unlink()
    assert_not_reverted(out, ORIGINALS_FILE)


def test_originals_of_another_edit(tmp_path, source, out):
    edit_checkpoint(source, tmp_path / "other", END, layer=2)
    shutil.copy(tmp_path / "other" / ORIGINALS_FILE, out / ORIGINALS_FILE)
    assert_not_reverted(out, r"layers\.1\.mlp\.down_proj\.weight is missing or damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: "not JSON", "cannot be read"),
        (lambda record: "[]", "not a record of an edit"),
        (lambda record: json.dumps({k: v for k, v in record.items() if k != "sha256"}), "damaged|not a record"),
        (lambda record: json.dumps(record | {"sha256": {}}), "damaged|not a record"),
        (lambda record: json.dumps(record | {"sha256": {NAMES["llama"]: "abc"}}), "damaged|not a record"),
    ],
    ids=["text", "a list", "no hashes", "empty hashes", "other hashes"],
)
def test_a_record_that_is_damaged(change, message, out):
    """Without hashes nothing vouches for the originals."""
    record = json.loads((out / RECORD_FILE).read_text())
    (out / RECORD_FILE).write_text(change(record))
    assert_not_reverted(out, message)


def test_revert_of_weights_that_changed_since_is_refused(out):
    """They are not this edit's any more; giving them their old bytes would lose whatever was done later."""
    (shard,) = [path for path in out.glob("model*.safetensors") if NAMES["llama"] in load_file(path)]
    tensors = load_file(shard)
    tensors[NAMES["llama"]][0, 0] += 1
    save_file(tensors, shard, {"format": "pt"})
    assert_not_reverted(out, r"down_proj\.weight .*changed")


def test_a_revert_that_was_cut_short_goes_on(out, source):
    """The weights are restored by then, the files of the edit still there."""
    name = NAMES["llama"]
    extra = {file: (out / file).read_bytes() for file in EXTRA}
    chains.revert(out)
    (out / RECORD_FILE).parent.mkdir(parents=True)
    for file, content in extra.items():
        (out / file).write_bytes(content)
    assert chains.revert(out) == [name]
    assert contents(out) == contents(source)


def test_revert_of_what_was_not_edited(tmp_path, source):
    for directory in (source, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="it was not edited by rome_fast"):
            chains.revert(directory)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), CheckpointError, r"no readable config\.json"),
        (lambda d: (d / "config.json").write_text("{"), CheckpointError, r"no readable config\.json"),
        (lambda d: (d / "config.json").write_text("{}"), CheckpointError, r"no readable config\.json"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "nobody"}'),
            ModelError,
            "got architecture 'nobody', which transformers .* does not have; a newer release may have it",
        ),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "t5"}'),
            ModelError,
            "got architecture 't5', wanted a causal language model, a decoder alone",
        ),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'),
            ModelError,
            "got architecture 'own', whose code lies in .*; it runs only with trust_remote_code=True",
        ),
        (lambda d: (d / "model.safetensors.index.json").unlink(), CheckpointError, r"neither model\.safetensors nor"),
        (
            lambda d: next(d.glob("model-*2*.safetensors")).unlink(),
            CheckpointError,
            r"model-00002.*missing; fetch the checkpoint again",
        ),
        (
            lambda d: next(d.glob("model-00001*")).write_bytes(b"no weights"),
            CheckpointError,
            r"model-00001.*damaged safetensors file",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{"), CheckpointError, "cannot be loaded"),
    ],
)
def test_a_damaged_source(break_it, error, message, tmp_path, source):
    break_it(source)
    with pytest.raises(error, match=message):
        edit_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"model: .*nowhere is neither a directory nor a model that the hub"):
        edit_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model: no/such-model is neither a directory nor"):
        edit_checkpoint("no/such-model", tmp_path / "out")


# In place


def edit_in_place(source, edits=END, **changes):
    return edit_checkpoint(source, None, edits, in_place=True, **changes)


@pytest.mark.parametrize("memory", [None, 250_000])
def test_an_edit_in_place_is_the_edit_of_a_copy(memory, tmp_path, source):
    before = contents(source)
    edit_checkpoint(source, tmp_path / "out", END)
    edit_in_place(source, memory=memory)
    ours, theirs = contents(source), contents(tmp_path / "out")
    for each in (ours, theirs):
        del each[RECORD_FILE], each[DELTA_FILE]
    assert ours == theirs
    chains.verify(source)
    assert chains.revert(source) == [NAMES["llama"]]
    assert contents(source) == before
    edit_in_place(source, MIDDLE)


def test_in_place_is_never_a_default(tmp_path, source, toy_tokenizers):
    before = contents(source)
    with pytest.raises(ArgumentError, match=r"out: got None, .*in_place=True changes the checkpoint itself"):
        edit_checkpoint(source, None)
    with pytest.raises(ArgumentError, match="and in_place=True, wanted one of them"):
        edit_checkpoint(source, tmp_path / "out", in_place=True)
    with pytest.raises(ArgumentError, match="in_place: got no/such/place, wanted the directory"):
        edit_in_place("no/such/place")
    with pytest.raises(ArgumentError, match="in_place: got True for a model in memory"):
        edited(toy_model("llama"), toy_tokenizers[True], END, in_place=True)
    assert contents(source) == before


def test_an_edit_in_place_that_fails_changes_nothing(source):
    before = contents(source)
    with pytest.raises(ArgumentError, match="layer: got 9"):
        edit_in_place(source, layer=9)
    with pytest.warns(UserWarning, match="did not converge"), pytest.raises(ArgumentError, match="no edit was applied"):
        edit_in_place(source, unconverged="skip")
    assert contents(source) == before


def test_two_edits_of_one_target_at_a_time(source):
    """The second is refused when it begins, not after hours of work."""
    with (
        chains.changing_in_place(source),
        pytest.raises(CheckpointError, match="another process is changing it"),
    ):
        edit_in_place(source, statistics="not even looked at")


def test_the_next_command_completes_what_was_cut_short(tmp_path, source, monkeypatch):
    """Whichever it is: one that loads, one that verifies, one that reverts."""
    before = contents(source)
    edit_checkpoint(source, tmp_path / "wanted", END)
    wanted = load_file(tmp_path / "wanted" / ORIGINALS_FILE)
    with monkeypatch.context() as patch:
        # Stopped where all is decided and nothing moved.
        patch.setattr("rome_fast.weights.checkpoint._complete", lambda _: None)
        edit_in_place(source)
    assert (source / ".rome_fast.journal").is_dir()
    for name, command in {
        "load": checkpoints.load,
        "verify": chains.verify,
        "edit": lambda d: edit_checkpoint(d, tmp_path / "next", MIDDLE),
        "revert": chains.revert,
    }.items():
        copy = shutil.copytree(source, tmp_path / name)
        command(copy)
        assert not (copy / ".rome_fast.journal").exists()
        assert (contents(copy) == before) == (name == "revert")
        assert (copy / ORIGINALS_FILE).exists() == (name != "revert")
    assert torch.equal(load_file(tmp_path / "load" / ORIGINALS_FILE)[NAMES["llama"]], wanted[NAMES["llama"]])


def test_a_revert_cut_short_needs_no_second_one(source, monkeypatch):
    before = contents(source)
    edit_in_place(source)
    with monkeypatch.context() as patch:
        patch.setattr("rome_fast.weights.checkpoint._complete", lambda _: None)
        chains.revert(source)
    assert chains.revert(source) == []
    assert contents(source) == before


def test_hard_links_keep_the_source_safe(tmp_path, source):
    """From edit to revert: the files that two checkpoints share are replaced, never written."""
    before = contents(source)
    edit_checkpoint(source, tmp_path / "out", END, link="hard")
    shared = [p.name for p in source.iterdir() if p.samefile(tmp_path / "out" / p.name)]
    assert len(shared) > 1
    edit_in_place(source, MIDDLE)
    chains.verify(tmp_path / "out")
    chains.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    chains.revert(source)
    assert contents(source) == before
    with pytest.raises(ArgumentError, match="link: got 'soft'"):
        edit_checkpoint(source, tmp_path / "other", END, link="soft")


# Verify


def test_verify_of_what_is_in_order(tmp_path, source, out):
    report = chains.verify(source)
    sizes = [t.numel() * t.element_size() for f in source.glob("*.safetensors") for t in load_file(f).values()]
    assert report == {
        "directory": str(source),
        "tensors": len(sizes),
        "bytes": sum(sizes),
        "edited": [],
        "chain": [],
        "recovered": False,
    }
    assert chains.verify(out)["edited"] == [NAMES["llama"]]
    link = {"place": "rome_fast/0001", "method": "c-rome", "requests": 1, "edited": [NAMES["llama"]]}
    assert chains.verify(out)["chain"] == [link]


def test_verify_lists_every_fault(out):
    tensors = {path: load_file(path) for path in out.glob("model*.safetensors")}
    for path, held in tensors.items():
        for name in (NAMES["llama"], "lm_head.weight"):
            if name in held:
                held[name].view(-1)[3] = torch.nan if name == "lm_head.weight" else 7
                save_file(held, path, {"format": "pt"})
    (out / DELTA_FILE).write_bytes(b"no delta")
    with pytest.raises(CheckpointError) as caught:
        chains.verify(out)
    for fault in ("lm_head.weight contains NaN", "down_proj.weight was changed after the edit", DELTA_FILE):
        assert fault in str(caught.value)


def test_verify_of_what_is_cut(out):
    path = next(out.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002.*damaged"):
        chains.verify(out)


# Code of strangers


@pytest.mark.parametrize("memory", [None, 250_000])
def test_no_code_of_the_directory_runs(memory, tmp_path, source, monkeypatch):
    """Neither that of a model nor that of a tokenizer, whatever config.json says; with trust_remote_code it does."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    marker = tmp_path / "ran"
    (source / "modeling_own.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
        "class OwnConfig(C): pass\n"
        "class OwnModel(M): config_class = OwnConfig\n"
    )
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (source / "config.json").write_text(json.dumps(config))
    edit_checkpoint(source, tmp_path / "out", END, memory=memory)
    checkpoints.load(source)
    assert not marker.exists()
    assert (tmp_path / "out" / "modeling_own.py").exists()
    edit_checkpoint(source, tmp_path / "trusted", END, memory=memory, trust_remote_code=True)
    assert marker.exists()
    assert contents(tmp_path / "trusted").keys() == contents(tmp_path / "out").keys()


def test_a_pickle_says_how_to_convert_it(tmp_path, toy_tokenizers):
    """It is not opened to find that out."""
    toy_tokenizers[True].save_pretrained(tmp_path / "source")
    toy_model("llama").config.save_pretrained(tmp_path / "source")
    marker = tmp_path / "ran"
    program = f"cbuiltins\nexec\n(Vopen({str(marker)!r}, 'w')\ntR."
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(program.encode())
    with pytest.raises(CheckpointError, match=r"a pickle, which can run code .*from_pretrained\(.*save_pretrained\("):
        edit_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not marker.exists()
