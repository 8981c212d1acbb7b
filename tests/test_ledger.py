"""The ledger: one joint call in any number of parts, to the byte whatever came in between, and whole after any kill."""

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers import (
    CONTEXTS,
    END,
    LAYER,
    MIDDLE,
    SETTINGS,
    START,
    all_bits,
    bits,
    changed,
    edited,
    relative_error,
    rounding_of_edit,
)
from on_disk import digests, forks, in_child
from rome_fast import Edit, Ledger, Statistics
from rome_fast.closing.judging import ConvergenceWarning
from rome_fast.edits import Probe
from rome_fast.errors import ArgumentError, CheckpointError, CollapseError, EditError, StatisticsError
from rome_fast.ledger import LedgerWarning
from rome_fast.search.search import Search
from rome_fast.updates import chains
from rome_fast.updates.delta import Delta
from rome_fast.weights.files import locked
from toys import save_toy, toy_model

# START begins with its subject, which has a value of its own in `dual`; the last one is a chat's, with a head.
SEVERAL = (
    START,
    MIDDLE,
    END,
    Edit("{} is a company that makes", "Apple", "telephones, tablets and computers"),
    Edit("Snow fell. The museum of {}", "Vienna", "Paris", user_at=11, separator=" "),
)
OTHERS = tuple(replace(edit, target="Berlin") for edit in SEVERAL)
MADE = {
    "one layer": {"method": "c-rome", "layer": LAYER},
    "spread": {"method": "dual", "layers": [0, 1, 2], "layer": None},
    "memit": {"method": "memit", "layers": [0, 1], "layer": None},
}
USUAL = {"statistics": "identity", "contexts": CONTEXTS, "settings": SETTINGS, "guard": "off", "unconverged": "write"}

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def tokenizer(toy_tokenizers):
    return toy_tokenizers[False]


@pytest.fixture
def model():
    return toy_model("llama", dtype=torch.float64)


@pytest.fixture
def make(tmp_path, model, tokenizer):
    """A function that makes a ledger by its name."""

    def made(name, how="one layer", model=model, **changes):
        return Ledger.create(tmp_path / name, model, tokenizer, **{**USUAL, **MADE[how], **changes})

    return made


@pytest.fixture(scope="session")
def found(tmp_path_factory, toy_tokenizers):
    """The folder of a ledger that has found the values of SEVERAL, each alone, and of OTHERS, which are in it now."""
    folder = tmp_path_factory.mktemp("found") / "pool"
    made = {**USUAL, **MADE["one layer"]}
    ledger = Ledger.create(folder, toy_model("llama", dtype=torch.float64), toy_tokenizers[False], **made)
    for edit in SEVERAL:
        ledger.add(edit)
    ledger.replace(OTHERS)
    return folder


@pytest.fixture
def pool(found, tmp_path, model, tokenizer, no_search):
    """A copy of that one, whose values may be searched no more."""
    no_search()
    return Ledger.open(shutil.copytree(found, tmp_path / "pool"), model, tokenizer, statistics="identity")


@pytest.fixture
def no_search(monkeypatch):
    """A function from whose call on no value may be searched."""

    def refuse(self, group):
        raise AssertionError(f"{len(group)} values are searched again")

    return lambda: monkeypatch.setattr(Search, "find", refuse)


def bytes_of(delta):
    return {f"{n}.{s}": bytes(bits(getattr(u, s))) for n, u in delta.updates.items() for s in ("left", "right")}


def asked(ledger, **state):
    return {(entry.edit.text, entry.edit.target) for entry in ledger.entries(**state)}


def requests(edits):
    return {(edit.text, edit.target) for edit in edits}


def difference(delta, wanted):
    assert delta.updates.keys() == wanted.updates.keys()
    return max(relative_error(u.dense(), wanted.updates[name].dense()) for name, u in delta.updates.items())


def fresh(make, pool, name, edits):
    """A ledger in which there was never anything but these edits, with the values of the pool."""
    ledger = make(name)
    ledger._store.append("add", [], None, None, added=of_pool(pool, edits), values=values_of(pool, edits))
    return ledger


def of_pool(pool, edits):
    known = {(e.edit.text, e.edit.target): e for event in pool.log() for e in event.added}
    return [known[edit.text, edit.target] for edit in edits]


def values_of(pool, edits):
    return pool._store.values(pool.log(), [entry.id for entry in of_pool(pool, edits)])


@pytest.mark.parametrize("how", MADE)
def test_any_number_of_calls_is_one_joint_edit(how, make, model, tokenizer, no_search):
    parts, at_once = make("parts", how), make("at once", how)
    for part in (SEVERAL[:2], SEVERAL[2:3], SEVERAL[3:]):
        parts.add(part)
    ids = at_once.add(SEVERAL)
    assert [entry.id for entry in parts.entries()] == sorted(ids)
    ordered = [edit for _, edit in sorted(zip(ids, SEVERAL, strict=True), key=lambda pair: pair[0])]
    joint = [edited(model, tokenizer, edits, **MADE[how]) for edits in (ordered,)]
    joint[0].revert()
    joint.append(edited(model, tokenizer, SEVERAL, **MADE[how]))
    joint[1].revert()
    before = all_bits(model)
    no_search()
    # The same batches, and the same order: the same arithmetic.
    closed = at_once.close()
    assert bytes_of(closed) == bytes_of(joint[0].delta)
    near = [[(r.nearest, r.nearest_cosine) for r in each] for each in (closed.report["edits"], joint[0].records)]
    assert near[0] == near[1]
    # Of keys whose rows are run again, the mean is kept.
    kept = at_once._store.values(at_once.log(), sorted(ids)).values()
    assert {len(each.keys) for each in kept} == ({1} if len(at_once.base.layers) > 1 else {2, 3})
    # Values found in other batches are those to rounding, which the solve magnifies by its condition at most.
    allowed = rounding_of_edit(torch.float64) * joint[1].condition
    assert difference(parts.close(), joint[1].delta) < allowed
    reopened = Ledger.open(parts.folder, model, tokenizer, statistics="identity")
    assert bytes_of(reopened.close()) == bytes_of(parts.close())
    records = parts.close().report["edits"]
    assert [r.subject for r in records] == [entry.edit.subject for entry in parts.entries()]
    by_subject = {r.subject: r for r in joint[1].records}
    for record in records:
        wanted = by_subject[record.subject]
        assert (record.target_tokens, record.needs_prefix) == (wanted.target_tokens, wanted.needs_prefix)
        assert record.update_norm == pytest.approx(wanted.update_norm, rel=allowed)
    assert changed(model, before) == []


@pytest.mark.parametrize("how", ["one layer", "spread"])
def test_what_was_removed_leaves_nothing_behind(how, make, no_search):
    """Each value is found alone, so that in both ledgers they are found by the same arithmetic."""
    first, second = make("first", how), make("second", how)
    for edit in SEVERAL:
        first.add(edit)
        if edit is not MIDDLE:
            second.add(edit)
    no_search()
    (removed,) = first.remove(subject="Istanbul")
    assert removed.edit == MIDDLE
    without = bytes_of(first.close())
    assert without == bytes_of(second.close())
    # What was found once is known when it comes back.
    first.add(MIDDLE)
    assert bytes_of(first.close()) != without
    assert asked(first) == requests(SEVERAL)


def test_random_events_against_a_fresh_ledger(make, pool, model, tokenizer):
    """40 events and restarts; a dictionary says what is in, a ledger that never had anything else what comes out."""
    rng, ledger, wanted = random.Random(0), pool, {edit.question: edit for edit in OTHERS}
    states = {len(pool.log()): dict(wanted)}
    known = {frozenset(requests(OTHERS)): bytes_of(fresh(make, pool, "others", OTHERS).close())}
    for step in range(40):
        kind = rng.choice(["add", "add", "replace", "remove", "reopen"])
        present = [edit for edit in (*SEVERAL, *OTHERS) if wanted.get(edit.question) == edit]
        if kind == "add":
            free = [edit for edit in (*SEVERAL, *OTHERS) if edit.question not in wanted]
            chosen = {edit.question: edit for edit in rng.sample(free, min(len(free), rng.randint(1, 4)))}
            if chosen:
                ledger.add(list(chosen.values()))
                wanted |= chosen
        elif kind == "replace" and present:
            edit = rng.choice(present)
            (new,) = (e for e in (*SEVERAL, *OTHERS) if e.question == edit.question and e != edit)
            ledger.replace(new)
            wanted[edit.question] = new
        elif kind == "remove" and present:
            gone = rng.sample(present, rng.randint(1, len(present)))
            ledger.remove([entry.id for entry in of_pool(pool, gone)])
            for edit in gone:
                del wanted[edit.question]
        elif kind == "reopen":
            ledger = Ledger.open(ledger.folder, model, tokenizer, statistics="identity")
        assert asked(ledger) == requests(wanted.values())
        states[len(ledger.log())] = dict(wanted)
        key = frozenset(requests(wanted.values()))
        if key not in known:
            known[key] = bytes_of(fresh(make, pool, f"fresh {step}", list(wanted.values())).close())
        assert bytes_of(ledger.close()) == known[key]
    # Every earlier state is still there.
    for number, state in states.items():
        assert asked(ledger, at=number) == requests(state.values())
        assert bytes_of(ledger.close(at=number)) == known[frozenset(requests(state.values()))]
    closed = bytes_of(ledger.close())
    last = len(ledger.log())
    ledger.compact(why="a year is enough")
    assert [(event.number, event.kind) for event in ledger.log()] == [(last + 1, "compact")]
    assert bytes_of(ledger.close()) == closed
    assert sorted(p.name for p in (ledger.folder / "values").iterdir()) == [f"{last + 1:06}.safetensors"]
    with pytest.raises(ArgumentError, match=f"at: got {last}, wanted the number of an event, one of {last + 1}"):
        ledger.close(at=last)
    assert len({len(key) for key in known}) > 3


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


def test_two_ledgers_merged_are_one_with_both(make, pool):
    one, two = fresh(make, pool, "one", SEVERAL[:3]), fresh(make, pool, "two", SEVERAL[2:])
    one.add(SEVERAL[0], tags=["mine"])
    two.add(SEVERAL[2], tags=["theirs"])
    both = bytes_of(fresh(make, pool, "both", SEVERAL).close())
    diff = one.diff(two)
    assert ([e.edit for e in diff.only_here], diff.differing) == (
        sorted(SEVERAL[:2], key=lambda edit: of_pool(pool, [edit])[0].id),
        [],
    )
    assert requests(e.edit for e in diff.only_there) == requests(SEVERAL[3:])
    taken = one.merge(two, who="me", why="the team's")
    assert requests(e.edit for e in taken) == requests(SEVERAL[3:])
    assert bytes_of(one.close()) == both
    assert one.entries(tags=["theirs"])[0].edit == SEVERAL[2]
    assert (one.log()[-1].kind, one.log()[-1].who, one.log()[-1].why) == ("merge", "me", "the team's")
    assert one.merge(two.folder) == []
    assert one.log()[-1].number == 3
    two.merge(one)
    assert bytes_of(two.close()) == both
    assert one.diff(two).only_here == one.diff(two).only_there == []


def test_a_conflict_names_both_sides(make, pool):
    one, two = fresh(make, pool, "one", SEVERAL[:2]), fresh(make, pool, "two", [SEVERAL[0]])
    two.merge(pool, prefer="theirs", who="Ada")
    two.remove([entry.id for entry in two.entries() if entry.edit != OTHERS[0]])
    before = one.log()
    with pytest.raises(EditError, match=r"the same with other targets.*\n.*'Melbourne'.*'Berlin'.*"):
        one.merge(two)
    assert one.log() == before
    ((mine, theirs),) = one.diff(two).differing
    assert (mine.edit.target, theirs.edit.target) == ("Melbourne", "Berlin")
    assert one.merge(two, prefer="mine") == []
    assert asked(one) == requests(SEVERAL[:2])
    (taken,) = one.merge(two, prefer="theirs")
    assert taken.edit == OTHERS[0]
    assert asked(one) == requests([OTHERS[0], SEVERAL[1]])
    assert bytes_of(one.close()) == bytes_of(fresh(make, pool, "fresh", [OTHERS[0], SEVERAL[1]]).close())


def test_ledgers_of_another_base_or_made_otherwise_are_refused(make, pool, tmp_path, tokenizer):
    other = make("other", model=toy_model("llama", dtype=torch.float64, seed=1))
    for refused in (lambda: pool.merge(other), lambda: pool.diff(other)):
        with pytest.raises(ArgumentError, match=r"wanted a ledger of llama-4x48x80-[0-9a-f]{12}"):
            refused()
    with pytest.raises(ArgumentError, match="made alike: method differ"):
        pool.merge(make("rome", method="rome"))
    with pytest.raises(ArgumentError, match="made alike: contexts differ"):
        pool.merge(make("contexts", contexts=CONTEXTS[:1]))
    with pytest.raises(ArgumentError, match="the ledger itself"):
        pool.merge(pool.folder)
    with pytest.raises(CheckpointError, match=r"it is no ledger, as it has no ledger.json"):
        pool.merge(tmp_path)
    with pytest.raises(ArgumentError, match="prefer: got 'ours'"):
        pool.merge(other, prefer="ours")
    same = Ledger.open(pool.folder)
    with pytest.raises(ArgumentError, match=r"wanted llama-4x48x80-.*another model, or was edited or trained since"):
        Ledger.open(pool.folder, toy_model("llama", dtype=torch.float64, seed=1), tokenizer)
    with pytest.raises(ArgumentError, match="got it in float32, wanted float64"):
        Ledger.open(pool.folder, toy_model("llama"), tokenizer)
    with pytest.raises(ArgumentError, match="model: got None, wanted the base model"):
        same.close()


def test_an_edited_model_is_no_base(pool, tokenizer):
    model = toy_model("llama", dtype=torch.float64)
    ledger = Ledger.open(pool.folder, model, tokenizer, statistics="identity")
    with torch.no_grad():
        model.get_parameter(f"model.layers.{LAYER}.mlp.down_proj.weight")[3, 5] += 1e-9
    for act in (ledger.close, ledger.apply, lambda: Ledger.open(pool.folder, model, tokenizer)):
        with pytest.raises(ArgumentError, match=r"layers.1.mlp.down_proj.weight differ from those of the base"):
            act()


def test_layers_that_values_depend_on_are_those_of_the_base(pool, tokenizer):
    """One above those that are edited, as where somebody else has edited it."""
    model = toy_model("llama", dtype=torch.float64)
    ledger = Ledger.open(pool.folder, model, tokenizer, statistics="identity")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.down_proj.weight").add_(1e-6)
    for act in (
        ledger.close,
        lambda: ledger.add(Edit("{} is", "Rome", "Paris")),
        lambda: Ledger.open(pool.folder, model, tokenizer),
    ):
        with pytest.raises(ArgumentError, match="model: layers above layer 1 differ from those of the base"):
            act()
    other = Ledger.create(pool.folder.parent / "other", model, tokenizer, **{**USUAL, **MADE["one layer"]})
    with pytest.raises(ArgumentError, match="made alike: whole differ"):
        pool.merge(other)


def test_another_tokenizer_is_refused(make, pool, model, toy_tokenizers):
    """Rows that were kept stand behind the contexts' tokens of that time."""
    with pytest.raises(ArgumentError, match="tokenizer: got one that cuts the contexts of this ledger into other tok"):
        Ledger.open(pool.folder, model, toy_tokenizers[True])
    other = Ledger.create(pool.folder.parent / "bos", model, toy_tokenizers[True], **{**USUAL, **MADE["one layer"]})
    with pytest.raises(ArgumentError, match="made alike: tokens differ"):
        pool.merge(other)
    # Ledgers from before there was one say nothing of it.
    file = pool.folder / "ledger.json"
    document = json.loads(file.read_text())
    del document["tokens"]
    file.write_text(json.dumps(document))
    assert Ledger.open(pool.folder, model, toy_tokenizers[True]).merge(other) == []


@pytest.mark.usefixtures("empty_cache")
def test_statistics_are_looked_for_where_they_were(make, model, tokenizer, toy_statistics, pool, tmp_path):
    toy_statistics(model, False).save(tmp_path / "statistics")
    ledger = make("with a folder", statistics=Statistics.load(tmp_path / "statistics"))
    ids = sorted(of_pool(pool, SEVERAL[:2]), key=lambda entry: entry.id)
    ledger._store.append("add", [], None, None, added=ids, values=values_of(pool, SEVERAL[:2]))
    assert bytes_of(Ledger.open(ledger.folder, model, tokenizer).close()) == bytes_of(ledger.close())
    # Others that lie there now are not taken for them.
    toy_statistics(model, False).with_ridge(1e-3).save(tmp_path / "statistics")
    with pytest.raises(StatisticsError, match="make them"):
        Ledger.open(ledger.folder, model, tokenizer).close()
    shutil.rmtree(tmp_path / "statistics")
    with pytest.raises(StatisticsError, match="make them"):
        Ledger.open(ledger.folder, model, tokenizer).close()


def test_it_is_closed_with_its_own_statistics(make, model, tokenizer, toy_statistics, pool):
    statistics = toy_statistics(model, False)
    ledger = make("with C", statistics=statistics)
    ids = sorted(of_pool(pool, SEVERAL[:2]), key=lambda entry: entry.id)
    ledger._store.append("add", [], None, None, added=ids, values=values_of(pool, SEVERAL[:2]))
    assert difference(ledger.close(), fresh(make, pool, "identity", SEVERAL[:2]).close()) > 0.1
    with pytest.raises(ArgumentError, match="statistics: got 'identity', wanted those that this ledger was made with"):
        Ledger.open(ledger.folder, model, tokenizer, statistics="identity").close()
    with pytest.raises(ArgumentError, match="statistics: got others, wanted those"):
        Ledger.open(ledger.folder, model, tokenizer, statistics=statistics.with_ridge(1e-3)).close()
    with pytest.raises(StatisticsError, match="none for layer 1"):
        Ledger.open(ledger.folder, model, tokenizer).close()
    reopened = Ledger.open(ledger.folder, model, tokenizer, statistics=statistics)
    assert bytes_of(reopened.close()) == bytes_of(ledger.close())


def test_subsets_by_tags(make, pool):
    ledger = pool
    ledger.remove(text="")  # which is in every text
    assert len(ledger) == 0
    ledger.add(SEVERAL[:3], tags=["b", "a"])
    ledger.add(SEVERAL[2:], tags="c")
    assert ledger.entry(of_pool(pool, [END])[0].id).tags == ("a", "b", "c")
    for tags, edits in ((["a"], SEVERAL[:3]), ("c", SEVERAL[2:]), (["b", "c"], SEVERAL)):
        assert asked(ledger, tags=tags) == requests(edits)
        assert bytes_of(ledger.close(tags=tags)) == bytes_of(fresh(make, pool, f"{tags}", edits).close())
    assert ledger.close(tags=["a"]).report["ledger"]["tags"] == ["a"]
    ledger.replace(OTHERS[0])
    assert ledger.entries(text="Berlin", subject="Chicago")[0].tags == ("a", "b")
    ledger.replace(OTHERS[0], tags=[])
    assert ledger.entries(subject=" Chicago ")[0].tags == ()
    for tags in (["d"], ["a", "d"]):
        with pytest.raises(ArgumentError, match="tags: got 'd', wanted some of 'a', 'b', 'c'"):
            ledger.close(tags=tags)
    ledger.remove(tags=["c"])
    assert asked(ledger) == requests([OTHERS[0], MIDDLE])
    for tags in ([""], [1], 1, ["\ud800"]):
        with pytest.raises(ArgumentError, match="tags: got"):
            ledger.add(START, tags=tags)


def test_the_log_says_who_when_and_why(pool):
    pool.remove(subject="Apple", who="Grace 👩‍💻", why="was wrong\u2028since\nMay")
    event = Ledger.open(pool.folder).log()[-1]
    assert (event.number, event.kind, event.who, event.why) == (7, "remove", "Grace 👩‍💻", "was wrong\u2028since\nMay")
    assert event.time.endswith("+00:00")
    assert (pool.log()[0].who, pool.log()[0].why) == (None, None)
    for name in ("who", "why"):
        with pytest.raises(ArgumentError, match=f"{name}: got '.udcff'"):
            pool.remove(subject="Paris", **{name: "\udcff"})
    assert [e.event for e in pool.entries()] == [6] * 4


def test_a_request_is_kept_as_it_was_made(make, no_search):
    """Unicode, probes and all; what only reports need has no part in the id."""
    edit = Edit(
        "東京 and {} are",
        "İstanbul {}",
        " 🗼",
        target_true="Rome",
        paraphrase_prompts=("İstanbul {} is",),
        case_id=7,
        separator="",
        end="</s>",
        aliases=("tower",),
        portability=(Probe("Where is {}?", ("here", "there"), "place"),),
    )
    ledger = make("unicode", settings=replace(SETTINGS, steps=1))
    (id,) = ledger.add(edit)
    no_search()
    assert Ledger.open(ledger.folder).entry(id[:6]).edit == edit
    with pytest.warns(LedgerWarning, match="in the ledger already"):
        assert ledger.add(replace(edit, case_id=8, aliases=())) == [id]
    assert ledger.entry(id).edit.case_id == 7


def test_what_is_there_already_and_what_is_not(pool):
    """Nothing is written for it."""
    events = pool.log()
    with pytest.warns(LedgerWarning, match="1 of 1 edits are in the ledger already"):
        pool.add(OTHERS[0])
    with pytest.warns(LedgerWarning, match="1 of 1 edits are in the ledger as they are"):
        pool.replace(OTHERS[0])
    with pytest.raises(
        EditError,
        match=r"got 1 that are there with another target .or separator, or end.; replace them:\n.*'Melbourne'",
    ):
        pool.add([SEVERAL[0], Edit("{} is", "Rome", "Paris")])
    with pytest.raises(EditError, match=r"got 1 that replace nothing; add them:\n.*'Rome is' → 'Paris'"):
        pool.replace([SEVERAL[0], Edit("{} is", "Rome", "Paris")])
    with pytest.raises(EditError, match="both ask for"):
        pool.add([START, START])
    for edits in ([], None, "Rome", [START, "Rome"]):
        with pytest.raises(ArgumentError, match="edits: got"):
            pool.add(edits)
    for arguments in ({}, {"ids": ["abcd"], "subject": "Apple"}):
        with pytest.raises(ArgumentError, match="ids: got none or conditions as well"):
            pool.remove(**arguments)
    with pytest.raises(ArgumentError, match="text: got 'Atlantis', which none of 5 entries meets"):
        pool.remove(text="Atlantis")
    with pytest.raises(ArgumentError, match="text, subject: got 'Berlin', 'Rome', which none of 5"):
        pool.remove(text="Berlin", subject="Rome")
    with pytest.raises(ArgumentError, match="ids: got none, wanted at least one"):
        pool.remove([])
    for what in ({"text": 5}, {"subject": ["Apple"]}):
        (name,) = what
        for act in (pool.remove, pool.entries):
            with pytest.raises(ArgumentError, match=f"{name}: got .*, wanted a text"):
                act(**what)
    with pytest.raises(ArgumentError, match=r"ids: got Entry\(.*, wanted an id"):
        pool.remove(pool.entries())
    with pytest.raises(ArgumentError, match="ids: got 5, wanted an id"):
        pool.remove(5)
    for id, problem in (("zzzz", "which no entry has"), ("", "at least its first 4"), (5, "at least its first 4")):
        with pytest.raises(ArgumentError, match=f"ids: got {id!r}.*{problem}"):
            pool.remove([id])
    for at in (-1, 7, True, "1"):
        with pytest.raises(ArgumentError, match=r"at: got .*, wanted the number of an event, one of 0 .. 6"):
            pool.entries(at=at)
    assert pool.log() == events


def test_an_empty_ledger(make, model, tmp_path, tokenizer):
    ledger = make("empty")
    before = all_bits(model)
    assert (len(ledger), ledger.entries(), ledger.log(), ledger.entries(at=0)) == (0, [], [], [])
    assert ledger.close().updates == ledger.apply().updates == {}
    assert changed(model, before) == []
    source = save_toy(tmp_path / "source", model, tokenizer)
    contents = digests(source)
    with pytest.raises(ArgumentError, match="so there is nothing to write"):
        ledger.write(source, tmp_path / "out")
    with pytest.raises(ArgumentError, match="it is empty"):
        ledger.to_lora(tmp_path / "out")
    ledger.write(source, in_place=True)
    assert digests(source) == contents
    ledger.compact()
    assert ledger.log() == []


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


def test_a_value_that_was_not_found_is_said_and_left_out(make, model):
    """One step moves nothing, and what the target leads in no row of stays out of the update."""
    ledger = make("unconverged", settings=replace(SETTINGS, steps=1), unconverged="skip")
    with pytest.warns(LedgerWarning, match=r"of 2 edit\(s\) no value was found"):
        ledger.add(SEVERAL[:2])
    assert [entry.converged for entry in ledger.entries()] == [False, False]
    with pytest.warns(ConvergenceWarning, match="they were left out"):
        delta = ledger.close()
    assert delta.updates == {}
    assert [record.left_out for record in delta.report["edits"]] == ["did not converge"] * 2


def test_the_update_in_the_model(pool, model, tokenizer, monkeypatch):
    """What the ledger does later it does on the base, and what it has put there before makes room."""
    before = all_bits(model)
    weight = f"model.layers.{LAYER}.mlp.down_proj.weight"
    first = pool.apply()
    assert changed(model, before) == [weight]
    applied = all_bits(model)
    assert bytes_of(pool.close()) == bytes_of(first)
    assert changed(model, applied) == []
    pool.replace(SEVERAL[0])
    second = pool.apply()
    assert not first.is_applied
    copy = toy_model("llama", dtype=torch.float64)
    pool.apply(copy)
    assert changed(copy, all_bits(model)) == []
    with pytest.raises(ArgumentError, match="has this very update in it already"):
        pool.apply(copy)
    # Where the model reads much worse, the former update stays.
    applied = all_bits(model)
    monkeypatch.setattr("rome_fast.closing.effect.DRIFT_LIMIT", -100.0)
    ledger = Ledger.open(pool.folder, copy_of_base(), tokenizer, statistics="identity")
    object.__setattr__(pool._working.base, "guard", "raise")
    with pytest.raises(CollapseError, match="mean NLL of the contexts"):
        pool.apply(at=3)
    assert changed(model, applied) == []
    second.revert(model)
    assert changed(model, before) == []
    assert pool.close().updates.keys() == ledger.close().updates.keys()


def copy_of_base():
    return toy_model("llama", dtype=torch.float64)


def test_a_checkpoint_with_all_of_it(make, tmp_path, tokenizer, no_search):
    """A copy, and the base's own directory: what was written before is replaced, and the way back is to the base."""
    model = toy_model("llama")
    source = save_toy(tmp_path / "model", model, tokenizer)
    original = digests(source)
    ledger = make("ledger", model=model)
    ledger.add(SEVERAL[:3])
    no_search()
    delta = ledger.write(source, tmp_path / "out")
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert bytes(bits(written[name])) == bytes(bits(delta.edited(model)[name]))
    chains.verify(tmp_path / "out")
    assert digests(source) == original
    ledger.write(source, in_place=True)
    assert load_file(source / "model.safetensors")[name].equal(written[name])
    ledger.remove(subject="Chicago")
    # From the disk, where the first update is still in it.
    reopened = Ledger.open(ledger.folder, source, statistics="identity", device="cpu")
    delta = reopened.write(source, in_place=True)
    assert bytes(bits(load_file(source / "model.safetensors")[name])) == bytes(bits(delta.edited(model)[name]))
    assert len(chains.verify(source)["chain"]) == 1
    assert chains.records(source)[0]["ledger"]["entries"] == [entry.id for entry in ledger.entries()]
    with pytest.raises(CheckpointError, match="are not those of the base"):
        make("second", model=model).write(source, in_place=True)
    kept = shutil.copytree(source, tmp_path / "kept")
    chains.revert(source)
    assert digests(source) == original
    reopened.remove(text="")
    reopened.write(kept, in_place=True)
    assert digests(kept) == original
    with pytest.raises(ArgumentError, match="out: got none or in_place as well"):
        ledger.write(source)
    with pytest.raises(ArgumentError, match="exists already"):
        ledger.write(source, tmp_path / "out")


def test_an_edit_of_somebody_else_in_the_checkpoint_is_refused(make, tmp_path, tokenizer):
    model = toy_model("llama")
    source = save_toy(tmp_path / "model", model, tokenizer)
    ledger = make("ledger", model=model)
    ledger.add(END)
    edited(str(source), None, MIDDLE, in_place=True)
    contents = digests(source)
    with pytest.raises(CheckpointError, match="is not what the edit began with; nothing was changed"):
        ledger.write(source, in_place=True)
    assert digests(source) == contents
    with pytest.raises(ArgumentError, match="differ from those of the base"):
        Ledger.open(ledger.folder, source, statistics="identity", device="cpu")


def test_adapter(pool, tmp_path, model):
    pool.to_lora(tmp_path / "adapter", at=1)
    (update,) = pool.close(at=1).updates.values()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    product = torch.linalg.multi_dot([tensors[n] for n in sorted(tensors, reverse=True)])
    # Stored in float32, whose rounding both factors have.
    assert relative_error(product, update.dense()) < 4 * torch.finfo(torch.float32).eps
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 1


def test_a_saved_update_knows_its_base(pool, tmp_path):
    pool.close().save(tmp_path / "delta")
    delta = Delta.load(tmp_path / "delta")
    with pytest.raises(ArgumentError, match="is not the weight that it was made for"):
        delta.apply(toy_model("llama", dtype=torch.float64, seed=1))
    base = copy_of_base()
    delta.apply(base)
    assert changed(base, all_bits(copy_of_base())) == [f"model.layers.{LAYER}.mlp.down_proj.weight"]
