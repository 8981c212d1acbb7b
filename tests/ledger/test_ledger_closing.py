"""The ledger closed: one joint call in any number of parts, to the byte whatever came in between."""

import random
from dataclasses import replace

import pytest
import torch

from helpers import (
    END,
    MIDDLE,
    SETTINGS,
    START,
    all_bits,
    changed,
    edited,
    rounding_of_edit,
)
from ledgers import MADE, OTHERS, SEVERAL, asked, bytes_of, difference, fresh, of_pool, requests, values_of
from rome_fast import Ledger
from rome_fast.closing.judging import ConvergenceWarning
from rome_fast.errors import ArgumentError, StatisticsError
from rome_fast.ledger import LedgerWarning

pytestmark = pytest.mark.usefixtures("empty_cache")


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
    ledger.remove([entry.id for entry in ledger.entries()])
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
