"""What is in a ledger: requests as they were made, the log of who put them there, and ledgers merged."""

from dataclasses import replace

import pytest

from helpers import (
    SETTINGS,
    START,
)
from ledgers import OTHERS, SEVERAL, asked, bytes_of, fresh, of_pool, requests
from rome_fast import Edit, Ledger
from rome_fast.edits import Probe
from rome_fast.errors import ArgumentError, EditError
from rome_fast.ledger import LedgerWarning

pytestmark = pytest.mark.usefixtures("empty_cache")


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


def test_what_is_said_beside_a_request_is_replaced_without_a_search(pool):
    """It was left as it was, with a warning that it was so already."""
    (before,) = pool.entries(subject=START.subject)
    edit = replace(before.edit, aliases=("Bärlin",), paraphrase_prompts=("Where is it?",), case_id=9)
    bytes_before = bytes_of(pool.close())
    assert pool.replace(edit, why="an alias") == [before.id]
    assert pool.entry(before.id).edit == edit
    assert [(event.kind, event.file) for event in pool.log()[-1:]] == [("replace", None)]
    assert Ledger.open(pool.folder).entry(before.id).edit == edit
    assert bytes_of(pool.close()) == bytes_before
    with pytest.warns(LedgerWarning, match="1 of 1 edits are in the ledger as they are"):
        pool.replace(edit)


def test_what_is_there_already_and_what_is_not(pool):
    """Nothing is written for it."""
    events = pool.log()
    with pytest.warns(LedgerWarning, match="1 of 1 edits are in the ledger already") as told:
        pool.add(OTHERS[0])
    assert "replace()" not in str(told[0].message)
    with pytest.warns(LedgerWarning, match=r"already:\n.*\nreplace\(\) takes what they say beside their requests"):
        pool.add(replace(OTHERS[0], aliases=("Roma",)))
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
    # Every text has an empty one in it: `--text "$UNSET"` would take out all that is in.
    for what in ({"text": 5}, {"subject": ["Apple"]}, {"text": ""}, {"text": " "}, {"subject": ""}):
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
