"""Changes in place: after a kill at any moment the old checkpoint or, once recovered, the new one; never a mixture."""

import errno
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from on_disk import (
    NAMES,
    digests,
    edits_for,
    forks,
    in_child,
    killed_after,
    killed_at_line,
    limit_file_size,
    lines_executed,
)
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.weights import Checkpoint, change, changing, recover
from rome_fast.weights import checkpoint as checkpoint_module
from rome_fast.weights.checkpoint import JOURNAL


def visible(directory):
    return {name: digest for name, digest in digests(directory).items() if not name.startswith(".")}


def changed(directory, edits, files):
    with changing(directory):
        change(directory, edits, extra_files=files, remove=["old.txt", "rome_fast/0001/old.json"])


@pytest.fixture
def prepared(saved, tmp_path):
    """A checkpoint whose edit touches two shards, adds three files, replaces one and removes two, with their folder."""
    source = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    (source / "old.txt").write_text("old")
    (source / "record.json").write_text("old record")
    (source / "rome_fast" / "0001").mkdir(parents=True)
    (source / "rome_fast" / "0001" / "old.json").write_text("old")
    edits = edits_for(source)
    files = {"record.json": b"{}", "new.txt": lambda path: path.write_text("made")}
    files["rome_fast/0002/w.safetensors"] = b"new"
    assert len({Checkpoint.open(source).shard_of(name) for name in edits}) == 2
    return source, edits, files


def test_a_change_is_what_was_asked_for(prepared, tmp_path):
    source, edits, files = prepared
    before, stored = digests(source), Checkpoint.open(source)
    untouched = {name: stored.read(name) for name in stored.names() if name not in edits}
    changed(source, edits, files)
    after = digests(source)
    shards = {stored.shard_of(name) for name in edits}
    gone = {"old.txt", "rome_fast/0001", "rome_fast/0001/old.json"}
    assert after.keys() == before.keys() - gone | {"new.txt", "rome_fast/0002", "rome_fast/0002/w.safetensors"}
    assert {name for name in before if name in after and after[name] != before[name]} == shards | {"record.json"}
    again = Checkpoint.open(source)
    for name, tensor in {**untouched, **edits}.items():
        assert torch.equal(again.read(name), tensor)


@forks
def test_kill_9_at_any_moment_of_a_change(prepared, tmp_path):
    """Moments are lines of the code, and a few of the clock."""
    source, edits, files = prepared
    kept, old = tmp_path / "kept", digests(source)
    shutil.copytree(source, kept)

    def run() -> None:
        changed(source, edits, files)

    lines = lines_executed(run)
    new = digests(source)
    rng, found = random.Random(0), {"old": 0, "new": 0, "between": 0}
    moments = [(killed_at_line, n) for n in range(1, lines + 1, max(1, lines // 15))]
    # More of them towards the end, where files are moved.
    moments += [(killed_at_line, n) for n in range(lines - 60, lines + 1, 4)]
    moments += [(killed_after, rng.uniform(0, 0.05)) for _ in range(5)]
    for kill, moment in moments:
        shutil.rmtree(source)
        shutil.copytree(kept, source)
        assert kill(run, moment) in (0, -signal.SIGKILL)
        decided = (source / JOURNAL / "manifest.json").exists()
        at_once = visible(source)
        for name, digest in at_once.items():
            assert digest in (old.get(name), new.get(name)), name
        recover(source)
        end = visible(source)
        assert end in (old, new)
        assert not decided or end == new
        found["old" if end == old else "new"] += 1
        found["between"] += at_once not in (old, new)
        if end == old:
            run()
        assert digests(source) == new
    assert min(found.values()) >= 2, found


@forks
def test_kill_9_at_any_moment_of_a_recovery(prepared, tmp_path, monkeypatch):
    source, edits, files = prepared
    decided = tmp_path / "decided"

    def stop(directory: Path) -> None:
        if (directory / JOURNAL).exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_complete", stop)
        with pytest.raises(KeyboardInterrupt):
            changed(source, edits, files)
    shutil.copytree(source, decided)
    lines = lines_executed(lambda: recover(source))
    new = digests(source)
    assert torch.equal(Checkpoint.open(source).read(NAMES[0]), edits[NAMES[0]])
    for line in range(1, lines + 1, 3):
        shutil.rmtree(source)
        shutil.copytree(decided, source)
        assert killed_at_line(lambda: recover(source), line) in (0, -signal.SIGKILL)
        recover(source)
        assert digests(source) == new


def test_another_name_of_a_shard_keeps_its_bytes(prepared, tmp_path):
    """A hard link, and the symbolic links of the hub's cache: the file that others see is never written."""
    source, edits, files = prepared
    stored = Checkpoint.open(source)
    first, second = (source / stored.shard_of(name) for name in NAMES)
    os.link(first, tmp_path / "hard.safetensors")
    second.rename(tmp_path / "blob")
    second.symlink_to(tmp_path / "blob")
    before = [(tmp_path / name).read_bytes() for name in ("hard.safetensors", "blob")]
    changed(source, edits, files)
    assert [(tmp_path / name).read_bytes() for name in ("hard.safetensors", "blob")] == before
    for name in NAMES:
        assert torch.equal(Checkpoint.open(source).read(name), edits[name])


def test_of_two_editors_one_wins(prepared):
    source, edits, files = prepared
    inside, done = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        path.write_text("slow")
        inside.set()
        assert done.wait(20)

    winner = threading.Thread(target=changed, args=(source, edits, {"new.txt": slow}))
    winner.start()
    assert inside.wait(20)
    before = digests(source)
    with pytest.raises(CheckpointError, match="another process is changing it; run again when that is done"):
        changed(source, edits, files)
    assert digests(source) == before
    done.set()
    winner.join()
    assert (source / "new.txt").read_text() == "slow"
    changed(source, edits, files)


@forks
def test_a_dead_editor_holds_nothing(prepared):
    source, edits, files = prepared

    def die() -> None:
        with changing(source):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    changed(source, edits, files)


def test_bad_arguments_are_found_before_anything_is_written(prepared, monkeypatch):
    source, edits, files = prepared
    before = digests(source)
    shard = Checkpoint.open(source).shard_of(NAMES[0])
    for name in ("../x", "a/b", ".hidden", "", shard, "rome_fast", "rome_fast/../x", "rome_fast/.x", "rome_fast//x"):
        with pytest.raises(ArgumentError, match="extra_files: got"):
            changed(source, edits, {name: b""})
        with pytest.raises(ArgumentError, match="remove: got"), changing(source):
            change(source, edits, remove=[name])
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        changed(source, {"nope": torch.zeros(1)}, files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="10 free"):
        changed(source, edits, files)
    assert digests(source) == before


@pytest.mark.parametrize("call", ["fsync", "copy_file_range", "replace"])
def test_an_error_at_any_call_leaves_old_or_new(call, prepared, monkeypatch, tmp_path):
    """Disk full, or an error of the device; where it comes after the decision, the next command completes it."""
    source, edits, files = prepared
    kept, old = Path(shutil.copytree(source, tmp_path / "kept")), digests(source)
    changed(source, edits, files)
    new, real, ends = digests(source), getattr(os, call), []
    for failing in range(1, 60):
        shutil.rmtree(source)
        shutil.copytree(kept, source)
        left = [failing]

        def fail_once(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_once)
            try:
                changed(source, edits, files)
            except CheckpointError as error:
                assert "No space left on device; free some space" in str(error)  # noqa: PT017, the last one succeeds
        if left[0] > 0:
            break
        recover(source)
        assert digests(source) in (old, new)
        ends.append(digests(source) == new)
    assert digests(source) == new
    assert len(ends) >= (2 if call == "copy_file_range" else 3)
    # Once decided, it stays decided.
    assert ends == sorted(ends)


@forks
def test_a_full_disk_leaves_the_old_checkpoint(prepared):
    source, edits, files = prepared
    before = digests(source)

    def child() -> None:
        limit_file_size(6000)
        with pytest.raises(CheckpointError, match="File too large"):
            changed(source, edits, files)

    assert in_child(child) == 0
    assert digests(source) == before


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        json.dumps({"replace": ["../evil"], "remove": []}).encode(),
        json.dumps({"replace": [], "remove": ["../../etc/passwd"]}).encode(),
        json.dumps({"replace": [3], "remove": []}).encode(),
        json.dumps({"replace": [".hidden"], "remove": []}).encode(),
        json.dumps({"replace": ["rome_fast/../../evil"], "remove": []}).encode(),
        json.dumps({"replace": [], "remove": ["other/file"]}).encode(),
    ],
)
def test_a_journal_from_a_stranger_is_not_trusted(manifest, prepared, tmp_path):
    source, _, _ = prepared
    (tmp_path / "evil").write_text("precious")
    (source / JOURNAL).mkdir()
    (source / JOURNAL / "manifest.json").write_bytes(manifest)
    before = visible(source)
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged .*remove"):
        recover(source)
    assert visible(source) == before
    assert (tmp_path / "evil").read_text() == "precious"


@pytest.mark.parametrize("below", ["", "/0002"])
def test_a_folder_of_ours_that_is_a_link_is_not_followed(below, prepared, tmp_path):
    """A checkpoint from a stranger could have files of this machine overwritten."""
    source, edits, files = prepared
    (tmp_path / "home").mkdir()
    if below:
        (source / "rome_fast/0002").symlink_to(tmp_path / "home")
    else:
        shutil.rmtree(source / "rome_fast")
        (source / "rome_fast").symlink_to(tmp_path / "home")
    before = digests(source)
    with pytest.raises(CheckpointError, match=rf"rome_fast{below}: wanted a folder, .*; remove or rename this one"):
        changed(source, edits, files)
    (source / JOURNAL / "rome_fast/0002").mkdir(parents=True)
    (source / JOURNAL / "rome_fast/0002/w.safetensors").write_text("theirs")
    manifest = {"replace": ["rome_fast/0002/w.safetensors"], "remove": []}
    (source / JOURNAL / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="wanted a folder"):
        recover(source)
    shutil.rmtree(source / JOURNAL)
    assert digests(source) == before
    assert list((tmp_path / "home").iterdir()) == []


def test_nothing_to_recover_is_nothing_done(prepared):
    source, _, _ = prepared
    before = digests(source)
    assert not recover(source)
    assert not recover(source / "missing")
    assert digests(source) == before
