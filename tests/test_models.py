"""Every architecture, run layer by layer, against transformers' own forward; which layers and settings it gets."""

from inspect import signature

import pytest
import torch
from transformers import AutoConfig

from helpers import CONTEXTS, FORWARD, relative_error, rounding
from rome_fast import ValueSettings
from rome_fast.errors import ArgumentError
from rome_fast.models.past import ContextPast, Contexts, attention_mask
from rome_fast.models.runner import Runner, causal_mask
from rome_fast.opening.defaults import Default, Selection, default_layer, default_settings, known, select
from taped import Tape
from toys import KINDS, LAYERS, SENTENCES, toy_model
from zoo import zoo_model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_and_head_are_those_of_the_models_own_forward(kind, toy_tokenizers):
    """Rows of several lengths in one batch, against forwards of one row at a time."""
    model, runner = toy_model(kind), Runner(toy_model(kind))
    rows = [toy_tokenizers[False](sentence)["input_ids"] for sentence in SENTENCES[:3]]
    packed = runner.pack(rows)
    states = [runner.embed(packed.ids)]
    for layer in range(LAYERS):
        states.append(runner.run(states[-1], layer, layer + 1))
    logits = runner.head(states[-1])
    for index, row in enumerate(rows):
        wanted = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
        # The last of transformers' hidden states is behind the final norm.
        for mine, theirs in zip(states[:LAYERS], wanted.hidden_states[:LAYERS], strict=True):
            assert relative_error(mine[index, : len(row)], theirs[0]) < rounding(torch.float32, FORWARD)
        assert relative_error(logits[index, : len(row)], wanted.logits[0]) < rounding(torch.float32, FORWARD)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_head_asks_no_tensor(kind):
    """On a GPU the host would wait; transformers asks whether there is anything to mask, unless it is given a mask."""
    runner = Runner(toy_model(kind))
    hidden = runner.run(runner.embed(torch.arange(3, 17).view(2, 7)), 0, LAYERS)[:, -1]
    plain = runner.head(hidden)
    with Tape():
        again = runner.head(hidden)
    assert torch.equal(again, plain)


@torch.no_grad()
def test_a_model_that_takes_no_whole_mask_has_its_head_without():
    model = zoo_model("bloom")
    runner, ids = Runner(model), torch.arange(3, 17).view(2, 7)
    logits = runner.head(runner.run(runner.embed(ids), 0, len(runner.layers)))
    assert relative_error(logits, model(input_ids=ids).logits) < rounding(torch.float32, FORWARD)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_follows_a_recorded_past_is_what_follows_in_one_go(kind, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[False]
    runner = Runner(model)
    contexts = Contexts.of(runner, tokenizer, CONTEXTS, [1])
    behind = tokenizer(" Rome was not built in a day")["input_ids"]
    count, longest = len(CONTEXTS), int(contexts.lengths.max())
    seen = torch.arange(longest) < contexts.lengths.unsqueeze(1)
    ids = torch.tensor([behind] * count)
    positions = contexts.lengths.unsqueeze(1) + torch.arange(len(behind))
    hidden = runner.run(
        runner.embed(ids, positions),
        0,
        LAYERS,
        positions=positions,
        mask=attention_mask(seen, len(behind), runner.dtype),
        past=ContextPast(contexts, torch.arange(count)),
    )
    for index, before in enumerate(contexts.ids):
        wanted = model(input_ids=torch.tensor([[*before, *behind]]), use_cache=False).logits[0, len(before) :]
        assert relative_error(runner.head(hidden[index]), wanted) < rounding(torch.float32, FORWARD)


def by_hand(model, ids, positions, mask, past):
    """What enters the first layer, leaves the last one, and the logits, with every call of a layer written out."""
    kind, base = model.config.model_type, model.base_model
    if kind in ("gpt2", "gptj"):
        embedded, layers, norm = base.wte(ids), base.h, base.ln_f
        arguments = {"past": "layer_past", "position_ids": positions}
        if kind == "gpt2":
            embedded = embedded + base.wpe(positions)
            arguments = {"past": "past_key_values"}
    else:
        embedded, layers, norm = base.embed_tokens(ids), base.layers, base.norm
        arguments = {"past": "past_key_values", "position_ids": positions}
    if hasattr(base, "rotary_emb"):
        arguments["position_embeddings"] = base.rotary_emb(embedded, position_ids=positions)
    if mask is None and model.config._attn_implementation == "eager":
        # Unlike the fused ones, it does not apply causality by itself.
        mask = causal_mask(*ids.shape, embedded.dtype, embedded.device)
    known = signature(layers[0].forward).parameters
    arguments["cache" if "cache" in known else arguments["past"]] = past
    del arguments["past"]
    hidden = embedded
    for layer in layers:
        hidden = layer(hidden, attention_mask=mask, use_cache=past is not None, **arguments)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return embedded, hidden, model.lm_head(norm(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_asking_the_model_gives_the_bits_of_calls_written_by_hand(kind, dtype, toy_tokenizers):
    """With and without a past; the same kernels in the same order."""
    model = toy_model(kind, dtype=dtype)
    runner = Runner(model).computing_in(dtype)
    ids = torch.arange(3, 25).reshape(2, 11)
    contexts = Contexts.of(runner, toy_tokenizers[False], CONTEXTS, [1])
    longest = int(contexts.lengths.max())
    seen = torch.arange(longest) < contexts.lengths.unsqueeze(1)
    behind = contexts.lengths.unsqueeze(1) + torch.arange(11)
    past = ContextPast(contexts, torch.arange(2))
    first = torch.arange(11).unsqueeze(0)
    for positions, mask, before in [(None, None, None), (behind, attention_mask(seen, 11, dtype), past)]:
        embedded = runner.embed(ids, positions)
        hidden = runner.run(embedded, 0, LAYERS, positions=positions, mask=mask, past=before)
        wanted = by_hand(model, ids, first if positions is None else positions, mask, before)
        for mine, theirs in zip((embedded, hidden, runner.head(hidden)), wanted, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("kind", "layers", "width", "layer", "steps"),
    [
        ("gpt2", 48, 1600, 17, 20),
        ("gptj", 28, 4096, 5, 20),
        ("gpt_neox", 44, 6144, 15, 20),
        ("llama", 32, 4096, 5, 25),
        ("llama", 40, 5120, 3, 25),
        ("llama", 28, 3072, 5, 25),
        ("mistral", 32, 4096, 5, 25),
        ("qwen2", 28, 3584, 5, 25),
        ("falcon", 32, 4544, 3, 25),
        ("gemma", 28, 3072, 3, 25),
        # Nobody published any for these.
        ("gpt2", 12, 768, 4, 20),
        ("gptj", 50, 4096, 9, 20),
        ("qwen3", 36, 4096, 6, 25),
    ],
)
def test_layers_and_settings_are_the_published_ones_or_like_them(kind, layers, width, layer, steps):
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, hidden_size=width)
    assert default_layer(config) == layer
    assert default_settings(config).steps == steps
    if kind == "gptj":
        wanted = ValueSettings(steps=20, learning_rate=0.5, clamp=4, weight_decay=0.5, kl_factor=0.0625)
        assert default_settings(config) == wanted


@pytest.mark.parametrize(
    ("kind", "layers", "width", "several"),
    [
        ("gpt2", 48, 1600, (13, 14, 15, 16, 17)),
        ("gptj", 28, 4096, (3, 4, 5, 6, 7, 8)),
        ("llama", 32, 4096, (4, 5, 6, 7, 8)),
        ("falcon", 32, 4544, (3, 4)),
        ("gpt2", 24, 1024, ()),
    ],
)
def test_several_layers_are_the_published_ones(kind, layers, width, several):
    published = known(AutoConfig.for_model(kind, num_hidden_layers=layers, hidden_size=width))
    assert published.layers == several
    assert not several or published.layer in several


def test_what_is_given_comes_before_what_was_tuned_and_that_before_what_is_published():
    config = AutoConfig.for_model("llama", num_hidden_layers=32, hidden_size=4096)
    given, tuned = ValueSettings(steps=3), Default(7, ValueSettings(steps=9))
    assert select(config) == Selection((5,), default_settings(config), "published")
    assert select(config, tuned=tuned) == Selection((7,), tuned.settings, "tune")
    assert select(config, settings=given, tuned=tuned) == Selection((7,), given, "tune")
    assert select(config, [7], tuned=tuned) == Selection((7,), tuned.settings, "given")
    in_part = ValueSettings(steps=9, clamp=1.0)
    assert select(config, settings={"clamp": 1.0}, tuned=tuned) == Selection((7,), in_part, "tune")
    with pytest.raises(ArgumentError, match=r"settings: got decay, wanted some of steps, learning_rate, weight_decay"):
        select(config, settings={"decay": 1.0})
    with pytest.raises(ArgumentError, match=r"settings: got list, wanted a rome_fast.ValueSettings, a mapping of some"):
        select(config, settings=[3])
    # Settings that were tuned belong to their layer.
    assert select(config, [6], tuned=tuned) == Selection((6,), default_settings(config), "given")
    unknown = AutoConfig.for_model("llama", num_hidden_layers=50, hidden_size=4096)
    assert select(unknown) == Selection((8,), default_settings(unknown), "depth rule")
    # Spread, published layers are MEMIT's; otherwise a third of the depth of the one layer is where they begin.
    assert select(config, spread=True) == Selection((4, 5, 6, 7, 8), default_settings(config), "published")
    assert select(config, tuned=tuned, spread=True) == Selection((2, 3, 4, 5, 6, 7), tuned.settings, "tune")
    assert select(unknown, spread=True).layers == (3, 4, 5, 6, 7, 8)
