"""Prefix contexts: the same for the same seed, in any process, and usable as they are."""

import copy
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import END, LAYER, all_bits, bits, changed, edited
from rome_fast.contexts import sample_contexts
from rome_fast.errors import ModelError
from rome_fast.rows import edit_rows
from toys import save_toy, toy_model

WEIGHT = f"model.layers.{LAYER}.mlp.down_proj.weight"


def digest_of_an_edit(directory):
    """Edit a saved toy with contexts of its own; SHA-256 of the edited weight.

    Loaded in every process, because the last bits of a product depend on where in memory its factors lie.
    """
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    edited(model, tokenizer, END, contexts=None, seed=3)
    return hashlib.sha256(bits(model.get_parameter(WEIGHT)).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_the_same_seed_gives_the_same_contexts(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    first = sample_contexts(model, tokenizer, seed=5)
    assert len(first) == len(set(first)) == 20
    # Whatever was drawn before.
    torch.rand(17)
    assert sample_contexts(toy_model(kind), tokenizer, count=10, seed=5) == first[:10]
    other = sample_contexts(model, tokenizer, count=10, seed=6)
    assert len(set(first) & set(other)) < 5


def test_contexts_do_not_depend_on_the_padding_side(toy_tokenizers):
    model, found = toy_model("llama"), []
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(toy_tokenizers[True])
        tokenizer.padding_side = side
        found.append(sample_contexts(model, tokenizer, count=10))
    assert found[0] == found[1]


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_contexts_are_ready_for_use(kind, bos, toy_tokenizers):
    """Text, a full stop and a blank, no special tokens, and no merging with what follows."""
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    contexts = sample_contexts(model, tokenizer)
    for context in contexts:
        assert context.endswith(". ")
        assert not context.endswith(".. ")
        assert context.strip(" .")
        assert "  " not in context
        assert "\ufffd" not in context
        assert not any(token in context for token in tokenizer.all_special_tokens)
    assert len(edit_rows(tokenizer, END, ["", *contexts])) == 21
    lengths = sorted(len(tokenizer(context)["input_ids"]) for context in contexts)
    assert lengths[0] < lengths[-1] - 3


def test_nothing_but_the_contexts_comes_of_it(toy_tokenizers):
    model = toy_model("llama").train()
    before, state = all_bits(model), torch.random.get_rng_state()
    sample_contexts(model, toy_tokenizers[True], count=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert changed(model, before) == []


def test_dropout_has_no_part_in_them(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    wanted = sample_contexts(model, tokenizer, count=4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert sample_contexts(model.train(), tokenizer, count=4) == wanted


def test_as_many_as_asked_for(toy_tokenizers):
    """Fewer are the first ones of more."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    found = {count: sample_contexts(model, tokenizer, count=count) for count in (1, 3, 12)}
    assert {count: len(contexts) for count, contexts in found.items()} == {1: 1, 3: 3, 12: 12}
    assert found[1] == found[12][:1]
    assert found[3] == found[12][:3]


def test_a_tokenizer_without_a_padding_token(toy_tokenizers):
    tokenizer = copy.deepcopy(toy_tokenizers[False])
    tokenizer.pad_token = None
    model = toy_model("gpt2")
    assert len(sample_contexts(model, tokenizer, count=5)) == 5


def test_a_model_that_cannot_fill_them_says_how_many_it_made(toy_tokenizers):
    """One that always writes the same letter has at most two lengths of five openings to offer."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    (letter,) = tokenizer("a")["input_ids"]
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(1e3 * model.lm_head.weight[letter])
    with pytest.raises(ModelError, match=r"contexts: got \d+ usable texts from the model, wanted 20; pass your own"):
        sample_contexts(model, tokenizer)


@pytest.mark.slow
def test_two_processes_edit_to_the_same_bytes(tmp_path, toy_tokenizers):
    """Nothing may depend on the order of a set, an address in memory or the random state of the process."""
    save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizers[True])
    environment = os.environ | {
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    script = "import sys, test_contexts; print('digest', test_contexts.digest_of_an_edit(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "toy"], env=environment, capture_output=True, text=True, check=True
    )
    torch.rand(17)
    assert f"digest {digest_of_an_edit(tmp_path / 'toy')}" in run.stdout


def test_generation_settings_of_the_model_have_no_part_in_contexts(toy_tokenizers):
    """A repetition penalty that a model ships used to bend what was sampled."""
    tokenizer = toy_tokenizers[False]
    plain = sample_contexts(toy_model("gpt2"), tokenizer, count=10)
    model = toy_model("gpt2")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.bad_words_ids = [[5], [6]]
    assert sample_contexts(model, tokenizer, count=10) == plain
