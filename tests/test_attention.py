"""Attention to a past where it lies: the same values as with joined keys, and no model that it would be wrong for."""

from dataclasses import replace

import pytest
import torch

from rome_fast import Edit, ValueSettings, apply_edits, verify
from rome_fast.models import attention, fused
from rome_fast.models.attention import NAME, attending_apart
from rome_fast.models.past import ContextPast, Contexts, FrozenPast, Recorder
from rome_fast.models.runner import Runner
from rome_fast.models.verification import reads_past_apart
from toys import toy_model
from zoo import zoo_model

EDITS = [Edit("The city of {}", "Chicago", "Rome"), Edit("{} lies in", "The old port of Istanbul", "France and Turkey")]
CONTEXTS = ("The weather is nice. ", "What is that? ", "I think that he came late. ")
F32, BF16 = torch.float32, torch.bfloat16
SETTINGS = ValueSettings(steps=6, stop="loss", weight_decay=1e-3, clamp=3.0)

# Grouped heads; all heads alike, learned positions; caps, windows and a layer that is run again; side by side.
APART = ("llama", "gpt2", "gemma3_text", "qwen2_moe", "cohere2", "gpt_neox")
# Attention of their own: two softmaxes; latent vectors with values narrower than keys; written out in the layer.
JOINED = ("diffllama", "deepseek_v2", "falcon", "gpt_neo")


def model_of(kind):
    return toy_model(kind) if kind in ("llama", "gpt2") else zoo_model(kind)


def edited(model, tokenizer):
    return apply_edits(
        model,
        EDITS,
        tokenizer=tokenizer,
        statistics="identity",
        method="c-rome",
        layer=1,
        contexts=CONTEXTS,
        settings=SETTINGS,
        guard="off",
        unconverged="write",
    )


@pytest.mark.parametrize("kind", APART)
def test_values_are_those_of_joined_keys(kind, toy_tokenizers, monkeypatch):
    model, calls, ours = model_of(kind), [], attention.suffix_attention

    def counted(*arguments, **named):
        calls.append(named)
        return ours(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "suffix_attention", counted)
        patch.setattr(attention, "pays", lambda *_: True)
        patch.setattr(fused, "ENABLED", False)  # which does not go through a layer's own attention
        assert verify(model, 1).attends_apart
        calls.clear()
        apart = edited(model, toy_tokenizers[False])
    # In every step, every layer above the edit layer, and with it where it is run again; some rows have a middle.
    steps = max(record.steps for record in apart.records)
    again = not verify(model, 1).adds_unchanged
    assert len(calls) == steps * (len(Runner(model).layers) - 2 + again)
    assert calls[-1]["middle_keys"] is not None
    apart.revert()

    def fail(*_arguments, **_named):
        raise NotImplementedError

    model = model_of(kind)
    monkeypatch.setattr(attention, "suffix_attention", fail)
    assert not verify(model, 1).attends_apart
    joined = edited(model, toy_tokenizers[False])
    for one, other in zip(apart.records, joined.records, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-5)
    name = Runner(model).weight_name(1)
    change, wanted = (result.delta.updates[name] for result in (apart, joined))
    wanted = wanted.left.double() @ wanted.right.double()
    assert torch.dist(change.left.double() @ change.right.double(), wanted) <= 2e-4 * wanted.norm()


@pytest.mark.parametrize(("kind", "dtype", "apart"), [("gpt2", F32, False), ("gpt2", BF16, True), ("llama", F32, True)])
def test_keys_are_joined_where_that_is_faster(kind, dtype, apart):
    """On a CPU in fp32, if no heads share them."""
    model = toy_model(kind, dtype=dtype)
    found = verify(model, 1)
    assert found.attends_apart
    assert reads_past_apart(Runner(model), found) == apart


@pytest.mark.parametrize("kind", JOINED)
def test_a_model_with_attention_of_its_own_is_found_out(kind, toy_tokenizers):
    model = zoo_model(kind)
    usual = model.config._attn_implementation
    found = verify(model, 1)
    assert found.shares_past
    assert not found.attends_apart
    assert model.config._attn_implementation == usual
    # Words in front of the subject: a random model carries a fact along no sentence, and finds δ hard behind them.
    (record, _) = edited(model, toy_tokenizers[False]).records
    assert record.probability_after > record.probability_before


def frozen(model, apart):
    """A past of one context of three tokens."""
    runner = Runner(model)
    recorder = Recorder()
    entering = runner.embed(torch.tensor([[5, 6, 7]]))
    runner.run(entering, 0, len(runner.layers), past=recorder)
    contexts = Contexts(((5, 6, 7),), torch.tensor([3]), recorder, 0, 0, entering)
    one = torch.tensor([0])
    return FrozenPast(ContextPast(contexts, one), {}, {}, torch.tensor([3]), one, apart)


@torch.no_grad()
def test_a_past_apart_is_neither_gathered_nor_joined():
    model = toy_model("llama")
    past = frozen(model, apart=True)
    keys, values = torch.randn(2, 1, 2, 4, 12).unbind()
    with attending_apart(Runner(model).decoder.configs):
        assert all(mine is theirs for mine, theirs in zip(past.update(keys, values, 2), (keys, values), strict=True))
        attention._ASKED.past = None
    joined = replace(past, apart=False).update(keys, values, 2)
    assert [x.shape[2] for x in joined] == [7, 7]
    assert past.parts(2)["context_keys"] is past.shared.contexts.recorded.keys[2]


@torch.no_grad()
def test_a_past_that_is_asked_for_and_not_attended_to_is_an_error():
    """A layer attends to nothing but its own tokens then, which shows in no shape."""
    model = toy_model("llama")
    past, configs = frozen(model, apart=True), Runner(model).decoder.configs
    usual = model.config._attn_implementation
    new = torch.zeros(1, 2, 1, 12)
    with attending_apart(configs):
        assert model.config._attn_implementation == NAME
    with pytest.raises(NotImplementedError, match="does not replace"), attending_apart(configs):
        past.update(new, new, 0)
    assert model.config._attn_implementation == usual
    with pytest.raises(KeyError), attending_apart(configs):
        raise KeyError
    assert model.config._attn_implementation == usual


def test_scores_of_more_than_queries_and_keys_are_refused():
    model = toy_model("llama")
    past = frozen(model, apart=True)
    query = torch.zeros(1, 4, 1, 16)
    with pytest.raises(NotImplementedError, match="no past"):
        attention._attend(model, query, query, query, None)
    attention.ask(past, 0)
    with pytest.raises(NotImplementedError, match="s_aux"):
        attention._attend(model, query, query, query, None, s_aux=torch.zeros(4))
    attention._ASKED.past = None
