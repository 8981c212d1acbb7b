"""The folder of a ledger: whole after any kill, and one writer at a time."""

import errno
import os
import shutil
import signal

import pytest

from ledgers import (
    MADE,
    OTHERS,
    SEVERAL,
    USUAL,
    asked,
    bytes_of,
    fresh,
    of_pool,
    requests,
    values_of,
)
from on_disk import forks, in_child
from rome_fast import Edit, Ledger
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.weights.files import locked
from toys import save_toy

pytestmark = pytest.mark.usefixtures("empty_cache")


def killed_at(call, act, half=False):
    """Exit status of `act` in a process that dies at its n-th call that changes the disk; `half` writes half before."""
    count = 0

    def dying(name, original):
        def called(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == call:
                if half and name == "write":
                    original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return called

    def child():
        for name in ("write", "fsync", "ftruncate", "replace", "rename", "unlink", "mkdir"):
            setattr(os, name, dying(name, getattr(os, name)))
        act()

    return in_child(child)


@forks
@pytest.mark.parametrize("kind", ["add", "replace", "remove", "merge", "compact"])
def test_kill_9_at_every_change_of_the_disk(kind, make, pool, tmp_path, one_thread):
    """The state is that before or that after, either closes as it should, and the same call then succeeds."""
    other = fresh(make, pool, "other", SEVERAL[:3])
    ledger = fresh(make, pool, "base", [OTHERS[3], OTHERS[4]])
    kept = shutil.copytree(ledger.folder, tmp_path / "kept")
    # The values come from another folder, since nothing may be searched in a child.
    found = values_of(pool, [SEVERAL[0], SEVERAL[3]])

    def put(event, edits, removed=()):
        with ledger._store.writing(None, None) as events:
            ids = [entry.id for entry in of_pool(pool, edits)]
            new = {id: found[id] for id in ids}
            gone = [entry.id for entry in of_pool(pool, removed)]
            ledger._store.append(event, events, None, None, added=of_pool(pool, edits), removed=gone, values=new)

    acts = {
        "add": lambda: put("add", [SEVERAL[0]]),
        "replace": lambda: put("replace", [SEVERAL[3]], [OTHERS[3]]),
        "remove": lambda: ledger.remove(subject="Apple"),
        "merge": lambda: ledger.merge(other, prefer="theirs"),
        "compact": lambda: ledger.compact(),
    }
    act, call, seen = acts[kind], 0, set()
    old = asked(ledger), bytes_of(ledger.close())
    act()
    new = asked(ledger), bytes_of(ledger.close())
    while True:
        call += 1
        shutil.rmtree(ledger.folder)
        shutil.copytree(kept, ledger.folder)
        status = killed_at(call, act, half=call % 2 == 0)
        state = asked(ledger), bytes_of(ledger.close())
        assert state in (old, new)
        seen.add((status, state == new))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        if state == old:
            act()
        assert (asked(ledger), bytes_of(ledger.close())) == new
    # It was killed before the decision; of compaction, both sides of it are one state.
    assert (-signal.SIGKILL, kind == "compact") in seen
    assert call > 2
    assert not list(ledger.folder.rglob("*.partial"))


def test_a_torn_line_is_none_and_a_damaged_one_is_an_error(pool):
    log = pool.folder / "log.jsonl"
    pool.remove(subject="Apple")
    whole = log.read_bytes()
    before = whole[: whole[:-1].rindex(b"\n") + 1]
    for cut in (1, 2, 17, len(whole) - len(before) - 1):
        log.write_bytes(whole[:-cut])
        assert asked(pool) == requests(OTHERS)
    (removed,) = pool.remove(subject="Apple", who="somebody else")
    assert asked(pool) == requests(OTHERS) - requests([removed.edit])
    assert [event.kind for event in pool.log()] == ["add"] * 5 + ["replace", "remove"]
    lines = log.read_bytes().splitlines(keepends=True)
    for damaged in (
        [lines[0].replace(b"Chicago", b"Chikago"), *lines[1:]],
        [*lines[:2], *lines[3:]],
        [lines[1], lines[0], *lines[2:]],
        [lines[0], b"\xff\xfe\n", *lines[1:]],
        [*lines[:-1], lines[-1].replace(b'"remove"', b'"replace"')],
    ):
        log.write_bytes(b"".join(damaged))
        with pytest.raises(CheckpointError, match=r"log.jsonl, line \d: damaged, or not behind the line before it"):
            pool.entries()


def test_a_full_disk_leaves_the_state_before(pool, monkeypatch):
    write = os.write

    def full(descriptor, data):
        write(descriptor, bytes(data)[:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"writing .*log.jsonl: No space left on device; free some space"):
            pool.remove(subject="Apple")
    assert asked(pool) == requests(OTHERS)
    pool.remove(subject="Paris")
    assert [event.kind for event in pool.log()] == ["add"] * 5 + ["replace", "remove"]


def test_damaged_or_missing_values_are_an_error(pool, model, tokenizer):
    file = pool.folder / "values" / "000001.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1]):
        file.write_bytes(damage)
        ledger = Ledger.open(pool.folder, model, tokenizer, statistics="identity")
        assert ledger.close().updates  # what is in now came later
        with pytest.raises(CheckpointError, match="it was changed since it was written"):
            ledger.close(at=1)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"reading .*No such file"):
        ledger.close(at=1)


def test_there_is_one_writer_and_any_number_of_readers(pool, model, tokenizer):
    second = Ledger.open(pool.folder, model, tokenizer, statistics="identity")
    with locked(pool.folder):
        for act in (lambda: second.remove(subject="Apple"), lambda: second.add(Edit("{} is", "Rome", "Paris"))):
            with pytest.raises(CheckpointError, match="another process is changing it"):
                act()
        assert asked(second) == requests(OTHERS)
    pool.remove(subject="Apple")
    assert len(second) == 4  # it has seen what the other one did
    second.remove(subject="Paris")
    assert [event.kind for event in pool.log()][-2:] == ["remove", "remove"]


def test_a_ledger_is_where_it_was_wherever_the_process_goes(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(pool.folder.parent)
    ledger = Ledger.open(pool.folder.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ledger.remove(subject="Apple")
    assert len(ledger) == len(pool) == 4
    assert str(ledger.folder) == pool.folder.name


def test_folders_that_are_none(make, model, tokenizer, tmp_path, monkeypatch, pool):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArgumentError, match="taken exists already"):
        make("taken")
    with pytest.raises(ArgumentError, match="does not exist; make it first"):
        make("no/where")
    for folder in ("taken", "nowhere"):
        with pytest.raises(CheckpointError, match="it is no ledger"):
            Ledger.open(tmp_path / folder)
    (tmp_path / "taken" / "ledger.json").write_text('{"format": "rome_fast ledger 2"}')
    with pytest.raises(CheckpointError, match=r"it is not of a ledger of this release"):
        Ledger.open(tmp_path / "taken")
    shutil.copy(pool.folder / "ledger.json", tmp_path / "taken" / "ledger.json")
    with pytest.raises(CheckpointError, match=r"reading .*log.jsonl"):
        Ledger.open(tmp_path / "taken")
    source = save_toy(tmp_path / "model", model, tokenizer)
    with pytest.raises(ArgumentError, match="lies inside the model"):
        Ledger.create(source / "facts", source, device="cpu", **{**USUAL, **MADE["one layer"]})
    for refused in ({"guard": "on"}, {"unconverged": "ask"}, {"method": "magic"}, {"contexts": ["no blank"]}):
        with pytest.raises(ArgumentError, match=next(iter(refused))):
            make("refused", **refused)
    assert not (tmp_path / "refused").exists()
    # As a folder that is mounted read-only; root may write where modes forbid it.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert bytes_of(pool.close())
    with pytest.raises(CheckpointError, match="Permission denied"):
        pool.remove(subject="Apple")
    with pytest.raises(CheckpointError, match="Permission denied"):
        make("new")
