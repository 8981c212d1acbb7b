"""Values that were found with an update in the model, for the model without it, against whole forwards of both."""

import pytest
import torch

import oracle
from helpers import CONTEXTS, END, FORWARD, MIDDLE, SETTINGS, START, relative_error, rounding
from rome_fast import Delta
from rome_fast.closing.rebasing import rebased
from rome_fast.methods import METHODS
from rome_fast.models.runner import Runner
from rome_fast.search.requests import tokenise
from rome_fast.search.search import Clock, Search
from rome_fast.updates.delta import LowRank
from toys import toy_model

FP64 = torch.float64
EDITS = (START, MIDDLE, END)  # without BOS the first one's subject is a first token
# Keys and hidden states of both models, differences of them that are no less than a hundredth of either.
ALLOWED = rounding(FP64, 2 * FORWARD, 100)


def an_update(model, layers):
    """Of a third of the weights' norm."""
    runner, generator, updates = Runner(model), torch.Generator().manual_seed(0), {}
    for layer in layers:
        weight = runner.weight(layer)
        left, right = (
            torch.randn(*s, generator=generator, dtype=FP64) for s in ((len(weight), 2), (2, weight.shape[1]))
        )
        updates[runner.weight_name(layer)] = LowRank(left * weight.norm() / (3 * (left @ right).norm()), right)
    return Delta(updates)


def rows_of(tokenizer, edit, *, bare):
    rows = [oracle.make_row(tokenizer, context, edit.prompt, edit.subject, None) for context in ("", *CONTEXTS)]
    alone = rows[0].subject_position == 0
    return rows[:1] if bare else rows[1:] if alone else rows


def means(model, layer, rows):
    """Of rows, in float64: what the layer puts out, the key there and its value."""
    weight, bias = oracle.weight_and_bias(model, layer)
    keys = torch.stack([oracle.key_of(model, layer, row) for row in rows])
    out = torch.stack([oracle.output_of(model, layer, row) for row in rows])
    values = keys @ weight.T + bias
    return out.mean(0), keys.mean(0), values[0], values.mean(0)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_leads_to_the_target_without_the_update(kind, layers, toy_tokenizers):
    tokenizer, model, untouched = toy_tokenizers[False], toy_model(kind, dtype=FP64), toy_model(kind, dtype=FP64)
    runner, method, last = Runner(model), METHODS["dual"], layers[-1]
    search = Search(runner, tokenizer, layers, method, CONTEXTS, SETTINGS, Clock())
    requests = [tokenise(runner, tokenizer, edit, CONTEXTS, method) for edit in EDITS]
    before = search.find(requests, merge=False)
    update = an_update(model, layers)
    update.apply(model)
    solved = search.find(requests, merge=False)
    updated = oracle.double_copy(model)
    update.revert(model)
    found = rebased(runner, search, solved, update)
    assert [each.bare is not None for each in found] == [True, False, False]
    for edit, own, was, base in zip(EDITS, found, solved, before, strict=True):
        parts = [(own, was, base, False)]
        if own.bare is not None:
            parts.append((own.bare, was.bare, base.bare, True))
        for mine, theirs, without, bare in parts:
            rows = rows_of(tokenizer, edit, bare=bare)
            out, key, first, mean = means(untouched, last, rows)
            moved = means(updated, last, rows)[0]
            if len(layers) == 1:
                # δ is added to a value, and this layer's is all that the update has changed.
                weights = [oracle.weight_and_bias(m, last)[0] for m in (updated, untouched)]
                moved, out = ((w @ key) for w in weights)
            wanted = theirs.value.delta + moved - out
            assert relative_error(mine.value.delta, wanted) < ALLOWED
            assert relative_error(theirs.value.delta, wanted) > 0.01
            assert relative_error(mine.keys.mean(0), key) < ALLOWED
            assert relative_error(mine.unprefixed_value, first) < ALLOWED
            assert relative_error(mine.mean_value, mean) < ALLOWED
            # All but the value is what a search without the update sees.
            assert relative_error(mine.keys, without.keys) < ALLOWED
            if mine.trail is not None:
                for layer, one in mine.trail.put_out.items():
                    assert relative_error(one, without.trail.put_out[layer]) < ALLOWED
                assert torch.equal(mine.trail.entering, theirs.trail.entering)
