"""Edits of one subject that are made together: one value for all of them, where the method merges."""

from dataclasses import replace

import pytest
import torch

import oracle
from helpers import CONTEXTS, END, LAYER, SETTINGS, edited, relative_error, rounding_of_edit
from rome_fast import Edit, ValueSettings
from rome_fast.closing.judging import SharedKeyWarning
from rome_fast.methods import METHODS
from rome_fast.models.batches import BatchSizer
from rome_fast.models.runner import Runner
from rome_fast.search.requests import MOST_MERGED, as_one, merged_by_subject, tokenise
from rome_fast.search.search import Search
from toys import toy_model

FP64 = torch.float64
# At the start, where the subject's rows are those of its essence, and inside.
INSIDE = Edit("The port of {} lies in", "Melbourne", "Berlin")
AT_THE_START = Edit("{} is a twin city of", "Melbourne", "Istanbul")
LAST = Edit("From Paris one flies to {}", "Melbourne", "Rome, the old capital")
FACTS = (INSIDE, AT_THE_START, LAST)

pytestmark = pytest.mark.usefixtures("empty_cache")


def textbook(model, tokenizer, edits, steps):
    """δ and the losses of a single one over the rows of all edits, by Adam."""
    model = oracle.double_copy(model)
    weight, bias = oracle.weight_and_bias(model, LAYER)
    rows = [
        oracle.make_row(tokenizer, context, edit.prompt, edit.subject, edit.target)
        for edit in edits
        for context in ("", *CONTEXTS)
    ]
    essence = oracle.make_row(tokenizer, "", "{} is a", edits[0].subject, None)
    v0 = weight @ oracle.mean_key(model, LAYER, rows) + bias
    delta = torch.zeros_like(v0, requires_grad=True)
    before = oracle.log_p_at_subject(model, LAYER, essence, torch.zeros_like(v0))
    optimizer, losses = torch.optim.Adam([delta], lr=0.5), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = oracle.value_loss(model, LAYER, rows, essence, before, delta, float(v0.norm()), 0.5, 0.0625)
        losses.append(loss.item())
        if step < steps - 1:
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                delta *= min(1.0, 4 * float(v0.norm()) / float(delta.norm()))
    return delta.detach(), losses


@pytest.mark.parametrize("facts", [FACTS, (LAST, INSIDE), (AT_THE_START, LAST)], ids=["three", "inside", "start"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_value_is_found_on_the_rows_of_all(kind, facts, found, toy_tokenizers):
    """As by the textbook, with another edit among them that has a value of its own."""
    model, tokenizer = toy_model(kind, dtype=FP64), toy_tokenizers[False]
    edits = [facts[0], END, *facts[1:]]
    result = edited(model, tokenizer, edits, method="dual")
    delta, losses = textbook(toy_model(kind), tokenizer, facts, SETTINGS.steps)
    first, other, *rest = found[0]
    assert relative_error(first.value.delta, delta) < rounding_of_edit(FP64)
    assert first.value.losses == pytest.approx(losses, rel=rounding_of_edit(FP64))
    assert all(torch.equal(each.value.delta, first.value.delta) for each in rest)
    alone = edited(toy_model(kind, dtype=FP64), tokenizer, END, method="dual")
    assert relative_error(other.value.delta, found[1][0].value.delta) < rounding_of_edit(FP64)
    assert [record.text for record in result.records] == [edit.text for edit in edits]
    assert alone.records[0].steps == result.records[1].steps


def test_keys_are_those_of_each_edit(found, toy_tokenizers):
    model, tokenizer = toy_model("llama", dtype=FP64), toy_tokenizers[False]
    edited(model, tokenizer, FACTS, method="dual", layer=None, layers=(0, LAYER))
    merged = found[0]
    for edit, solved in zip(FACTS, merged, strict=True):
        edited(toy_model("llama", dtype=FP64), tokenizer, edit, method="dual", layer=None, layers=(0, LAYER))
        (alone,) = found[-1]
        for name in ("keys", "unprefixed_value", "mean_value"):
            assert relative_error(getattr(solved, name), getattr(alone, name)) < rounding_of_edit(FP64), name
        time = alone.trail.entering.shape[1]
        assert relative_error(solved.trail.entering[:, :time], alone.trail.entering) < rounding_of_edit(FP64)
        assert (solved.trail.at.tolist(), solved.starts_bare) == (alone.trail.at.tolist(), alone.starts_bare)


def test_first_tokens_have_one_value_behind_contexts_and_one_without(found, toy_tokenizers):
    """Their keys without context are the same key."""
    model, tokenizer = toy_model("llama", dtype=FP64), toy_tokenizers[False]
    inside = Edit("The port of {} lies in", "Rome", "Vienna")
    facts = [Edit("{} is a twin city of", "Rome", "Paris"), inside, Edit("{} has a port in", "Rome", "Berlin")]
    result = edited(model, tokenizer, facts, method="dual")
    one, between, other = found[0]
    assert torch.equal(one.value.delta, other.value.delta)
    assert torch.equal(one.value.delta, between.value.delta)
    assert between.bare is None
    assert [each.starts_bare for each in found[0]] == [False, True, False]
    assert torch.equal(one.bare.value.delta, other.bare.value.delta)
    assert not torch.equal(one.bare.value.delta, one.value.delta)
    assert relative_error(one.bare.keys, other.bare.keys) < rounding_of_edit(FP64)
    assert all(record.missed < 0.1 for record in result.records)


def test_they_agree_where_values_of_their_own_would_not(toy_tokenizers, found):
    """The same key cannot have two values; of one that two edits share nothing is missed but the ridge's part."""
    tokenizer = toy_tokenizers[False]
    facts = [AT_THE_START, Edit("{} is the home of", "Melbourne", "Rome")]
    with pytest.warns(SharedKeyWarning, match="those of one subject behind the same words have one key"):
        apart = edited(toy_model("llama", dtype=FP64), tokenizer, facts, method=replace(METHODS["dual"], merges=False))
    merged = edited(toy_model("llama", dtype=FP64), tokenizer, facts, method="dual")
    assert max(record.missed for record in merged.records) < 0.01
    assert min(record.missed for record in apart.records) > 0.1


def test_where_none_is_found_at_all_it_is_that_of_all(found, toy_tokenizers):
    """As after a single evaluation, which moves nothing: all edits have the loss of all rows, and are counted once."""
    tokenizer, model = toy_tokenizers[False], toy_model("llama", dtype=FP64)
    settings = ValueSettings(steps=1, stop="loss")
    told = []
    edited(model, tokenizer, FACTS, method="dual", settings=settings, progress=lambda *done: told.append(done))
    assert not any(solved.found for solved in found[0])
    edited(toy_model("llama", dtype=FP64), tokenizer, INSIDE, method="dual", settings=settings)
    assert found[0][0].value.losses != pytest.approx(found[1][0].value.losses)
    assert told[-1] == (3, 3)
    assert max(done for done, _ in told) == 3


def test_where_none_is_found_for_all_each_gets_the_one_that_is_found_for_it(found, toy_tokenizers, monkeypatch):
    """Here the last one's only."""
    find_all = Search._find_all

    def led_by(request, solved):
        led = 1.0 if not request.parts and request.edit in (END, LAST) else 0.0
        return [replace(each, value=replace(each.value, led=led)) for each in solved]

    def find(search, group):
        return [led_by(request, solved) for request, solved in zip(group, find_all(search, group), strict=True)]

    monkeypatch.setattr(Search, "_find_all", find)
    edited(toy_model("llama", dtype=FP64), toy_tokenizers[False], [*FACTS, END], method="dual")
    edited(toy_model("llama", dtype=FP64), toy_tokenizers[False], LAST, method="dual")
    inside, start, last, _ = found[0]
    assert [solved.found for solved in found[0]] == [False, False, True, True]
    assert torch.equal(inside.value.delta, start.value.delta)
    assert relative_error(last.value.delta, found[1][0].value.delta) < rounding_of_edit(FP64)


def test_what_is_made_one(toy_tokenizers):
    """Of one subject behind one head of text, as many as are run together at most; of methods as published nothing."""
    runner, tokenizer = Runner(toy_model("llama")), toy_tokenizers[False]
    many = [Edit(f"{'so ' * i}{{}} is in", "Melbourne", "Rome") for i in range(1, MOST_MERGED + 2)]
    chat = replace(LAST, prompt=f"<s>user\n{LAST.prompt}", user_at=8)
    edits = [*FACTS, END, chat, Edit("Here {} lies in", "Melbourne ", "Rome"), *many]
    requests = [tokenise(runner, tokenizer, edit, CONTEXTS, METHODS["dual"]) for edit in edits]
    merged = merged_by_subject(requests, lambda request: True)
    places = [sorted(own) for own in merged]
    assert sorted(i for own in places for i in own) == list(range(len(edits)))
    assert [3] in places
    assert [4] in places
    assert max(map(len, places)) == MOST_MERGED
    for own in merged:
        assert as_one([requests[i] for i in own]).scored == sum(requests[i].scored for i in own)
    # Five facts of one subject, of which the rows of two fit: three batches, none of more than two.
    few = merged_by_subject(requests[-5:], lambda request: request.scored <= 2 * requests[-1].scored)
    assert [len(own) for own in few] == [2, 2, 1]
    assert [method.merges for method in METHODS.values()].count(True) == 1


def test_what_does_not_fit_is_not_made_one(found, toy_tokenizers, monkeypatch):
    monkeypatch.setattr(BatchSizer, "fits", lambda sizer, request: len(request.rows) <= 3)
    edited(toy_model("llama", dtype=FP64), toy_tokenizers[False], FACTS, method="dual")
    assert len({solved.value.losses for solved in found[0]}) == 3
