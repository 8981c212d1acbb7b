"""Runs that are killed and go on: at any moment, to the bit, and with damaged or unwritable snapshots."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers import LAYER
from rome_fast import Statistics, collect_statistics
from rome_fast.cli import main
from rome_fast.errors import CheckpointError, StatisticsError
from rome_fast.statistics import collect, reading, snapshots
from rome_fast.weights import files, read_header
from toys import D_FF, SENTENCES, save_toy, toy_model

TOKENS = 700
KILLS = 12


@pytest.fixture(autouse=True)
def many_snapshots(monkeypatch):
    """A snapshot after every batch, of which a toy's corpus gives many."""
    monkeypatch.setattr(snapshots, "_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(snapshots, "_MOST_SHARE", float("inf"))
    monkeypatch.setitem(collect._BATCH_TOKENS, "cpu", 32)
    monkeypatch.setattr(reading, "_WINDOW_BATCHES", 4)


@pytest.fixture
def work(toy_tokenizers):
    """A function of (out, options) that collects."""
    model = toy_model("gpt2")

    def run(out, texts=SENTENCES, **options):
        return collect_statistics(
            model, toy_tokenizers[False], texts, [0, LAYER], TOKENS, max_length=16, out=out, **options
        )

    return run


def snapshot_files(out):
    return sorted(out.glob("unfinished-*/rank-0-of-1/snapshot-*"))


def same(got, wanted):
    assert got.layers.keys() == wanted.layers.keys()
    for layer, entry in wanted.layers.items():
        assert torch.equal(got.layers[layer].moment, entry.moment)
        assert (got.layers[layer].tokens, got.layers[layer].provenance) == (entry.tokens, entry.provenance)


class Killed(BaseException):
    """Not an Exception: nothing in the package may take it for an ordinary fault."""


def stop_after(count):
    """A progress callback that ends the run in the middle of its work."""
    calls = 0

    def progress(_done, _total):
        nonlocal calls
        calls += 1
        if calls > count:
            raise Killed

    return progress


def test_a_finished_run_leaves_its_result_and_nothing_else(work, tmp_path):
    statistics = work(tmp_path)
    same(Statistics.load(tmp_path), statistics)
    same(work(None), statistics)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]


def test_what_was_done_is_not_done_again(work, tmp_path):
    with pytest.raises(Killed):
        work(tmp_path, progress=stop_after(9))
    assert len(snapshot_files(tmp_path)) == 2
    seen = []
    same(work(tmp_path, progress=lambda *now: seen.append(now[0])), work(None))
    whole = []
    work(None, progress=lambda *now: whole.append(now[0]))
    # The tenth batch was interrupted before its snapshot.
    assert seen == whole[9:]


def killed_child(task, moment, name):
    """Run `task` in a forked process that ends at the given call of os.replace, fsync or a batch, as kill -9 would."""
    child = os.fork()
    if child == 0:
        try:
            calls = 0
            module, attribute = {
                "rename": (os, "replace"),
                "sync": (files, "sync"),
                "batch": (collect, "_add_batches"),
            }[name]
            original = getattr(module, attribute)

            def counted(*arguments):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os._exit(9)
                return original(*arguments)

            setattr(module, attribute, counted)
            task()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_every_step_of_a_snapshot(work, tmp_path, one_thread):
    """Before and after a snapshot's bytes are synced, before it is renamed, and in the middle of a batch."""
    wanted = work(None)
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        name = moments.choice(["rename", "sync", "batch"])
        killed += killed_child(lambda: work(tmp_path), moments.randint(1, 3), name)
    assert killed == KILLS
    assert snapshot_files(tmp_path)
    same(work(tmp_path), wanted)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_random_moments(work, tmp_path, one_thread, monkeypatch):
    """Whatever it does then: reading, summing, writing a snapshot or the result, or removing snapshots.

    Moments are in seconds of the processor, so that they are the same on a busy machine. A run goes on where the one
    before it was killed: a third of the whole is enough to get to any point of it.
    """
    # What a process has written outlives it without; waiting for the disk would be most of the time.
    monkeypatch.setattr(files, "sync", lambda *_: None)

    def ended(out, after=0.0):
        """The signal that ended a run, or 0, and its seconds of the processor; it is to end after so many of them."""
        child = os.fork()
        if child == 0:
            try:
                # SIGPROF, which nobody handles, ends a process as suddenly as SIGKILL.
                signal.setitimer(signal.ITIMER_PROF, after)
                work(out)
            finally:
                os._exit(0)
        _, status, used = os.wait4(child, 0)
        return status, used.ru_utime + used.ru_stime

    wanted = work(None)
    status, whole = ended(tmp_path / "undisturbed")
    assert status == 0
    out = tmp_path / "out"
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        status, _ = ended(out, moments.uniform(0.001, whole / 3))
        if status == signal.SIGPROF:
            kills += 1
        else:
            # It had come to its end before.
            same(Statistics.load(out), wanted)
            shutil.rmtree(out)
    same(work(out), wanted)
    assert sorted(file.name for file in out.iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]


def test_going_on_takes_no_second_copy_of_the_sums(work, tmp_path):
    with pytest.raises(Killed):
        work(tmp_path, progress=stop_after(9))
    totals = {layer: torch.zeros(D_FF, D_FF, dtype=torch.float64) for layer in (0, LAYER)}
    (folder,) = tmp_path.glob("unfinished-*")
    kept = snapshots.Snapshots(tmp_path, {}, 0, 1)
    kept.folder = folder / "rank-0-of-1"
    state = read_header(snapshot_files(tmp_path)[0]).metadata["state"]
    kept._run = json.loads(state)["run"]
    sums = kept.latest(totals)
    assert sums.totals is totals
    assert sums.tokens > 0
    assert all(float(total.diagonal().min()) > 0 for total in totals.values())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_same_command_goes_on_after_kill_9(tmp_path, toy_tokenizers, one_thread, monkeypatch, capsys):
    """A real SIGKILL, at whatever moment it comes."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    Path("corpus.txt").write_text("\n\n".join(SENTENCES * 8))
    command = ["statistics", "model", "--corpus", "corpus.txt", "--tokens", "6000", "--device", "cpu", "--out"]
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(main([*command, "killed"]))
        before = newest(Path("killed"))
        while newest(Path("killed")) - before < 5:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not list(Path("killed").glob("layer-*"))
    assert main([*command, "killed"]) == 0
    assert re.search(r"going on from [\d,]+ of 6,000 tokens, which an interrupted run", capsys.readouterr().err)
    assert main([*command, "whole"]) == 0
    same(Statistics.load("killed"), Statistics.load("whole"))
    assert sorted(file.name for file in Path("killed").iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]


def newest(out):
    """The number of the newest complete snapshot in a folder."""
    numbers = [0]
    for file in snapshot_files(out):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        numbers.append(json.loads(header["__metadata__"]["state"])["number"])
    return max(numbers)


# Damaged, foreign and unwritable snapshots


@pytest.fixture
def interrupted(work, tmp_path):
    with pytest.raises(Killed):
        work(tmp_path, progress=stop_after(9))
    old, new = sorted(snapshot_files(tmp_path), key=lambda file: file.stat().st_mtime_ns)
    return old, new


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "state"])
def test_a_damaged_snapshot_gives_way_to_the_one_before(damage, interrupted, work, tmp_path):
    """A flipped bit in the sums would not show in the header, nor one in the number of tokens."""
    content = bytearray(interrupted[1].read_bytes())
    if damage == "cut":
        del content[-100:]
    elif damage == "empty":
        content.clear()
    elif damage == "flipped":
        content[-1000] ^= 4
    else:
        place = content.index(b'tokens\\": ') + 10
        content[place] = ord("7") if content[place] != ord("7") else ord("8")
    interrupted[1].write_bytes(content)
    with pytest.warns(UserWarning, match=rf"(?s){interrupted[1].name}.*going on from the other one, at \d+ tok"):
        got = work(tmp_path)
    same(got, work(None))


def test_two_damaged_snapshots_mean_the_beginning(interrupted, work, tmp_path):
    for file in interrupted:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged.*; beginning anew"):
        got = work(tmp_path)
    same(got, work(None))


def test_a_full_disk_is_one_error_and_nothing_is_lost(interrupted, work, tmp_path, monkeypatch):
    before = [file.read_bytes() for file in interrupted]

    def full(_path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*free some space.*nothing is lost") as caught:
            work(tmp_path)
    assert str(caught.value).count("No space left") == 1
    assert [file.read_bytes() for file in interrupted] == before
    same(work(tmp_path), work(None))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_disk_that_is_really_full(interrupted, work, tmp_path, one_thread):
    """The system itself refuses to write on, in the middle of a snapshot."""
    before = [file.read_bytes() for file in interrupted]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) // 2,) * 2)
            work(tmp_path)
        except CheckpointError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        assert re.search(r"writing .*snapshot-.*File too large.*; nothing is lost: the same command", said.read())
    assert [file.read_bytes() for file in interrupted] == before
    assert not list(tmp_path.rglob("*.partial"))
    same(work(tmp_path), work(None))


def test_a_result_that_cannot_be_written_leaves_the_snapshots(work, tmp_path, monkeypatch):
    wanted = work(None)

    def full(*_):
        raise CheckpointError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Statistics, "save", full)
        with pytest.raises(CheckpointError, match="No space"):
            work(tmp_path)
    seen = []
    same(work(tmp_path, progress=lambda *now: seen.append(now)), wanted)
    assert seen == []


@pytest.mark.parametrize(("changed", "window_batches"), [(0, 4), (7, 4), (0, 1000), (15, 1000)])
def test_another_corpus_is_not_mixed_in(changed, window_batches, work, tmp_path, monkeypatch):
    """Whether the change is before the place to go on from, or among rows that are half done."""
    monkeypatch.setattr(reading, "_WINDOW_BATCHES", window_batches)
    with pytest.raises(Killed):
        work(tmp_path, progress=stop_after(9))
    texts = list(SENTENCES)
    texts[changed] = texts[changed].upper()
    with pytest.raises(StatisticsError, match="texts: got others than when the run began that is to be resumed"):
        work(tmp_path, texts=texts)


@pytest.mark.parametrize("change", [{"layers": [0]}, {"tokens": 600}, {"max_length": 8}, {"model": "another"}])
def test_another_run_begins_anew_and_leaves_the_interrupted_one_alone(change, interrupted, tmp_path, toy_tokenizers):
    usual = {"layers": [0, LAYER], "tokens": TOKENS, "max_length": 16, "model": toy_model("gpt2")}
    if change == {"model": "another"}:
        change = {"model": toy_model("gpt2", seed=1)}
    arguments = {"tokenizer": toy_tokenizers[False], "texts": SENTENCES, **usual, **change}
    before = [file.read_bytes() for file in interrupted]
    same(collect_statistics(**arguments, out=tmp_path), collect_statistics(**arguments))
    assert [file.read_bytes() for file in interrupted] == before


def test_two_processes_do_not_write_the_same_snapshots(work, tmp_path):
    """Each would take up what the other one has done, and forget what itself had."""

    def second(_done, _total):
        with pytest.raises(StatisticsError, match="out: another process is collecting the same statistics"):
            work(tmp_path)
        raise Killed

    calls = iter([lambda *_: None, second])
    with pytest.raises(Killed):
        work(tmp_path, progress=lambda *now: next(calls)(*now))
    same(work(tmp_path), work(None))


def test_keys_that_are_not_finite_are_noticed_at_the_next_snapshot(toy_tokenizers, tmp_path):
    model = toy_model("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.weight")[0, 0] = float("nan")
    seen = []
    with pytest.raises(StatisticsError, match="keys of layer 1 contain NaN"):
        collect_statistics(
            model, toy_tokenizers[False], SENTENCES, [LAYER], out=tmp_path, progress=lambda *now: seen.append(now)
        )
    assert len(seen) == 1
    assert snapshot_files(tmp_path) == []


def test_out_that_cannot_be_a_folder(work, tmp_path):
    """Said before anything is collected."""
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(CheckpointError, match=r"writing .*file: Not a directory"):
        work(tmp_path / "file", progress=lambda *now: seen.append(now))
    assert seen == []


def test_snapshots_take_a_small_share_of_the_time(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(snapshots, "_EVERY_SECONDS", 5.0)
    monkeypatch.setattr(snapshots, "_MOST_SHARE", 0.05)
    monkeypatch.setattr(snapshots.time, "monotonic", lambda: now[0])
    kept = snapshots.Snapshots(tmp_path, {}, 0, 1)
    kept._cost = 2.0
    due = []
    for now[0] in (4.0, 6.0, 39.0, 41.0):
        due.append(kept.due())
    assert due == [False, False, False, True]
    kept._cost = 0.01
    now[0] = 6.0
    assert kept.due()
