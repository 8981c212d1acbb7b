"""Edited copies: what is in them, and what is refused before anything is written."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from on_disk import (
    INDEX,
    NAMES,
    digests,
    edits_for,
    header_json,
)
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.weights import Checkpoint, save_tensors, write_edited
from rome_fast.weights import files as files_module
from rome_fast.weights.files import copy_file, sha256_file


def test_only_the_edited_bytes_differ(source, tmp_path):
    before, edits = digests(source), edits_for(source)
    (source / "empty.txt").touch()
    before["empty.txt"] = sha256_file(source / "empty.txt")
    out = tmp_path / "out"
    write_edited(source, out, edits, {"edit.json": b"{}", "note.txt": lambda path: path.write_text("made")})
    assert digests(source) == before
    assert {p.name for p in out.iterdir()} == {*before, "edit.json", "note.txt"}
    assert ((out / "edit.json").read_bytes(), (out / "note.txt").read_text()) == (b"{}", "made")
    checkpoint = Checkpoint.open(source)
    edited = {checkpoint.shard_of(name) for name in edits}
    after = digests(out)
    assert {name for name in before if after[name] != before[name]} == edited
    for shard in edited:
        start, header = header_json(source / shard)
        expected = bytearray((source / shard).read_bytes())
        for name, tensor in edits.items():
            if checkpoint.shard_of(name) == shard:
                begin, end = header[name]["data_offsets"]
                expected[start + begin : start + end] = tensor.numpy().tobytes()
        assert (out / shard).read_bytes() == expected


def test_transformers_loads_the_copy(model, source, tmp_path):
    edits = edits_for(source)
    write_edited(source, tmp_path / "out", edits, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in {**model.state_dict(), **edits}.items():
        assert torch.equal(loaded[name], tensor)


def test_every_layout_of_a_tensor_is_written(tmp_path):
    """Transposed bf16, a scalar, an empty tensor, every second element, a parameter: values, not strides."""
    old = {"t": torch.zeros(3, 5).bfloat16(), "s": torch.tensor(1.0), "e": torch.ones(0, 2), "p": torch.zeros(4)}
    (tmp_path / "source").mkdir()
    save_file(old, tmp_path / "source" / "model.safetensors")
    new = {
        "t": torch.arange(15).reshape(5, 3).bfloat16().T,
        "s": torch.tensor(-0.0),
        "e": torch.zeros(0, 2),
        "p": torch.nn.Parameter(torch.arange(8.0)[::2]),
    }
    write_edited(tmp_path / "source", tmp_path / "out", new, {})
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["t"], new["t"])
    assert got["s"].signbit()
    assert got["p"].tolist() == [0, 2, 4, 6]


def test_symlinked_cache_becomes_a_self_contained_copy(model, source, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    source.rename(blobs)
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../blobs/{blob.name}")
    before, edits = digests(blobs), edits_for(snapshot)
    write_edited(snapshot, tmp_path / "out", edits, {})
    assert digests(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").iterdir())
    shutil.rmtree(blobs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded[NAMES[0]], edits[NAMES[0]])
    assert torch.equal(loaded["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_other_forms_of_the_weights_stay_behind(source, tmp_path):
    wanted = set(digests(source)) | {"tokenizer.json", "modeling_custom.py"}
    other = "pytorch_model.bin pytorch_model.bin.index.json consolidated.safetensors m.onnx m.pt a.h5 x.gguf"
    for name in ("tokenizer.json", "modeling_custom.py", ".hidden", *other.split()):
        (source / name).write_bytes(b"x")
    if not (source / INDEX).exists():
        (source / INDEX).write_text("{}")  # an unused index; in the copy it would name shards that are not there
    (source / "original").mkdir()
    (source / "dangling.bin").symlink_to("gone")
    write_edited(source, tmp_path / "out", {}, {})
    assert set(digests(tmp_path / "out")) == wanted
    (source / "merges.txt").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"links to nothing: merges\.txt"):
        write_edited(source, tmp_path / "again", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_bad_arguments_are_found_before_anything_is_written(source, tmp_path, monkeypatch):
    edits, before = edits_for(source), digests(source)
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    out, listing = tmp_path / "out", sorted(os.listdir(tmp_path))
    monkeypatch.setattr(files_module, "partial", lambda target: pytest.fail("began to write"))
    for path, fault in (
        (tmp_path / "taken", "exists"),
        (tmp_path / "link", "exists"),
        (tmp_path / "no" / "out", "does not exist"),
        (source / "out", "inside the source"),
    ):
        with pytest.raises(ArgumentError, match=fault):
            write_edited(source, path, edits, {})
    shard = Checkpoint.open(source).shard_of(NAMES[0])
    for name in ("../x", "/x", "", ".", "..", ".hidden", "a/b", "a\\b", shard, INDEX):
        with pytest.raises(ArgumentError, match="extra_files: got"):
            write_edited(source, out, edits, {name: b""})
    wrong = {"nope": torch.zeros(1), NAMES[0]: edits[NAMES[0]].T, NAMES[1]: edits[NAMES[1]].half()}
    with pytest.raises(CheckpointError) as caught:
        write_edited(source, out, wrong, {})
    assert "no tensor 'nope'" in str(caught.value)
    assert f"'{NAMES[0]}' is torch.float32 (16, 48) there, got torch.float32 (48, 16)" in str(caught.value)
    assert f"'{NAMES[1]}' is torch.float32 (16, 48) there, got torch.float16 (16, 48)" in str(caught.value)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"bytes needed, 10,000 free"):
        write_edited(source, out, edits, {})
    assert (sorted(os.listdir(tmp_path)), digests(source)) == (listing, before)


def test_a_source_replaced_meanwhile_is_noticed(source, tmp_path, monkeypatch):
    edits = edits_for(source)

    def copy_another(path: Path, target: Path) -> None:
        if path.suffix == ".safetensors":
            save_file({NAMES[0]: torch.zeros(2), NAMES[1]: torch.zeros(2)}, target)
        else:
            copy_file(path, target)

    monkeypatch.setattr(files_module, "copy_file", copy_another)
    with pytest.raises(CheckpointError, match=r"is torch\.float32 \(2,\) there"):
        write_edited(source, tmp_path / "out", edits, {})
    assert os.listdir(tmp_path) == ["source"]


def test_everything_is_on_the_disk_before_it_gets_its_name(source, tmp_path, monkeypatch):
    out, log, real, rename = tmp_path / "out", [], os.fsync, files_module.rename_new

    def record(descriptor: int) -> None:
        real(descriptor)
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(files_module, "rename_new", lambda old, new: (log.append(new), rename(old, new)))
    write_edited(source, out, edits_for(source), {"x": lambda path: path.write_text("x")})
    work = log[0].parent
    assert {path.name for path in log[: log.index(work)]} == set(os.listdir(out))
    assert log[log.index(work) :] == [work, out, tmp_path]
    for shard in {Checkpoint.open(out).shard_of(name) for name in NAMES}:
        assert log.count(work / shard) == 2  # as a copy and again after the edit
    log.clear()
    monkeypatch.setattr(os, "replace", lambda old, new: (log.append(new), os.rename(old, new)))
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert [path.name for path in log] == ["x.safetensors", "x.safetensors", tmp_path.name]


def test_folders_of_the_checkpoint_are_copied(source, tmp_path):
    for name in (
        "1_Pooling/config.json",
        "a/b/c.txt",
        "onnx/model.onnx",
        ".cache/x.json",
        "a/.hidden",
        "a/w.safetensors",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "rome_fast/0001").mkdir(parents=True)
    (source / "rome_fast/0001/w.safetensors").write_text("kept: ours")
    (source / "empty").mkdir()
    (source / "linked").symlink_to("1_Pooling")
    write_edited(source, tmp_path / "out", {}, {"edit.json": b"{}"})
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    # Other forms of the weights, hidden and empty folders stay behind; a linked folder becomes a folder.
    assert found == {
        *(path.name for path in source.iterdir() if path.is_file()),
        "1_Pooling/config.json",
        "linked/config.json",
        "a/b/c.txt",
        "edit.json",
        "rome_fast/0001/w.safetensors",
    }
    assert (tmp_path / "out" / "a/b/c.txt").read_text() == "a/b/c.txt"
    assert not (tmp_path / "out" / "linked").is_symlink()


@pytest.mark.parametrize("target", [".", "..", "../loop"])
def test_a_folder_that_links_to_itself(target, source, tmp_path):
    (source / "loop").mkdir()
    (source / "loop" / "again").symlink_to(target)
    with pytest.raises(CheckpointError, match="links to a folder it is in; remove the link"):
        write_edited(source, tmp_path / "out", {}, {})
    assert os.listdir(tmp_path) == ["source"]


def test_hard_links_on_request(saved, tmp_path):
    """Shards without an edit are the same files; everything else, the small files too, has bytes of its own."""
    source = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    edits, checkpoint = edits_for(source), Checkpoint.open(source)
    edited = {checkpoint.shard_of(name) for name in edits}
    linked = set(checkpoint.shards) - edited
    assert linked
    write_edited(source, tmp_path / "out", edits, {}, link="hard")
    write_edited(source, tmp_path / "copy", edits, {})
    assert digests(tmp_path / "out") == digests(tmp_path / "copy")
    same = {path.name for path in source.iterdir() if path.samefile(tmp_path / "out" / path.name)}
    assert same == linked
    # The hub's cache is made of symbolic links: the file behind one is what gets a second name.
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    write_edited(snapshot, tmp_path / "third", edits, {}, link="hard")
    assert not any(path.is_symlink() for path in (tmp_path / "third").iterdir())
    assert {p.name for p in source.iterdir() if p.samefile(tmp_path / "third" / p.name)} == linked


def test_files_in_our_folder(source, tmp_path):
    """They are added by their path, taken along, left behind on request, and shared by hard links."""
    write_edited(source, tmp_path / "one", {}, {"rome_fast/0001/w.safetensors": b"w", "rome_fast/0001/r.json": b"r"})
    write_edited(tmp_path / "one", tmp_path / "two", {}, {"rome_fast/0002/r.json": b"2"}, link="hard")
    added = {"rome_fast", "rome_fast/0001", "rome_fast/0001/w.safetensors", "rome_fast/0001/r.json"}
    added |= {"rome_fast/0002", "rome_fast/0002/r.json"}
    assert digests(tmp_path / "two").keys() == digests(source).keys() | added
    for name, shared in (("w.safetensors", True), ("r.json", False)):
        one, two = (tmp_path / folder / "rome_fast/0001" / name for folder in ("one", "two"))
        assert (one.read_bytes(), one.samefile(two)) == (two.read_bytes(), shared)
    removed = ["rome_fast/0001/r.json", "config.json"]
    write_edited(tmp_path / "two", tmp_path / "three", {}, {}, remove=removed)
    assert digests(tmp_path / "three").keys() == digests(tmp_path / "two").keys() - {*removed}
    (source / "rome_fast").write_text("a file")
    with pytest.raises(CheckpointError, match="rome_fast: wanted a folder, in which edits are recorded"):
        write_edited(source, tmp_path / "four", {}, {"rome_fast/0001/r.json": b"r"})
    assert not (tmp_path / "four").exists()


def test_links_that_cannot_be(source, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="link: got 'soft', wanted one of copy, hard"):
        write_edited(source, tmp_path / "out", {}, {}, link="soft")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        CheckpointError, match=r"link: .* cannot have a hard link at .*Invalid cross-device link.*; copy it"
    ):
        write_edited(source, tmp_path / "out", {}, {}, link="hard")
    assert os.listdir(tmp_path) == ["source"]
