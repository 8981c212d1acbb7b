"""A ledger with several facts of one subject, which are made together with one value, whatever comes and goes."""

import pytest
import torch

from helpers import CONTEXTS, END, SETTINGS, bits, edited, relative_error, rounding_of_edit
from rome_fast import Edit, Ledger
from rome_fast.methods import METHODS
from rome_fast.search.search import Search
from rome_fast.weights.files import locked
from toys import toy_model

INSIDE = Edit("The port of {} lies in", "Melbourne", "Berlin")
START = Edit("{} is a twin city of", "Melbourne", "Istanbul")
LAST = Edit("From Paris one flies to {}", "Melbourne", "Vienna, by the river")
USUAL = {"statistics": "identity", "contexts": CONTEXTS, "settings": SETTINGS, "guard": "off", "unconverged": "write"}

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def tokenizer(toy_tokenizers):
    return toy_tokenizers[False]


@pytest.fixture
def make(tmp_path, tokenizer):
    """A function that makes a ledger of a toy by its name."""

    def made(name):
        model = toy_model("llama", dtype=torch.float64)
        return Ledger.create(tmp_path / name, model, tokenizer, layers=[0, 1], **USUAL)

    return made


@pytest.fixture
def reopen(tmp_path, tokenizer, monkeypatch):
    """A function that opens one whose values may be searched no more."""

    def refuse(self, group, **how):
        raise AssertionError(f"{len(group)} values are searched again")

    def opened(name):
        monkeypatch.setattr(Search, "find", refuse)
        model = toy_model("llama", dtype=torch.float64)
        return Ledger.open(tmp_path / name, model, tokenizer, statistics="identity")

    return opened


def bytes_of(delta):
    return {f"{n}.{s}": bytes(bits(getattr(u, s))) for n, u in delta.updates.items() for s in ("left", "right")}


def test_it_is_closed_as_by_one_call(make, tokenizer):
    """However the facts have come: alone, together, or with others between."""
    ledger = make("facts")
    for some in (INSIDE, [END, START], LAST):
        ledger.add(some)
    result = edited(
        toy_model("llama", dtype=torch.float64),
        tokenizer,
        [INSIDE, END, START, LAST],
        method="dual",
        layer=None,
        layers=[0, 1],
    )
    delta = ledger.close()
    for name, update in result.delta.updates.items():
        assert relative_error(delta.updates[name].dense(), update.dense()) < rounding_of_edit(torch.float64)
    apart = make("apart")
    object.__setattr__(apart.base, "method", METHODS["dual"].__class__(**{**vars(METHODS["dual"]), "merges": False}))
    apart.add([INSIDE, END, START, LAST])
    assert all(
        relative_error(apart.close().updates[name].dense(), update.dense()) > 0.1
        for name, update in result.delta.updates.items()
    )


def test_one_that_is_taken_out_leaves_no_trace(make):
    """Of two facts the other is as it was alone; of three the two are as if they had come without the third."""
    ledger, other, pair = make("facts"), make("other"), make("pair")
    for edit in (INSIDE, START, LAST):
        ledger.add(edit)
    for edit in (INSIDE, START):
        pair.add(edit)
    other.add(START)
    ledger.remove(text=LAST.target)
    assert bytes_of(ledger.close()) == bytes_of(pair.close())
    for each in (ledger, pair):
        each.remove(text=INSIDE.target)
        assert bytes_of(each.close()) == bytes_of(other.close())


def test_what_is_found_for_those_together_is_kept(make, reopen, tmp_path):
    """As an event of its own where it was not known before; earlier states are closed to the same bytes."""
    ledger = make("facts")
    ledger.add([INSIDE, START, LAST], tags=["all"])
    ledger.add([END], tags=["some"])
    whole = bytes_of(ledger.close())
    ledger.remove(text=LAST.target)
    assert [event.kind for event in ledger.log()] == ["add", "add", "remove"]
    left = bytes_of(ledger.close())
    assert [event.kind for event in ledger.log()] == ["add", "add", "remove", "find"]
    assert len(ledger.log()[-1].values) == 2
    again = reopen("facts")
    assert (bytes_of(again.close()), bytes_of(again.close(at=2))) == (left, whole)
    again.compact()
    assert bytes_of(again.close()) == left
    assert len(again) == 3


def test_a_merge_brings_what_was_found_for_those_together(make, reopen):
    mine, theirs = make("mine"), make("theirs")
    mine.add(END)
    theirs.add([INSIDE, START])
    mine.merge(theirs)
    assert bytes_of(reopen("mine").close()) == bytes_of(mine.close())


def test_where_nothing_can_be_kept_it_is_searched_again(make):
    """Somebody else is writing."""
    ledger = make("facts")
    ledger.add([INSIDE, START, LAST])
    ledger.remove(text=LAST.target)
    with locked(ledger.folder):
        first = bytes_of(ledger.close())
    assert [event.kind for event in ledger.log()] == ["add", "remove"]
    assert bytes_of(ledger.close()) == first


def test_a_model_with_its_update_is_edited_on_by_its_history(make, tokenizer):
    """As the one that was edited by one call: the same keys are left alone."""
    ledger = make("facts")
    assert len(ledger.history()) == 0
    ledger.add([INSIDE, END, START])
    history = ledger.history()
    usual = {"method": "dual", "layer": None, "layers": [0, 1]}
    directly = toy_model("llama", dtype=torch.float64)
    first = edited(directly, tokenizer, [INSIDE, END, START], history=True, **usual)
    assert len(history) == len(first.history) == 3
    for layer in (0, 1):
        # Each column of the one is one of the other's: a ledger has an order of its own.
        distance = torch.cdist(history.keys[layer], first.history.keys[layer]).min(1).values
        assert float(distance.max() / history.keys[layer].norm()) < rounding_of_edit(torch.float64)
    model = toy_model("llama", dtype=torch.float64)
    ledger.apply(model)
    later = Edit("The strait in the middle of {} has", "Berlin", "Rome")
    ours = edited(model, tokenizer, later, history=history, **usual)
    theirs = edited(directly, tokenizer, later, history=first.history, **usual)
    allowed = 1e3 * rounding_of_edit(torch.float64)  # steps of Adam in weights that were rounded otherwise
    for name, update in ours.delta.updates.items():
        assert relative_error(update.dense(), theirs.delta.updates[name].dense()) < allowed
