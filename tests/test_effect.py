"""How well the model still reads, measured by every call, and what the guard makes of it."""

import math

import pytest
import torch

import oracle
from helpers import CONTEXTS, END, MIDDLE, all_bits, changed, edited
from rome_fast.closing.guard import CollapseWarning
from rome_fast.errors import CollapseError
from toys import toy_model

# A toy's perplexity of some 1,000 is a mean of some 60 log-probabilities, each of sums over at most 600 logits.
NLL = 1e-5


def nll_of(model, tokenizer, contexts):
    """Mean over the contexts of the mean NLL of their tokens but the first one, by the model's own float64 forward."""
    model, found = oracle.double_copy(model), []
    for context in contexts:
        ids = tokenizer(context.strip())["input_ids"]
        first = 1 + (ids[0] == tokenizer.bos_token_id)
        log_p = oracle.logits_of(model, ids).log_softmax(-1)
        found.append(-sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids))) / (len(ids) - first))
    return sum(found) / len(found)


@pytest.mark.parametrize("bos", [False, True])
def test_the_figures_are_those_of_the_models_own_forward(bos, toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[bos]
    before = nll_of(model, tokenizer, CONTEXTS)
    result = edited(model, tokenizer, [MIDDLE, END], measure=True)
    after = nll_of(model, tokenizer, CONTEXTS)
    nll = result.context_nll
    assert nll.before == pytest.approx(before, abs=NLL)
    assert nll.after == pytest.approx(after, abs=NLL)
    assert abs(after - before) > 100 * NLL
    assert (nll.origin, nll.since_origin) == (nll.before, nll.after)
    assert result.report()["context_nll"]["after"] == nll.after


def test_contexts_of_one_token_say_nothing_and_refuse_nothing(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    options = {"measure": True, "guard": "raise"}
    result = edited(model, tokenizer, MIDDLE, contexts=("a ",), **options)
    assert result.context_nll is result.report()["context_nll"] is None
    assert result.records[0].applied
    # Nor is what they do not say taken for where the model began.
    later = edited(model, tokenizer, END, contexts=("It rained. ",), **options).context_nll
    assert later.origin == later.before


def test_what_adds_up_over_calls_is_measured_from_the_first_of_them(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    original = nll_of(model, tokenizer, CONTEXTS)
    first = edited(model, tokenizer, MIDDLE, measure=True)
    other = ("It rained all day. ", "She lives in Rome. ")
    second = edited(model, tokenizer, END, measure=True, contexts=other).context_nll
    assert second.origin == pytest.approx(original, abs=NLL)
    assert second.since_origin == pytest.approx(nll_of(model, tokenizer, CONTEXTS), abs=NLL)
    assert second.after == pytest.approx(nll_of(model, tokenizer, other), abs=NLL)
    assert first.context_nll.origin == second.origin


def test_the_guard_takes_an_edit_back_that_makes_the_model_read_much_worse(toy_tokenizers, monkeypatch):
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[False]
    before = all_bits(model)
    rise = edited(model, tokenizer, MIDDLE, measure=True)
    drift = rise.context_nll.drift
    rise.revert()
    monkeypatch.setattr("rome_fast.closing.guard.UPDATE_RATIO_LIMIT", math.inf)
    monkeypatch.setattr("rome_fast.closing.effect.DRIFT_LIMIT", drift - 1e-9)
    for guard in ("raise", "skip"):
        with pytest.raises(CollapseError, match=f"NLL of the contexts rose by {drift:.2f} nats a token"):
            edited(model, tokenizer, MIDDLE, measure=True, guard=guard)
        assert changed(model, before) == []
    with pytest.warns(CollapseWarning, match="reads ordinary text much worse"):
        edited(model, tokenizer, MIDDLE, measure=True, guard="warn").revert()
    monkeypatch.setattr("rome_fast.closing.effect.DRIFT_LIMIT", drift + 1e-9)
    assert edited(model, tokenizer, MIDDLE, measure=True, guard="raise").records[0].applied
