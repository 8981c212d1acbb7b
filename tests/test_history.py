"""Edits of a model that was edited before, whose keys they leave alone."""

import warnings
from dataclasses import replace

import pytest
import torch

import oracle
from helpers import CONTEXTS, END, FORWARD, LAYER, MIDDLE, START, all_bits, changed, edited, relative_error, rounding
from rome_fast import Edit
from rome_fast.closing.closing import Closing
from rome_fast.closing.geometry import Geometries
from rome_fast.closing.history import History
from rome_fast.closing.judging import SharedKeyWarning
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.methods import METHODS
from rome_fast.models.runner import Runner
from rome_fast.search.search import Search
from toys import D_FF, toy_model

FP64 = torch.float64
SPREAD = (0, 1, 2)
MEMIT = replace(METHODS["memit"], penalty=D_FF / 4)
EXACT = replace(METHODS["dual"], ridge=0.0, ridge_per_edit=0.0)
FIRST, LATER = (MIDDLE, END), (Edit("The strait in the middle of {} has", "Berlin", "Rome"), START)

# Relative, of what is read off the edited model; the Gram matrices of keys have a condition of less than 100.
ALLOWED = rounding(FP64, 2 * FORWARD, 100)

pytestmark = [
    pytest.mark.usefixtures("empty_cache"),
    pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning"),
]


def keys_of(model, tokenizer, edit, layer):
    """(columns, d_ff): the mean key behind contexts and that of the prompt alone."""
    rows = [oracle.make_row(tokenizer, context, edit.prompt, edit.subject, None) for context in ("", *CONTEXTS)]
    return torch.stack([oracle.mean_key(model, layer, rows[1:]), oracle.mean_key(model, layer, rows[:1])])


def dense(result):
    return [update.dense() for update in result.delta.updates.values()]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_there_at_the_keys_of_before_stays(kind, toy_tokenizers):
    """By the keys of the model itself; without a history it does not."""
    model, tokenizer = toy_model(kind, dtype=FP64), toy_tokenizers[False]
    first = edited(model, tokenizer, FIRST, method=EXACT, history=True)
    assert len(first.history) == 2
    before = oracle.double_copy(model)
    keys = torch.cat([keys_of(before, tokenizer, edit, LAYER) for edit in FIRST])
    for history in (first.history, False):
        second = edited(model, tokenizer, LATER[:1], method=EXACT, history=history)
        assert second.condition < 100
        (delta,) = dense(second)
        moved = float((keys @ delta.T).norm() / (keys.norm() * delta.norm()))
        assert (moved < ALLOWED) == (history is not False)
        own = keys_of(before, tokenizer, LATER[0], LAYER) @ delta.T
        # Both of its own columns get δ, exactly, with and without.
        assert relative_error(own[0], own[1]) < ALLOWED
        second.revert()


@pytest.mark.parametrize("layers", [SPREAD, (LAYER,)], ids=["spread", "one layer"])
def test_one_call_after_another_is_a_sequence_that_remembers(layers, toy_tokenizers):
    """That of memit-history, which has its test against a textbook; and so are three."""
    tokenizer, third = toy_tokenizers[False], Edit("One flies from {} to", "Melbourne", "Paris")
    usual = {"layer": None, "layers": layers}
    by_calls = toy_model("llama", dtype=FP64)
    history: History | bool = True
    for edits in (FIRST, LATER, [third]):
        history = edited(by_calls, tokenizer, edits, method=MEMIT, history=history, **usual).history
    assert len(history) == 5
    together = toy_model("llama", dtype=FP64)
    remembering = replace(MEMIT, remembers=True)
    usual |= {"schedule": "sequential", "batch_size": 2}
    result = edited(together, tokenizer, [*FIRST, *LATER, third], method=remembering, **usual)
    start = toy_model("llama", dtype=FP64)
    for layer in layers:
        got, wanted, before = (oracle.weight_and_bias(m, layer)[0] for m in (by_calls, together, start))
        # Values are searched for in models whose weights are rounded at other times, in four steps of Adam.
        assert relative_error(got - before, wanted - before) < 1e4 * ALLOWED
    assert result.history is None
    with_history = edited(toy_model("llama", dtype=FP64), tokenizer, FIRST, method=MEMIT, history=True, **usual)
    assert list(with_history.history.keys) == list(layers)


def test_what_more_than_the_value_is_asked_for_shrinks_with_what_is_remembered(toy_tokenizers):
    """As with edits of one call; of one layer none is."""
    model, tokenizer, dual = toy_model("llama"), toy_tokenizers[False], METHODS["dual"]
    runner, how = Runner(model), replace(dual, ridge_per_edit=0.1)
    for layers, wanted in ((SPREAD, how.reach_of(3)), ((LAYER,), 1.0)):
        first = edited(model, tokenizer, FIRST, method=how, layer=None, layers=layers, history=True)
        closing = Closing(runner, how, Geometries(runner, layers, None), "off", first.history)
        assert closing.reach(1) == wanted < how.reach_of(1)
        first.revert()


def test_an_update_has_the_columns_of_its_own_edits_only(toy_tokenizers):
    model, tokenizer = toy_model("llama", dtype=FP64), toy_tokenizers[False]
    many = [Edit("The port of {} lies in", city, "Rome") for city in ("Chicago", "Berlin", "Vienna", "Madrid")]
    first = edited(model, tokenizer, many, method="dual", history=True)
    second = edited(model, tokenizer, MIDDLE, method="dual", history=first.history)
    (update,) = second.delta.updates.values()
    assert update.left.shape[1] == update.right.shape[0] == 2
    assert len(second.history) == 5


def test_first_tokens_of_before_are_held_as_they_were_edited(toy_tokenizers):
    """With C + λ C₁, also where no edit of this call is one."""
    model, tokenizer = toy_model("llama", dtype=FP64), toy_tokenizers[False]
    first = edited(model, tokenizer, [START, MIDDLE], method=EXACT, history=True)
    assert first.history.first_tokens.tolist() == [False, False, True, False]
    second = edited(model, tokenizer, END, method=EXACT, history=first.history)
    assert second.history.first_tokens.tolist() == [False, False, True, False, False, False]
    (delta,) = dense(second)
    key = keys_of(oracle.double_copy(model), tokenizer, START, LAYER)[1]
    assert float((delta @ key).norm() / (delta.norm() * key.norm())) < ALLOWED


@pytest.mark.parametrize("how", [EXACT, METHODS["dual"], METHODS["c-rome"]], ids=["exact", "dual", "c-rome"])
def test_a_fact_of_the_history_that_is_to_change_is_told_of(how, toy_tokenizers):
    """One key is asked for δ and for nothing: least squares meet it halfway, though the edit is alone in its call."""
    model, tokenizer = toy_model("llama", dtype=FP64), toy_tokenizers[False]
    first = edited(model, tokenizer, MIDDLE, method=how, history=True)
    other = replace(MIDDLE, target="Vienna")
    with pytest.warns(SharedKeyWarning, match="1 of them are earlier edits of the history, which keep what they have"):
        again = edited(model, tokenizer, other, method=how, history=first.history, guard="warn")
    # Of two equal columns with a residual of one, K⁺ gives each half; a ridge ρ leaves off ρ / 4 more, to first order.
    assert 0.5 - ALLOWED < again.records[0].missed < 0.5 + how.ridge_of(2) + ALLOWED
    again.revert()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharedKeyWarning)
        assert edited(model, tokenizer, other, method=how, guard="warn").records[0].missed < 0.5


def test_a_file_keeps_it(toy_tokenizers, tmp_path):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    history = edited(model, tokenizer, FIRST, history=True).history
    history.save(tmp_path / "history.safetensors")
    again = History.load(tmp_path / "history.safetensors")
    assert torch.equal(again.keys[LAYER], history.keys[LAYER])
    assert (again.first_tokens.tolist(), again.columns, len(again)) == ([False, False], 1, 2)
    one = edited(model, tokenizer, LATER, history=again)
    one.revert()
    other = edited(model, tokenizer, LATER, history=history)
    assert torch.equal(*(torch.cat(dense(result)) for result in (one, other)))
    assert len(again + one.history) == 6
    with pytest.raises(CheckpointError, match="no such file"):
        History.load(tmp_path / "none")
    other.delta.save(tmp_path / "delta.safetensors")
    with pytest.raises(CheckpointError, match="it does not hold a history of edits"):
        History.load(tmp_path / "delta.safetensors")


def test_another_one_is_refused_before_anything(toy_tokenizers, monkeypatch):
    tokenizer = toy_tokenizers[False]
    history = edited(toy_model("llama"), tokenizer, FIRST, history=True).history
    wide = edited(toy_model("llama"), tokenizer, FIRST, history=True, method="dual").history
    foreign = edited(toy_model("gpt2"), tokenizer, FIRST, history=True).history
    model = toy_model("llama")
    before = all_bits(model)
    monkeypatch.setattr(Search, "find", None)
    for given, message, changes in (
        (history, r"history: got keys at layers 1, wanted 2, which are edited now", {"layer": 2}),
        (wide, r"history: got 2 key\(s\) an edit, wanted 1", {}),
        (foreign, r"history: got that of gpt2-.*, wanted that of this model, llama-", {}),
        ("history.safetensors", r"history: got str, wanted result.history of an earlier edit, or True", {}),
        (None, r"history: got NoneType", {}),
    ):
        with pytest.raises(ArgumentError, match=message):
            edited(model, tokenizer, LATER, history=given, **changes)
    for other, message in ((foreign, "the same model"), (wide, r"got 2 key\(s\) an edit")):
        with pytest.raises(ArgumentError, match=message):
            history + other
    with pytest.raises(TypeError):
        history + 1
    assert changed(model, before) == []
