"""δ: its loss and gradient against autograd over whole forwards, and what a batch of edits must not change."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oracle
from helpers import (
    CONTEXTS,
    END,
    FORWARD,
    LAYER,
    MIDDLE,
    SETTINGS,
    START,
    merging_tokenizer,
    relative_error,
    rounding,
    rounding_of_edit,
)
from rome_fast import Edit, ValueSettings
from rome_fast.errors import ArgumentError
from rome_fast.methods import method_named
from rome_fast.models.past import Contexts
from rome_fast.models.rows import edit_rows, essence_row
from rome_fast.models.runner import Runner
from rome_fast.search.keys import ContextRow, run_to_layer
from rome_fast.search.objective import exact_head
from rome_fast.search.requests import tokenise
from rome_fast.search.slots import Chunk, optimise_values
from toys import toy_model

# What is done twice in float64 differs by that, or, where it takes more steps, by that of them.
ROUNDING = rounding_of_edit(torch.float64)

# Lengths before, in and behind the subject that all differ, so that a batch pads on both sides of it.
MIXED = (
    START,
    END,
    MIDDLE,
    Edit("{} is a company that makes", "Apple", "telephones, tablets and computers"),
    Edit("The mother tongue of {} is, as we know from her early years in the south,", "Danielle Darrieux", "German"),
)


def values_of(model, tokenizer, edits, settings=SETTINGS, layer=LAYER, contexts=CONTEXTS, own_essence=True):
    """δ of each edit over the unprefixed and all prefixed rows, all edits in one batch."""
    runner = Runner(model)
    groups = [edit_rows(tokenizer, edit, ["", *contexts]) for edit in edits]
    if own_essence:
        groups = [[*group, essence_row(tokenizer, edit)] for group, edit in zip(groups, edits, strict=True)]
    flat = [ContextRow(row, i if i <= len(contexts) else 0) for group in groups for i, row in enumerate(group)]
    states = run_to_layer(runner, Contexts.of(runner, tokenizer, ["", *contexts], [layer]), flat, [layer])
    base = states.values[:: len(groups[0])]
    return optimise_values(runner, [Chunk(groups, states, base)], layer, settings, len(edits))


def oracle_of(model, tokenizer, edit, steps, layer=LAYER, **settings):
    return oracle.rome(
        model,
        tokenizer,
        edit.prompt,
        edit.subject,
        edit.target,
        layer=layer,
        method="rome",
        contexts=CONTEXTS,
        steps=steps,
        **settings,
    )


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_the_gradient_over_a_large_vocabulary_is_exact_for_few_rows(rows):
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=49152, **shape)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.copy_(0.1 + 0.1 * torch.randn(49152, 16, generator=generator))
    hidden = torch.randn(64, 16, generator=generator)

    def gradient(model, hidden):
        hidden = hidden.clone().requires_grad_()
        logits = exact_head(Runner(model), hidden)
        assert logits.shape == (len(hidden), 49152)
        return torch.autograd.grad(logits.logsumexp(1).sum(), hidden)[0]

    few, many = gradient(model, hidden[:rows]), gradient(model, hidden)[:rows]
    exact = gradient(model.double(), hidden[:rows].double())
    # Of torch's own error where there are many rows; sums over the vocabulary one by one have seven times as much.
    assert relative_error(few, exact) <= 2 * relative_error(many, exact)


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_a_batch_gives_each_edit_what_it_gets_alone(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind, dtype=torch.float64), toy_tokenizers[bos]
    together = values_of(model, tokenizer, MIXED)
    for edit, value in zip(MIXED, together, strict=True):
        (alone,) = values_of(model, tokenizer, [edit])
        assert relative_error(value.delta, alone.delta) < ROUNDING
        torch.testing.assert_close(value.losses, alone.losses, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 7, 16])
def test_a_head_in_parts_is_the_head_in_one(rows, toy_tokenizers, monkeypatch):
    """Parts that end within the targets, within the essences, and between the two."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[True]
    whole = values_of(model, tokenizer, MIXED)
    monkeypatch.setattr("rome_fast.search.objective._HEAD_ELEMENTS", rows * model.config.vocab_size)
    for value, wanted in zip(values_of(model, tokenizer, MIXED), whole, strict=True):
        assert value.led == wanted.led
        torch.testing.assert_close(value.losses, wanted.losses, rtol=ROUNDING, atol=0)
        assert relative_error(value.delta, wanted.delta) < ROUNDING


def test_losses_are_those_of_the_oracle(toy_tokenizers):
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[True]
    for edit, value in zip(MIXED[:2], values_of(model, tokenizer, MIXED[:2]), strict=True):
        wanted = oracle_of(model, tokenizer, edit, SETTINGS.steps)
        torch.testing.assert_close(list(value.losses), wanted.losses, rtol=ROUNDING, atol=0)
        assert relative_error(value.delta, wanted.delta) < ROUNDING


def test_a_context_that_has_other_tokens_in_front_of_a_prompt_is_not_shared_to_its_end():
    """Keys and values of the contexts are computed once: only of tokens that a row really begins with."""
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), merging_tokenizer((".", " "))
    whole, bare = ([token for token in tokenizer.tokenize(text) if "." in token] for text in ("nice. A", "nice."))
    assert (whole, bare) == ([". "], ["."])
    (value,) = values_of(model, tokenizer, [END])
    assert relative_error(value.delta, oracle_of(model, tokenizer, END, SETTINGS.steps).delta) < ROUNDING


def test_every_setting_reaches_the_optimiser(toy_tokenizers):
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), toy_tokenizers[False]
    settings = ValueSettings(
        steps=4, learning_rate=0.1, weight_decay=3.0, clamp=0.7, kl_factor=0.5, stop="loss", stop_loss=0.0
    )
    (value,) = values_of(model, tokenizer, [END], settings)
    wanted = oracle_of(model, tokenizer, END, 4, lr=0.1, weight_decay=3.0, clamp=0.7, kl_factor=0.5, stop_loss=0.0)
    torch.testing.assert_close(list(value.losses), wanted.losses, rtol=ROUNDING, atol=0)
    assert relative_error(value.delta, wanted.delta) < ROUNDING


def test_delta_stays_within_the_clamp(toy_tokenizers):
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[True]
    (value,) = values_of(model, tokenizer, [END], replace(SETTINGS, clamp=0.3))
    v0 = oracle_of(model, tokenizer, END, 1).v0
    assert float(value.delta.norm()) == pytest.approx(0.3 * float(v0.norm()), rel=ROUNDING)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("drafted", [0, 1])
def test_the_essence_is_a_row_of_its_own_only_where_it_has_to_be(bos, drafted, toy_tokenizers):
    """Where the prompt begins with the subject, the row without a context knows as much at its end."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[bos]
    requests = [tokenise(Runner(model), tokenizer, edit, CONTEXTS, method_named("rome")) for edit in (START, MIDDLE)]
    assert [len(request.rows) - request.scored for request in requests] == [0, 1]
    settings = replace(SETTINGS, stop="argmax", margin=1, draft_rows=drafted, steps=8)
    (with_row,) = values_of(model, tokenizer, [START], settings)
    (without,) = values_of(model, tokenizer, [START], settings, own_essence=False)
    allowed = rounding_of_edit(torch.float64)
    torch.testing.assert_close(without.losses, with_row.losses, rtol=allowed, atol=0)
    assert relative_error(without.delta, with_row.delta) < allowed


def test_one_step_is_one_loss_and_no_update(toy_tokenizers):
    (value,) = values_of(toy_model("gpt2"), toy_tokenizers[False], [END], replace(SETTINGS, steps=1))
    assert len(value.losses) == 1
    assert not value.delta.any()


def test_an_edit_that_is_done_leaves_the_batch_without_a_trace(toy_tokenizers):
    """Edits that stop at different steps: rows, Adam state and KL reference of the rest must stay theirs."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[True]
    alone = [values_of(model, tokenizer, [edit], replace(SETTINGS, steps=8))[0] for edit in MIXED]
    # A loss that one edit reaches early, another one late and the rest never.
    limit = sorted(min(value.losses[2:6]) for value in alone)[1] + 1e-3
    settings = replace(SETTINGS, steps=8, stop_loss=limit)
    alone = [values_of(model, tokenizer, [edit], settings)[0] for edit in MIXED]
    assert len({len(value.losses) for value in alone}) > 2

    for together, wanted in zip(values_of(model, tokenizer, MIXED, settings), alone, strict=True):
        allowed = rounding_of_edit(torch.float64)
        torch.testing.assert_close(together.losses, wanted.losses, rtol=allowed, atol=0)
        assert relative_error(together.delta, wanted.delta) < allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_half_precision_follows_the_oracle_on_the_same_weights(kind, bos, dtype, toy_tokenizers):
    model, tokenizer = toy_model(kind, dtype=dtype), toy_tokenizers[bos]
    # Sums are made in fp32: there is a rounding for each of some ten activations per layer, in the three that follow. A
    # step has a forward and a backward pass; a loss one forward pass, and the mean over some twenty tokens of its rows.
    allowed, allowed_loss = rounding(dtype, SETTINGS.steps * 3 * 10 * 3), rounding(dtype, 10 * 3) / 20**0.5
    value = values_of(model, tokenizer, MIXED[:2])[0]
    wanted = oracle_of(model, tokenizer, MIXED[0], SETTINGS.steps)
    assert value.delta.dtype == torch.float32
    torch.testing.assert_close(list(value.losses), wanted.losses, rtol=allowed_loss, atol=0)
    # Adam's first step has the length of the learning rate however small a gradient is, so that a component smaller
    # than its rounding may go the other way, and others after it. Of normal numbers with the error ε, ε/π change their
    # sign; two more may do so by chance.
    first = values_of(model, tokenizer, MIXED[:2], replace(SETTINGS, steps=2))[0].delta
    turned = first.sign() != oracle_of(model, tokenizer, MIXED[0], 2).delta.sign()
    assert turned.sum() <= rounding(dtype, 3 * 10 * 3) / math.pi * len(turned) + 2
    if turned.any():
        assert (value.delta - wanted.delta).abs().median() < allowed * wanted.delta.abs().median()
    else:
        assert relative_error(value.delta, wanted.delta) < allowed


def test_weights_get_no_gradient_and_ask_for_one_as_before(toy_tokenizers):
    model = toy_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    values_of(model, toy_tokenizers[True], [END])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_ends_the_edit_and_says_so(toy_tokenizers):
    """A learning rate that throws fp16 activations out of range, with a clamp that does not hold them."""
    settings = replace(SETTINGS, learning_rate=1e6, clamp=1e9)
    value, other = values_of(toy_model("gpt2", dtype=torch.float16), toy_tokenizers[False], [END, START], settings)
    for each in (value, other):
        assert not each.finite
        assert not math.isfinite(each.losses[-1])
        assert all(math.isfinite(loss) for loss in each.losses[:-1])
        assert len(each.losses) < SETTINGS.steps
        assert not each.delta.any()


def test_led_is_the_share_of_rows_that_the_target_leads_in(toy_tokenizers):
    """Counted on whole forwards with δ added: in such a row every token of the target is the most probable one."""
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), toy_tokenizers[False]
    edits = [Edit("The city of {}", "Chicago", "Rome"), Edit("The city of {}", "Paris", "Rome Paris Rome"), START]
    shares = []
    for edit, value in zip(edits, values_of(model, tokenizer, edits, replace(SETTINGS, steps=20)), strict=True):
        leads, tokens = [], []
        for context in ("", *CONTEXTS):
            row = oracle.make_row(tokenizer, context, edit.prompt, edit.subject, edit.target)
            with torch.no_grad(), oracle.delta_added(model, LAYER, row.subject_position, value.delta):
                best = oracle.logits_of(model, row.input_ids).argmax(dim=-1)
            right = [int(best[at]) == label for at, label in zip(row.target_logits_at, row.target_ids, strict=True)]
            leads.append(all(right))
            tokens += right
        assert value.led == sum(leads) / len(leads)
        shares.append((value.led, sum(tokens) / len(tokens)))
    assert max(shares)[0] > 0
    # Not the share of tokens, of which those behind the first are easy.
    assert any(rows < of_tokens for rows, of_tokens in shares)


def loss_of(model, tokenizer, edit, delta, settings):
    """The loss of δ over all rows, by whole forwards."""
    double = oracle.double_copy(model)
    rows = [oracle.make_row(tokenizer, context, edit.prompt, edit.subject, edit.target) for context in ("", *CONTEXTS)]
    kl_row = oracle.make_row(tokenizer, "", "{} is a", edit.subject, None)
    v0 = oracle_of(model, tokenizer, edit, 1).v0
    before = oracle.log_p_at_subject(double, LAYER, kl_row, torch.zeros_like(v0))
    factors = settings.weight_decay, settings.kl_factor
    return float(oracle.value_loss(double, LAYER, rows, kl_row, before, delta, float(v0.norm()), *factors))


@pytest.mark.parametrize(("kind", "bos", "steps"), [("gpt2", False, 5), ("llama", True, 30)])
def test_a_draft_on_some_rows_ends_in_the_loss_of_all_rows(kind, bos, steps, toy_tokenizers):
    """And in the same loss whatever other edits are in the batch, or how many steps each of them takes."""
    model, tokenizer = toy_model(kind, dtype=torch.float64), toy_tokenizers[bos]
    settings = ValueSettings(steps=steps - 3, extra_steps=3, stop="argmax", margin=1, draft_rows=2)
    edits = [Edit("The city of {}", "Chicago", "Rome"), START, Edit("The museum of {}", "Vienna", "Paris"), END]
    together = values_of(model, tokenizer, edits, settings)
    for edit, value in zip(edits, together, strict=True):
        assert value.losses[-1] == pytest.approx(
            loss_of(model, tokenizer, edit, value.delta, settings), rel=rounding(torch.float64, FORWARD)
        )
        assert len(value.losses) <= steps
        assert len(value.losses) == steps or value.led == 1
        (alone,) = values_of(model, tokenizer, [edit], settings)
        allowed = rounding_of_edit(torch.float64)
        torch.testing.assert_close(value.losses, alone.losses, rtol=allowed, atol=0)
        assert relative_error(value.delta, alone.delta) < allowed
    if steps == 30:
        assert {len(value.losses) < steps for value in together} == {True, False}


def test_a_decay_that_holds_an_edit_at_zero_is_dropped(toy_tokenizers):
    """By our own stop rule; by the released one it stays, as in the released code."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[False]
    edit, held = Edit("The city of {}", "Chicago", "Rome"), ValueSettings(steps=12, weight_decay=1e4, draft_rows=0)
    (released,) = values_of(model, tokenizer, [edit], replace(held, stop="loss"))
    assert min(released.losses[1:]) > released.losses[0]
    (own,) = values_of(model, tokenizer, [edit], held)
    assert own.led == 1
    torch.testing.assert_close(own.losses[:6], released.losses[:6], rtol=rounding_of_edit(torch.float64), atol=0)
    without = loss_of(model, tokenizer, edit, own.delta, replace(held, weight_decay=0.0))
    assert own.losses[-1] == pytest.approx(without, rel=rounding(torch.float64, FORWARD))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"margin": -1}, "margin -1"),
        ({"extra_steps": -1}, "extra_steps -1"),
        ({"draft_rows": -1}, "draft_rows -1"),
        ({"stop": "never"}, "stop 'never', wanted 'argmax' or 'loss'"),
    ],
)
def test_settings_that_make_no_sense(setting, message):
    with pytest.raises(ArgumentError, match=message):
        ValueSettings(**setting)
