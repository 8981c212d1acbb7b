"""Layers like Llama's run together: the values and gradients of the layers as they are written, in fewer launches."""

from dataclasses import replace
from functools import wraps

import pytest
import torch
from torch import nn

from helpers import delta_w, edited, relative_error, rounding, rounding_of_edit
from rome_fast import Edit, verify
from rome_fast.models import fused
from rome_fast.models.past import ContextPast, Contexts, FrozenPast, Recorder, attention_mask
from rome_fast.models.rows import edit_rows
from rome_fast.models.runner import Runner, frozen_weights
from rome_fast.models.verification import all_fused_layers, fused_layers, verified
from rome_fast.search.keys import ContextRow, run_to_layer
from toys import D_FF, HIDDEN, LAYERS, toy_model
from zoo import zoo_model

KINDS = ("llama", "mistral", "qwen2", "qwen3")
WINDOW = 9  # of mistral: less than a row and what is before it
EDITS = [Edit("The city of {}", "Chicago", "Rome"), Edit("{} lies in", "The old port of Istanbul", "France and Turkey")]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def model_of(kind, dtype=F32):
    model = toy_model(kind, dtype=dtype)
    if kind == "mistral":
        model.config.sliding_window = WINDOW
    return model


@torch.no_grad()
def stretch(model, *, middle=4, rows=3, time=5):
    """A runner, and what its last layers are to be run with: hidden states, positions, mask and past."""
    runner = Runner(model)
    torch.manual_seed(0)
    ids = torch.randint(3, 500, (2, 7))
    recorder = Recorder()
    entering = runner.embed(ids)
    longest = torch.tensor([7, 4])
    mask = attention_mask(torch.zeros(2, 0, dtype=torch.bool), 7, runner.dtype)
    runner.run(entering, 0, LAYERS, past=recorder, mask=mask)
    contexts = Contexts(((0,) * 7, (0,) * 4), longest, recorder, 0, 0, entering)
    index = torch.arange(rows) % 2
    seen = longest[index] - torch.arange(rows) // 2
    own = torch.arange(rows) % (middle + 1)
    keys = {
        layer: torch.randn_like(k[index][:, :, :1].expand(-1, -1, middle, -1)) for layer, k in recorder.keys.items()
    }
    values = {layer: torch.randn_like(k) for layer, k in keys.items()} if middle else {}
    found = fused_layers(runner, verified(runner, 0))
    assert list(found) == list(range(LAYERS))
    past = FrozenPast(ContextPast(contexts, index), keys if middle else {}, values, seen, own, True, found)
    positions = (seen + own * bool(middle)).unsqueeze(1) + torch.arange(time)
    hidden = torch.randn(rows, time, runner.hidden_size).to(runner.dtype)
    return runner, hidden, {"positions": positions, "mask": attention_mask(past.seen, time, runner.dtype), "past": past}


def with_gradient(runner, hidden, given, first=1):
    with frozen_weights(runner.model):
        leaf = hidden.clone().requires_grad_()
        out = runner.run(leaf, first, LAYERS, **given)
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(out, leaf, torch.randn(out.shape).to(out.dtype))
    return out, gradient


def own_layers(given):
    return given | {"past": replace(given["past"], fused={})}


@pytest.mark.parametrize("middle", [0, 4])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_together_are_the_layers(kind, dtype, middle, monkeypatch):
    runner, hidden, given = stretch(model_of(kind, dtype), middle=middle)
    calls = []
    run = fused.run_fused
    monkeypatch.setattr("rome_fast.models.runner.run_fused", lambda *a: calls.append(len(a[1])) or run(*a))
    got = with_gradient(runner, hidden, given)
    assert calls == [LAYERS - 1]
    wanted = with_gradient(runner, hidden, own_layers(given))
    assert calls == [LAYERS - 1]
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other) <= (1e-5 if dtype == F32 else 1e-12)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits_they_are_as_near_to_float64_as_the_layers(kind, dtype):
    runner, hidden, given = stretch(model_of(kind, dtype))
    exact_model = model_of(kind, F64)
    exact_model.load_state_dict(runner.model.state_dict())
    exact_runner = Runner(exact_model)
    past = given["past"]
    recorded = Recorder()
    recorded.keys, recorded.values = (
        {layer: x.double() for layer, x in of.items()}
        for of in (past.shared.contexts.recorded.keys, past.shared.contexts.recorded.values)
    )
    wide_past = replace(
        past,
        shared=ContextPast(replace(past.shared.contexts, recorded=recorded), past.shared.index),
        keys={layer: x.double() for layer, x in past.keys.items()},
        values={layer: x.double() for layer, x in past.values.items()},
        fused={},
    )
    exact = with_gradient(exact_runner, hidden.double(), given | {"past": wide_past, "mask": given["mask"].double()})
    got, usual = (with_gradient(runner, hidden, each) for each in (given, own_layers(given)))
    for one, other, true in zip(got, usual, exact, strict=True):
        assert relative_error(one, true) <= 2 * relative_error(other, true)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_is_the_same(kind, toy_tokenizers, monkeypatch):
    def change(runs):
        monkeypatch.setattr(fused, "ENABLED", runs)
        return delta_w(edited(toy_model(kind), toy_tokenizers[False], EDITS))

    assert verify(toy_model(kind), 1).runs_fused
    together, apart = change(True), change(False)
    assert relative_error(together, apart) <= rounding_of_edit(F32)


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_and_keys_are_found_in_layers_run_together(kind, toy_tokenizers, monkeypatch):
    """Whatever is known of rows before the search, whose layers are all run so but the one that is looked into."""
    model, tokenizer = toy_model(kind, dtype=F64), toy_tokenizers[True]
    runner, calls, run = Runner(model), [], fused.run_fused
    monkeypatch.setattr("rome_fast.models.runner.run_fused", lambda *a: calls.append(len(a[1])) or run(*a))

    def states(enabled):
        monkeypatch.setattr(fused, "ENABLED", enabled)
        texts = ["", "In a long letter, ", "Because of that, "]
        known = all_fused_layers(runner, verified(runner, 1))
        contexts = Contexts.of(runner, tokenizer, texts, [1], fused=known)
        rows = [
            ContextRow(row, number) for edit in EDITS for number, row in enumerate(edit_rows(tokenizer, edit, texts))
        ]
        found = run_to_layer(runner, contexts, rows, [1])
        past, recorded = found.past, contexts.recorded
        kept = [found.keys, found.values, found.suffix, contexts.entering]
        for of in (past.keys, past.values, recorded.keys, recorded.values):
            kept += [of[layer] for layer in sorted(of)]
        return kept

    states(True)  # which looks at the model first
    calls.clear()
    got = states(True)
    # Contexts through layer 0, then 1, then the rest; rows through 0, then, watched, 1 as it is, then the rest.
    assert calls == [1, 1, LAYERS - 2, 1, LAYERS - 2]
    wanted = states(False)
    assert len(got) == len(wanted) == 4 + 2 * (LAYERS - 2) + 2 * LAYERS
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) <= 1e-12


def test_products_may_be_taken_in_another_dtype():
    """As by the layers: converted for every product, or once."""
    runner, hidden, given = stretch(toy_model("qwen2"))
    wanted = with_gradient(runner.computing_in(BF16), hidden, own_layers(given))
    plain = with_gradient(runner, hidden, given)
    for keep in (False, True):
        got = with_gradient(runner.computing_in(BF16, keep=keep), hidden, given)
        for one, other, exact in zip(got, wanted, plain, strict=True):
            assert relative_error(one, exact) > 1e-4  # it is another dtype
            # Each of 3 layers' 7 products rounds its factors; where another sum in fp32 moves one to its neighbour.
            assert relative_error(one, other) <= rounding(BF16, 21)


# A multiplier, 1 + weight, a norm of another formula, a mean taken off, pairs side by side, heads side by side in one
# norm, an MLP without a gate, layers without rotation, parts in parallel.
UNLIKE = ("granite", "gemma", "starcoder2", "olmo", "glm", "olmo2", "nemotron", "smollm3", "cohere")


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_model_of_other_layers_is_run_as_it_is(kind, toy_tokenizers, monkeypatch):
    model = zoo_model(kind)
    assert not verify(model, 1).runs_fused
    monkeypatch.setattr("rome_fast.models.runner.run_fused", None)  # to be called is an error
    edited(model, toy_tokenizers[False], EDITS[:1])


def scaled_output(model):
    """As Granite does, in a layer whose parts are those of Llama."""
    usual = type(model.model.layers[3]).forward

    class Scaled(type(model.model.layers[3])):
        @wraps(usual)
        def forward(self, hidden_states, **others):
            return hidden_states + 0.5 * (usual(self, hidden_states, **others) - hidden_states)

    model.model.layers[3].__class__ = Scaled


def other_norm(model):
    class Shifted(type(model.model.norm)):
        def forward(self, x):
            return super().forward(x) + 0.1 * self.weight

    model.model.layers[3].post_attention_layernorm.__class__ = Shifted


def no_gradient_of_the_mlp(model):
    class Cut(type(model.model.layers[3].mlp)):
        def forward(self, x):
            return super().forward(x).detach()

    for layer in model.model.layers:
        layer.mlp.__class__ = Cut


def scale_of_late_positions(model):
    """Which no short row has: queries grow with the logarithm of their position, as in Ministral 3."""

    usual = type(model.model.layers[3]).forward

    class Late(type(model.model.layers[3])):
        @wraps(usual)
        def forward(self, hidden_states, position_ids, **others):
            late = 1 + (position_ids > 100).to(hidden_states).unsqueeze(-1)
            return usual(self, hidden_states * late, position_ids=position_ids, **others)

    for layer in model.model.layers:
        layer.__class__ = Late


def hook(model):
    model.model.layers[3].mlp.gate_proj.register_forward_hook(lambda _module, _x, y: 2 * y)


def own_forward(model):
    module = model.model.layers[3].self_attn.o_proj
    module.forward = lambda x: nn.functional.linear(2 * x, module.weight)


def clipped_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU6()


BREAKS = (scaled_output, other_norm, no_gradient_of_the_mlp, scale_of_late_positions, hook, own_forward)
BREAKS += (clipped_activation,)


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_layer_that_does_something_else_is_found_out(change, dtype):
    model = toy_model("llama", dtype=dtype)
    change(model)
    found = verify(model, 1)
    assert found.attends_apart
    assert not found.runs_fused


def test_a_part_of_a_head_may_be_rotated():
    runner, hidden, given = stretch(zoo_model("glm4_moe", first_k_dense_replace=4))
    got, wanted = (with_gradient(runner, hidden, each) for each in (given, own_layers(given)))
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_what_has_changed_since_is_seen():
    """A hook, an adapter, a weight that is trained: the layers run themselves then."""
    runner, _, given = stretch(toy_model("llama"))
    layers = runner.layers

    def together():
        return fused.layers_like_llama(given["past"].fused, list(layers[1:]), 1, F32) is not None

    with frozen_weights(runner.model):
        assert together()
        handle = layers[2].mlp.register_forward_pre_hook(lambda *_: None)
        assert not together()
        handle.remove()
        assert together()
        layers[3].self_attn.v_proj.weight.requires_grad_(True)
        assert not together()
        layers[3].self_attn.v_proj.weight.requires_grad_(False)
        assert fused.layers_like_llama(given["past"].fused, list(layers[1:]), 1, F64) is None
        layers[1].mlp.up_proj = nn.Sequential(layers[1].mlp.up_proj)
        assert not together()
    assert not together()


def test_nothing_is_kept_where_no_gradient_is_wanted_and_none_is_taken_twice():
    runner, hidden, given = stretch(toy_model("llama"))
    with frozen_weights(runner.model):
        out = runner.run(hidden, 1, LAYERS, **given)
        assert not out.requires_grad
        leaf = hidden.clone().requires_grad_()
        out = runner.run(leaf, 1, LAYERS, **given)
        kept = sum(x.numel() for x in out.grad_fn.saved_tensors if x is not None)
        with pytest.raises(RuntimeError, match="layers run together have no second derivative"):
            torch.autograd.grad(out.sum(), leaf, create_graph=True)
    # Two hidden states, query and what is attended, key and value of half as many heads, gate and up.
    rows, time = hidden.shape[:2]
    assert kept == (LAYERS - 1) * rows * time * (2 * HIDDEN + 2 * HIDDEN + 2 * (HIDDEN // 2) + 2 * D_FF)
