"""Edited copies that fail half-way: exceptions, full disks, kills, other writers."""

import errno
import os
import random
import shutil
import threading
import time
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
from rome_fast.weights import Checkpoint, load_tensors, restore_tensors, save_tensors, write_edited
from rome_fast.weights import files as files_module


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_an_exception_leaves_nothing_behind(failure, source, tmp_path):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise failure

    with pytest.raises(failure):
        write_edited(source, tmp_path / "out", edits_for(source), {"x": fail})
    assert os.listdir(tmp_path) == ["source"]


@forks
def test_a_full_disk_leaves_nothing_behind(source, tmp_path):
    """Real failures of write(2): no file may grow beyond a limit below the size of one shard."""
    edits, before = edits_for(source), digests(source)
    edited = tmp_path / "edited"
    write_edited(source, edited, edits, {"edit.json": b"{}"})
    kept = digests(edited)
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)}, {})
    originals = {name: Checkpoint.open(source).read(name) for name in edits}

    def child() -> None:
        limit_file_size(6000)
        for attempt in (
            lambda: write_edited(source, tmp_path / "out", edits, {}),
            lambda: restore_tensors(edited, originals, remove=["edit.json"]),
            lambda: save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3000)}, {}),
        ):
            with pytest.raises(CheckpointError, match=r"File too large") as caught:
                attempt()
            assert "ulimit" in str(caught.value) or "x.safetensors" in str(caught.value)

    assert in_child(child) == 0
    assert sorted(os.listdir(tmp_path)) == ["edited", "source", "x.safetensors"]
    assert (digests(source), digests(edited)) == (before, kept)
    assert load_tensors(tmp_path / "x.safetensors")[0]["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("call", ["fsync", "copy_file_range"])
def test_no_space_at_any_call_leaves_nothing_behind(call, source, tmp_path, monkeypatch):
    edits, real = edits_for(source), getattr(os, call)
    write_edited(source, tmp_path / "out", edits, {})
    for failing in range(1, 100):
        shutil.rmtree(tmp_path / "out")
        left = [failing]

        def fail_once(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail_once)
            try:
                write_edited(source, tmp_path / "out", edits, {})
            except CheckpointError as error:
                assert "No space left on device; free some space" in str(error)  # noqa: PT017, the last one succeeds
        if left[0] > 0:
            break
        if (tmp_path / "out").exists():  # the parent's fsync, after the rename
            assert call == "fsync"
        else:
            assert os.listdir(tmp_path) == ["source"]
            (tmp_path / "out").mkdir()
    assert failing > 5
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@forks
def test_kill_9_at_any_moment_of_a_write(saved, tmp_path):
    source = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    edits, before, out = edits_for(source), digests(source), tmp_path / "out"

    def write() -> None:
        write_edited(source, out, edits, {"edit.json": b"{}"})

    lines = lines_executed(write)
    complete = digests(out)
    shutil.rmtree(out)
    started = time.perf_counter()
    write()
    duration = time.perf_counter() - started
    shutil.rmtree(out)
    rng, survived, strays = random.Random(0), 0, 0
    at_lines = [(killed_at_line, rng.randrange(n, n + lines // 20)) for n in range(1, lines, lines // 20)]
    for kill, moment in at_lines + [(killed_after, rng.uniform(0, 1.5) * duration) for _ in range(20)]:
        kill(write, moment)
        assert digests(source) == before
        strays += any(tmp_path.glob(".out.*.partial"))
        if out.exists():
            survived += 1
            assert digests(out) == complete
            shutil.rmtree(out)
        write()
        assert digests(out) == complete
        assert sorted(os.listdir(tmp_path)) == ["out", "source"]
        shutil.rmtree(out)
    assert 0 < survived < 30
    assert strays > 10


def test_only_abandoned_directories_of_the_same_target_are_removed(source, tmp_path):
    dead = tmp_path / ".out.0123456789abcdef.partial"
    others = [".out.partial", ".out.0123456789abcdef", ".out.x.0123456789abcdef.partial", ".o.0123456789abcdef.partial"]
    for name in (dead.name, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / ".out.fedcba9876543210.partial").symlink_to(others[0])
    write_edited(source, tmp_path / "out", {}, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".out.fedcba9876543210.partial", "out", "source"])
    assert all(os.listdir(tmp_path / name) == ["x"] for name in others)


def test_a_living_writer_keeps_its_directory(source, tmp_path):
    out = tmp_path / "out"

    def overtake(path: Path) -> None:
        (mine,) = tmp_path.glob(".out.*.partial")
        write_edited(source, out, {}, {})
        assert mine.is_dir()
        shutil.rmtree(out)
        path.touch()

    write_edited(source, out, {}, {"x": overtake})
    assert set(digests(out)) == {*digests(source), "x"}
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("opened", [False, True])
def test_a_directory_taken_before_it_was_locked_is_made_again(opened, source, tmp_path, monkeypatch):
    real, taken = os.open, []

    def take(path, *arguments, **keywords):
        if taken or not str(path).endswith(".partial"):
            return real(path, *arguments, **keywords)
        taken.append(path)
        descriptor = real(path, *arguments, **keywords) if opened else None
        os.rmdir(path)
        return descriptor or real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", take)
    write_edited(source, tmp_path / "out", {}, {})
    assert len(taken) == 1
    assert digests(tmp_path / "out") == digests(source)


def test_an_out_that_appears_meanwhile_is_kept(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="appeared meanwhile"):
        write_edited(source, out, {}, {"x": lambda path: (path.touch(), out.mkdir())[1]})
    assert os.listdir(out) == []
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("exclusive", [True, False])
def test_of_two_writers_one_wins(exclusive, source, tmp_path, monkeypatch):
    if not exclusive:
        monkeypatch.setattr(files_module.ctypes, "CDLL", lambda *_, **__: object())
    edits, barrier, outcomes = edits_for(source), threading.Barrier(2, timeout=20), {}

    def write(who: int) -> None:
        def meet(path: Path) -> None:
            path.write_text(str(who))
            barrier.wait()

        try:
            changed = {name: tensor + who for name, tensor in edits.items()}
            write_edited(source, tmp_path / "out", changed, {"who": meet})
            outcomes[who] = None
        except ArgumentError as error:
            outcomes[who] = str(error)

    threads = [threading.Thread(target=write, args=(who,)) for who in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0, 1]
    (winner,) = [who for who, error in outcomes.items() if error is None]
    assert "appeared meanwhile" in outcomes[1 - winner]
    assert (tmp_path / "out" / "who").read_text() == str(winner)
    assert torch.equal(Checkpoint.open(tmp_path / "out").read(NAMES[0]), edits[NAMES[0]] + winner)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
