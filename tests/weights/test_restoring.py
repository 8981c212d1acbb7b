"""Putting the original bytes back."""

import random
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch

from on_disk import (
    INDEX,
    NAMES,
    digests,
    edits_for,
    forks,
    killed_at_line,
    lines_executed,
)
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.weights import Checkpoint, restore_tensors, write_edited


def test_restore_gives_back_every_byte(source, tmp_path):
    edits, before, out = edits_for(source), digests(source), tmp_path / "out"
    originals = {name: Checkpoint.open(source).read(name) for name in edits}
    write_edited(source, out, edits, {"edit.json": b"{}", "originals.safetensors": b"x"})
    for shard in out.glob("*.safetensors"):
        shard.chmod(0o640)
    restore_tensors(out, originals, remove=["edit.json", "originals.safetensors", "absent"])
    assert digests(out) == before
    assert {stat.S_IMODE(shard.stat().st_mode) for shard in out.glob("*.safetensors")} == {0o640}
    restore_tensors(out, originals)
    assert digests(out) == before


def test_restore_refuses_before_writing(source, tmp_path, monkeypatch):
    edits, before = edits_for(source), digests(source)
    for name in ("../x", ".hidden", INDEX, Checkpoint.open(source).shard_of(NAMES[0])):
        with pytest.raises(ArgumentError, match="remove: got"):
            restore_tensors(source, edits, remove=[name])
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        restore_tensors(source, {**edits, "nope": torch.zeros(1)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="10 free"):
        restore_tensors(source, edits)
    assert digests(source) == before


@forks
def test_kill_9_at_any_moment_of_a_restore(saved, tmp_path):
    source, out = Path(shutil.copytree(saved / "sharded", tmp_path / "source")), tmp_path / "out"
    edits, before = edits_for(source), digests(source)
    originals = {name: Checkpoint.open(source).read(name) for name in edits}
    assert len({Checkpoint.open(source).shard_of(name) for name in edits}) == 2
    write_edited(source, tmp_path / "kept", edits, {"edit.json": b"{}"})
    edited = digests(tmp_path / "kept")

    def restore() -> None:
        restore_tensors(out, originals, remove=["edit.json"])

    shutil.copytree(tmp_path / "kept", out)
    lines = lines_executed(restore)
    rng, states = random.Random(0), set()
    for start in range(1, lines, lines // 20):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        assert killed_at_line(restore, rng.randrange(start, start + lines // 20)) in (0, -signal.SIGKILL)
        now = {name: digest for name, digest in digests(out).items() if not name.startswith(".")}
        for name, digest in now.items():
            assert digest in (edited[name], before.get(name))
        restored = sum(now[name] == before[name] != edited[name] for name in before)
        states.add(restored)
        assert "edit.json" in now or restored == 2
        restore()
        assert digests(out) == before
    assert states >= {0, 2}
