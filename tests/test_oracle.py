"""The oracle against sums done by other means, and the toys that it is run on.

What can be checked at all is checked from the outside: an edited copy of the model is run and its
down-projection read by a hook of this file, positions are counted by tokenising the text up to the subject,
losses come from transformers.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from helpers import FORWARD, rounding
from oracle import (
    METHODS,
    OracleResult,
    delta_added,
    double_copy,
    down_projection,
    dual,
    first_token_moment,
    joint,
    log_p_at_subject,
    logits_of,
    make_row,
    rome,
    second_moment,
    sentence_perplexity,
    target_probability,
    value_loss,
)
from toys import EOS, KINDS, SENTENCES, VOCABULARY, save_toy, toy_model, toy_tokenizer

LAYER = 1
PROMPT, SUBJECT, TARGET = "The city of {} is a twin city of", "Chicago", "Melbourne"
CONTEXTS = ["The weather is nice. ", "Snow fell during the night. ", "What is that? "]

# n u κ of 80 terms and a second moment of condition 1e5, for elements down to a hundredth of the largest; a wrong
# formula is off by 1e-2 or more.
SOLVED = {"rtol": 1e-9, "atol": 1e-11}
# Of what forward passes say of the same thing in two ways, all in float64.
ROUNDING = rounding(torch.float64, FORWARD)


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedModel:
    return toy_model("gpt2")


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return toy_tokenizer(bos=False)


def tokenizer_for(kind: str) -> PreTrainedTokenizerFast:
    """With <s> for the Llamas and without for the others, as the real ones have it."""
    return toy_tokenizer(bos=kind in ("llama", "mistral"))


def token_count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def read_down_projection(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Input (tokens, d_ff) and output (tokens, d) of the down-projection in LAYER."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = down_projection(model, LAYER).register_forward_hook(
        lambda _module, args, output: seen.append((args[0][0], output[0]))
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def edited_copy(model: PreTrainedModel, delta_w: Tensor) -> PreTrainedModel:
    edited = double_copy(model)
    weight = down_projection(edited, LAYER).weight
    with torch.no_grad():
        weight += delta_w.T if weight.shape == delta_w.T.shape else delta_w
    return edited


@contextmanager
def output_shifted(model: PreTrainedModel, position: int, delta: Tensor) -> Iterator[None]:
    """The down-projection's output plus delta at one position, by a mask instead of an index."""

    def shift(_module: object, _args: object, output: Tensor) -> Tensor:
        mask = torch.zeros(output.shape[1], 1, dtype=output.dtype)
        mask[position] = 1.0
        return output + mask * delta

    handle = down_projection(model, LAYER).register_forward_hook(shift)
    yield
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edited_model_puts_out_v0_plus_delta_at_the_key_of_the_method(kind: str, method: str) -> None:
    model, tokenizer = toy_model(kind), tokenizer_for(kind)
    moment, _ = second_moment(model, tokenizer, SENTENCES[:8], LAYER, 64)
    result = rome(
        model,
        tokenizer,
        PROMPT,
        SUBJECT,
        TARGET,
        layer=LAYER,
        method=method,
        contexts=CONTEXTS,
        second_moment=moment,
        steps=2,
    )
    torch.testing.assert_close(result.delta_w @ result.k_den, result.residual, **SOLVED)

    everything = ["", *CONTEXTS]
    contexts = {"rome": [""], "p-rome": [""], "c-rome": everything, "c-rome-released": everything}[method]
    before, after, keys = [], [], []
    edited = edited_copy(model, result.delta_w)
    for context in contexts:
        ids = tokenizer(context + PROMPT.replace("{}", SUBJECT))["input_ids"]
        position = token_count(tokenizer, context + "The city of " + SUBJECT) - 1
        key, value = read_down_projection(double_copy(model), ids)
        keys.append(key[position])
        before.append(value[position])
        after.append(read_down_projection(edited, ids)[1][position])
    if method != "c-rome-released":
        torch.testing.assert_close(torch.stack(before).mean(0), result.v0, **SOLVED)
    torch.testing.assert_close(torch.stack(keys).mean(0), result.k_den, **SOLVED)
    torch.testing.assert_close(torch.stack(after).mean(0), result.v0 + result.delta, **SOLVED)
    assert result.delta.norm() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dual_edit_puts_out_both_values(kind: str) -> None:
    """One at the mean key behind the contexts, one at the first of all positions."""
    model, tokenizer = toy_model(kind), toy_tokenizer(bos=False)
    moment, _ = second_moment(model, tokenizer, SENTENCES[:8], LAYER, 64)
    first = first_token_moment(model, LAYER)
    arguments = {"layer": LAYER, "contexts": CONTEXTS, "second_moment": moment, "first_tokens": first, "steps": 2}
    arguments |= {"ridge": 0.0}
    prompt = "{} is a twin city of"
    result = dual(model, tokenizer, prompt, SUBJECT, TARGET, weight=0.5, scale=0.7, **arguments)
    original, edited = double_copy(model), edited_copy(model, result.delta_w)

    def change(ids: list[int], position: int) -> Tensor:
        return read_down_projection(edited, ids)[1][position] - read_down_projection(original, ids)[1][position]

    changes = []
    for context in CONTEXTS:
        ids = tokenizer(context + prompt.replace("{}", SUBJECT))["input_ids"]
        changes.append(change(ids, token_count(tokenizer, context + SUBJECT) - 1))
    torch.testing.assert_close(torch.stack(changes).mean(0), result.prefixed.delta, **SOLVED)
    bare = change(tokenizer(prompt.replace("{}", SUBJECT))["input_ids"], 0)
    assert result.first_token
    torch.testing.assert_close(bare, 0.7 * result.unprefixed.delta, **SOLVED)
    assert (result.unprefixed.delta - result.prefixed.delta).norm() > 0.1

    # With more weight, the other first tokens are moved less.
    heavier = dual(model, tokenizer, prompt, SUBJECT, TARGET, weight=50.0, scale=0.7, **arguments)
    moved = [torch.trace(r.delta_w @ first @ r.delta_w.T).item() for r in (result, heavier)]
    assert moved[1] < moved[0]
    inside = dual(model, tokenizer, PROMPT, SUBJECT, TARGET, weight=0.5, **arguments)
    assert not inside.first_token
    # Both of its keys get the one delta.
    for key in (inside.prefixed.k_den, inside.unprefixed.k_den):
        torch.testing.assert_close(inside.delta_w @ key, inside.prefixed.delta, **SOLVED)
    assert (inside.prefixed.k_den - inside.unprefixed.k_den).norm() > 0.01


def test_the_moment_of_first_tokens_is_the_mean_over_the_vocabulary(gpt2: PreTrainedModel) -> None:
    model = double_copy(gpt2)
    keys = [read_down_projection(model, [token])[0][0] for token in range(VOCABULARY)]
    expected = sum(torch.outer(key, key) for key in keys) / VOCABULARY
    torch.testing.assert_close(first_token_moment(gpt2, LAYER), expected, **SOLVED)


def test_the_left_key_is_the_mean_over_the_rows_of_the_method(
    gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast
) -> None:
    keys = {}
    for context in ["", *CONTEXTS]:
        ids = plain(context + PROMPT.replace("{}", SUBJECT))["input_ids"]
        position = token_count(plain, context + "The city of " + SUBJECT) - 1
        keys[context] = read_down_projection(double_copy(gpt2), ids)[0][position]
    prefixed = sum(keys[context] for context in CONTEXTS) / 3
    everything = (3 * prefixed + keys[""]) / 4
    for method in METHODS:
        result = edit(gpt2, plain, method=method, contexts=CONTEXTS, steps=1)
        torch.testing.assert_close(result.k_left, keys[""] if method == "p-rome" else everything, **SOLVED)
        torch.testing.assert_close(result.k_unprefixed, keys[""], **SOLVED)
        torch.testing.assert_close(result.k_mean, everything, **SOLVED)


def test_c_rome_leaves_out_the_row_in_which_nothing_precedes_the_subject(
    gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast
) -> None:
    subject, prompt = "Rome", "{} is a twin city of"
    assert token_count(plain, subject) == 1
    keys = {}
    for context in ["", *CONTEXTS]:
        ids = plain(context + prompt.replace("{}", subject))["input_ids"]
        keys[context] = read_down_projection(double_copy(gpt2), ids)[0][token_count(plain, context + subject) - 1]
    prefixed = sum(keys[context] for context in CONTEXTS) / 3
    for method, mean in (("c-rome", prefixed), ("c-rome-released", (3 * prefixed + keys[""]) / 4)):
        result = rome(gpt2, plain, prompt, subject, TARGET, layer=LAYER, method=method, contexts=CONTEXTS, steps=1)
        torch.testing.assert_close(result.k_mean, mean, **SOLVED)


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    method: str = "p-rome",
    contexts: list[str] | None = None,
    steps: int = 2,
    clamp: float = 1e9,
    weight_decay: float = 0.5,
    kl_factor: float = 0.0625,
    stop_loss: float = 0.0,
) -> OracleResult:
    """An edit with C = I; by default of the one unprefixed row, with one Adam step and no clamp."""
    return rome(
        model,
        tokenizer,
        PROMPT,
        SUBJECT,
        TARGET,
        layer=LAYER,
        method=method,
        contexts=contexts or [],
        steps=steps,
        clamp=clamp,
        weight_decay=weight_decay,
        kl_factor=kl_factor,
        stop_loss=stop_loss,
    )


def test_one_row_with_the_identity_by_hand(gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast) -> None:
    """The first Adam step moves every coordinate by lr; then dW = delta k^T / ||k||^2."""
    result = edit(gpt2, plain)
    position = token_count(plain, "The city of Chicago") - 1
    keys, values = read_down_projection(double_copy(gpt2), plain("The city of Chicago")["input_ids"])
    key = keys[position]

    # Adam's eps of 1e-8 takes eps / |g| off the step; the smallest coordinate of this gradient is 2e-5.
    half = torch.full((48,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(result.delta.abs(), half, rtol=1e-3, atol=0)
    torch.testing.assert_close(result.v0, values[position], **SOLVED)
    outer = result.delta[:, None] * key[None, :]
    torch.testing.assert_close(result.delta_w, outer / (key**2).sum(), **SOLVED)
    assert result.denominator == pytest.approx((key**2).sum().item(), rel=ROUNDING)
    assert result.numerator_norm == pytest.approx((result.delta.norm() * key.norm()).item(), rel=ROUNDING)


def test_the_terms_of_the_loss_one_by_one(gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast) -> None:
    """Neither the norm nor KL has a gradient at zero, so one step gives the same delta for all factors."""
    result = edit(gpt2, plain)
    delta, v0 = result.delta, result.v0
    p_target = target_probability(gpt2, plain, "The city of Chicago is a twin city of", TARGET)
    # In fp32, as torch makes a tensor of Python's numbers: one rounding of p and one of its logarithm.
    assert result.losses[0] == pytest.approx(-torch.tensor(p_target).log().mean().item(), rel=2 * 2**-24)

    def of_the_difference(to: OracleResult) -> float:
        return rounding(torch.float64, FORWARD, to.losses[1] / (to.losses[1] - result.losses[1]))

    # A gradient of the size of rounding, 1e-16, is 2e-12 of the smallest coordinate of the others, and Adam's first
    # step keeps 5e-4 of that.
    more_decay = edit(gpt2, plain, weight_decay=3.5)
    torch.testing.assert_close(more_decay.delta, delta, rtol=1e-14, atol=0)
    decay = delta.norm() / v0.norm() ** 2
    assert more_decay.losses[1] - result.losses[1] == pytest.approx(3 * decay.item(), rel=of_the_difference(more_decay))

    more_kl = edit(gpt2, plain, kl_factor=1.0625)
    torch.testing.assert_close(more_kl.delta, delta, rtol=1e-14, atol=0)
    model, ids = double_copy(gpt2), plain("Chicago is a")["input_ids"]
    position = token_count(plain, "Chicago") - 1
    log_before = logits_of(model, ids)[position].log_softmax(-1)
    with output_shifted(model, position, delta):
        log_after = logits_of(model, ids)[position].log_softmax(-1)
    kl_after_from_before = F.kl_div(log_before, log_after, reduction="sum", log_target=True)
    assert kl_after_from_before > 0.01
    assert more_kl.losses[1] - result.losses[1] == pytest.approx(
        kl_after_from_before.item(), rel=of_the_difference(more_kl)
    )


def test_the_nll_is_the_mean_over_rows_of_the_mean_over_target_tokens(
    gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast
) -> None:
    result = edit(gpt2, plain, method="rome", contexts=CONTEXTS, weight_decay=0.0, kl_factor=0.0)
    model = double_copy(gpt2)
    for delta, loss in [(torch.zeros_like(result.delta), result.losses[0]), (result.delta, result.losses[1])]:
        nlls = []
        for context in ["", *CONTEXTS]:
            text = context + "The city of Chicago is a twin city of"
            ids = plain(text + " Melbourne")["input_ids"]
            start = token_count(plain, text)
            with output_shifted(model, token_count(plain, context + "The city of Chicago") - 1, delta):
                logits = logits_of(model, ids)
            nlls.append(F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])).item())
        assert len(ids) - start > 1
        assert loss == pytest.approx(sum(nlls) / 4, rel=ROUNDING)


def test_the_gradient_of_the_loss_by_finite_differences(gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast) -> None:
    model = double_copy(gpt2)
    rows = [make_row(plain, context, PROMPT, SUBJECT, TARGET) for context in ["", CONTEXTS[0]]]
    kl_row = make_row(plain, "", "{} is a", SUBJECT, None)
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(48, generator=generator, dtype=torch.float64)
    v0 = torch.randn(48, generator=generator, dtype=torch.float64)
    log_p_before = log_p_at_subject(model, LAYER, kl_row, torch.zeros_like(delta))

    def loss_at(at: Tensor) -> Tensor:
        return value_loss(model, LAYER, rows, kl_row, log_p_before, at, v0.norm().item(), 0.5, 0.5)

    at = delta.clone().requires_grad_()
    loss_at(at).backward()
    eps = 1e-5
    directions = torch.randn(12, 48, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        differences = [(loss_at(delta + eps * e) - loss_at(delta - eps * e)) / (2 * eps) for e in directions]
    # Central differences: 1e-16 / eps of rounding and eps^2 of curvature, both of the order 1e-10.
    torch.testing.assert_close(directions @ at.grad, torch.stack(differences), rtol=1e-6, atol=1e-8)


def test_adam_and_the_clamp_by_hand(gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast) -> None:
    """Adam written out, with the gradient of the oracle's loss, over three clamped steps."""
    clamp, lr, steps = 0.6, 0.5, 4
    result = edit(gpt2, plain, steps=steps, clamp=clamp)
    assert len(result.losses) == steps
    model = double_copy(gpt2)
    row = make_row(plain, "", PROMPT, SUBJECT, TARGET)
    kl_row = make_row(plain, "", "{} is a", SUBJECT, None)
    delta = torch.zeros(48, dtype=torch.float64)
    log_p_before = log_p_at_subject(model, LAYER, kl_row, delta)
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    clamped = []
    for step in range(1, steps):
        at = delta.clone().requires_grad_()
        loss = value_loss(model, LAYER, [row], kl_row, log_p_before, at, result.v0.norm().item(), 0.5, 0.0625)
        (gradient,) = torch.autograd.grad(loss, at)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        delta = delta - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        clamped.append(bool(delta.norm() > clamp * result.v0.norm()))
        if clamped[-1]:
            delta = delta * clamp * result.v0.norm() / delta.norm()
    assert any(clamped)
    # Three steps; a coordinate whose gradient is a hundredth of the others' has a hundred times their error.
    rounded = rounding(torch.float64, 3 * 3 * FORWARD, 100)
    torch.testing.assert_close(result.delta, delta, rtol=rounded, atol=rounded * lr)


def test_the_loop_stops_at_a_small_loss_before_any_step(gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast) -> None:
    result = edit(gpt2, plain, steps=20, stop_loss=1e9)
    assert len(result.losses) == 1
    assert result.delta.norm() == 0
    assert result.delta_w.norm() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_raises_the_probability_of_its_target(kind: str) -> None:
    model, tokenizer = toy_model(kind), tokenizer_for(kind)
    prompt, target = "The city of {}", "Rome"
    result = rome(model, tokenizer, prompt, SUBJECT, target, layer=LAYER, method="p-rome", contexts=[])
    edited = edited_copy(model, result.delta_w)
    (before,) = target_probability(model, tokenizer, "The city of Chicago", target)
    (after,) = target_probability(edited, tokenizer, "The city of Chicago", target)
    assert len(result.losses) == 20
    assert result.losses[0] == pytest.approx(-math.log(before), rel=ROUNDING)
    assert after > 20 * before
    assert after > 0.1


def test_a_joint_edit_of_one_is_the_single_edit_and_of_two_satisfies_both(
    gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast
) -> None:
    moment, _ = second_moment(gpt2, plain, SENTENCES[:8], LAYER, 64)
    settings = {
        "layer": LAYER,
        "method": "rome",
        "contexts": CONTEXTS[:1],
        "second_moment": moment,
        "steps": 3,
    }
    one = rome(gpt2, plain, PROMPT, SUBJECT, TARGET, **settings)
    two = rome(gpt2, plain, "{} was the founder of", "Steve Jobs", "Paris", **settings)
    torch.testing.assert_close(joint([one], moment), one.delta_w, **SOLVED)
    both = joint([one, two], moment)
    torch.testing.assert_close(both @ one.k_den, one.residual, **SOLVED)
    torch.testing.assert_close(both @ two.k_den, two.residual, **SOLVED)
    assert (both - one.delta_w - two.delta_w).norm() > 1e-2 * both.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_second_moment_seen_from_the_output_side(kind: str) -> None:
    """W C W^T is the second moment of output minus bias, which needs no key."""
    model, tokenizer = toy_model(kind), tokenizer_for(kind)
    texts = [SENTENCES[0], "", "Rome was", SENTENCES[1]]
    moment, count = second_moment(model, tokenizer, texts, LAYER, 9)
    rome_was = token_count(tokenizer, "Rome was")
    assert rome_was < 9
    assert count == 9 + token_count(tokenizer, "") + rome_was + 9

    double = double_copy(model)
    module = down_projection(double, LAYER)
    weight = module.weight if module.weight.shape == (48, 80) else module.weight.T
    bias = 0.0 if module.bias is None else module.bias
    outputs = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:9]
        if ids:
            outputs.append(read_down_projection(double, ids)[1] - bias)
    values = torch.cat(outputs)
    torch.testing.assert_close(weight @ moment @ weight.T, values.T @ values / count, **SOLVED)
    assert torch.equal(moment, moment.T)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sentence_perplexity_is_the_mean_of_the_sentences_own(kind: str) -> None:
    model, tokenizer = toy_model(kind, dtype=torch.float64), tokenizer_for(kind)
    own = []
    for sentence in SENTENCES[:3]:
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        own.append(model(input_ids=ids, labels=ids).loss.exp().item())
    # transformers computes its loss in float32: a sum over the vocabulary for each token.
    allowed = rounding(torch.float32, VOCABULARY)
    assert sentence_perplexity(model, tokenizer, SENTENCES[:3]) == pytest.approx(sum(own) / 3, rel=allowed)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("context", ["", CONTEXTS[0]])
@pytest.mark.parametrize("subject", ["Chicago", "Besançon", "the 🏰"])
def test_rows_name_the_last_token_of_the_subject_and_all_of_the_target(bos: bool, context: str, subject: str) -> None:
    """The emoji has four bytes with one character span between them: its last token counts."""
    tokenizer = toy_tokenizer(bos)
    row = make_row(tokenizer, context, "{}, a twin city of", subject, "Istanbul")
    ids = tokenizer(context + subject + ", a twin city of Istanbul")["input_ids"]
    assert row.input_ids == ids[:-1]
    start = 1 if bos else 0
    assert tokenizer.decode(ids[start : row.subject_position + 1]) == context + subject
    assert tokenizer.decode(row.target_ids) == " Istanbul"
    assert row.target_ids == ids[-len(row.target_ids) :]
    assert row.target_logits_at == list(range(len(ids) - len(row.target_ids) - 1, len(ids) - 1))


def test_a_trailing_special_token_is_no_target(plain: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(plain)
    closing = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), closing])
    assert tokenizer("Rome")["input_ids"][-1] == EOS
    with_eos = make_row(tokenizer, "", PROMPT, SUBJECT, TARGET)
    without = make_row(plain, "", PROMPT, SUBJECT, TARGET)
    assert with_eos == without
    without_target = make_row(tokenizer, "", PROMPT, SUBJECT, None)
    assert without_target.input_ids == plain("The city of Chicago is a twin city of")["input_ids"]


def test_the_model_is_left_as_it_was(plain: PreTrainedTokenizerFast) -> None:
    """Weights, dtype, training mode and hooks; dropout stays off in the copy where the model has it on."""
    model = toy_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = edit(model, plain), edit(model, plain)
    assert torch.equal(first.delta_w, second.delta_w)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float32
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_delta_is_added_at_one_position_and_gone_afterwards(
    gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast
) -> None:
    model, ids = double_copy(gpt2), plain("The city of Chicago is")["input_ids"]
    # Not a constant vector: the LayerNorms would take it out again.
    delta = torch.arange(48, dtype=torch.float64)
    before = logits_of(model, ids)
    with delta_added(model, LAYER, 2, delta):
        during = logits_of(model, ids)
    assert torch.equal(during[:2], before[:2])
    assert (during[2:] - before[2:]).abs().max(dim=1).values.min() > 1e-3
    with pytest.raises(IndexError), delta_added(model, LAYER, 999, delta):
        logits_of(model, ids)
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Chicago is"}, "exactly one"),
        ({"prompt": "{} and {} are"}, "exactly one"),
        ({"subject": ""}, "subject"),
        ({"subject": "Chicago "}, "subject"),
        ({"target": " "}, "target"),
        ({"method": "memit"}, "method"),
        ({"method": "c-rome", "contexts": []}, "prefixed rows"),
        ({"steps": 0}, "steps"),
        ({"second_moment": torch.eye(48)}, "second_moment"),
    ],
)
def test_bad_input_is_refused(
    gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast, changes: dict[str, object], message: str
) -> None:
    arguments = {"prompt": PROMPT, "subject": SUBJECT, "target": TARGET, "layer": LAYER, "method": "rome"}
    arguments |= {"contexts": CONTEXTS, "steps": 1}
    with pytest.raises(ValueError, match=message):
        rome(gpt2, plain, **(arguments | changes))


def test_nothing_to_measure_is_refused(gpt2: PreTrainedModel, plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="texts"):
        second_moment(gpt2, plain, [""], LAYER, 8)
    with pytest.raises(ValueError, match="'a' has 1 tokens"):
        sentence_perplexity(gpt2, plain, [SENTENCES[0], "a"])
    with pytest.raises(ValueError, match="sentences"):
        sentence_perplexity(gpt2, plain, [])
    with pytest.raises(ValueError, match="results"):
        joint([], None)


def test_toy_tokenizers_differ_by_the_bos_alone() -> None:
    with_bos, without = toy_tokenizer(bos=True), toy_tokenizer(bos=False)
    assert len(with_bos) == VOCABULARY
    assert with_bos.get_vocab() == without.get_vocab()
    ids = without(SENTENCES[0])["input_ids"]
    assert with_bos(SENTENCES[0])["input_ids"] == [with_bos.bos_token_id, *ids]
    assert without.decode(ids) == SENTENCES[0]
    assert max(ids) < VOCABULARY


@pytest.mark.parametrize("kind", KINDS)
def test_toy_models_are_seeded_and_leave_the_global_generator_alone(kind: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = toy_model(kind, dtype=torch.bfloat16, tie=True)
    assert torch.equal(torch.rand(3), expected)
    assert first.dtype == torch.bfloat16
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    again = toy_model(kind, dtype=torch.bfloat16, tie=True)
    other = toy_model(kind, dtype=torch.bfloat16, tie=False, seed=1)
    ids = torch.tensor([[7, 300, 599]])
    assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)
    assert not torch.equal(first(input_ids=ids).logits, other(input_ids=ids).logits)
    assert other.get_output_embeddings().weight is not other.get_input_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_toy_is_read_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, tokenizer = toy_model(kind, tie=kind == "qwen2"), tokenizer_for(kind)
    directory = save_toy(tmp_path / kind, model, tokenizer, max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    loaded_tokenizer = AutoTokenizer.from_pretrained(directory)
    encoding = tokenizer(SENTENCES[0], return_offsets_mapping=True, return_tensors="pt")
    again = loaded_tokenizer(SENTENCES[0], return_offsets_mapping=True, return_tensors="pt")
    assert torch.equal(encoding["input_ids"], again["input_ids"])
    assert torch.equal(encoding["offset_mapping"], again["offset_mapping"])
    ids = encoding["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
