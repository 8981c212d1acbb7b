"""Prefix contexts: the same for the same seed, in any process, and usable as they are."""

import copy
import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import END, LAYER, SETTINGS, all_bits, bits, changed, edited
from rome_fast.errors import ModelError
from rome_fast.evaluation.scoring import greedy_completion
from rome_fast.models.rows import edit_rows
from rome_fast.models.runner import Runner
from rome_fast.search.contexts import sample_contexts
from toys import VOCABULARY, save_toy, toy_model

WEIGHT = f"model.layers.{LAYER}.mlp.down_proj.weight"


def digest_of_an_edit(directory):
    """Edit a saved toy with contexts of its own; SHA-256 of the edited weight.

    Loaded in every process, because the last bits of a product depend on where in memory its factors lie.
    """
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Not left to the process: the fixtures of a test run keep the search in fp32.
    settings = replace(SETTINGS, compute_dtype="float32")
    edited(model, tokenizer, END, contexts=None, seed=3, settings=settings)
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


def test_the_padding_of_a_tokenizer_has_no_part_in_them(toy_tokenizers):
    """Not where it has none, nor where its token or its end of text is one that the model has no row for."""
    model = toy_model("gpt2")
    wanted = sample_contexts(model, toy_tokenizers[False], count=10)
    for change in (
        {"pad_token": "[PAD]"},
        {"pad_token": None},
        {"pad_token": None, "eos_token": None},
        {"pad_token": None, "eos_token": "[END]"},
        {"pad_token": "[PAD]", "padding_side": "right"},
    ):
        tokenizer = copy.deepcopy(toy_tokenizers[False])
        added = {name: token for name, token in change.items() if token and name.endswith("token")}
        tokenizer.add_special_tokens(added)
        for name, value in change.items():
            setattr(tokenizer, name, value)
        assert not added or len(tokenizer) > len(model.get_input_embeddings().weight)
        assert sample_contexts(model, tokenizer, count=10) == wanted


@pytest.mark.parametrize("ends", [None, [2, 3], 10_000])
def test_the_ends_of_text_that_a_model_knows(ends, toy_tokenizers):
    """None, several, or one that it has no row for: samples are as long as they are to be in any case."""
    model = toy_model("gpt2")
    model.generation_config.eos_token_id = ends
    contexts = sample_contexts(model, toy_tokenizers[False])
    assert len(set(contexts)) == 20


def test_generate_says_nothing_of_padding(toy_tokenizers, caplog):
    tokenizer = copy.deepcopy(toy_tokenizers[False])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with caplog.at_level("WARNING"):
        sample_contexts(toy_model("gpt2"), tokenizer, count=10)
    assert "pad" not in caplog.text


def test_a_token_that_only_the_tokenizer_has_is_named(toy_tokenizers):
    """Its BOS was added to it alone, and every row begins with that."""
    tokenizer = copy.deepcopy(toy_tokenizers[False])
    tokenizer.add_special_tokens({"bos_token": "[BEGIN]"})
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[BEGIN] $A", special_tokens=[("[BEGIN]", number)]
    )
    message = rf"tokenizer: got token {number} \('\[BEGIN\]'\), wanted ids below the model's {number}; .*resize_token"
    with pytest.raises(ModelError, match=message):
        sample_contexts(toy_model("gpt2"), tokenizer)


def test_all_of_them_take_ten_passes(toy_tokenizers):
    """Of a streamed model each pass reads the weights. A toy writes half characters, which are sampled anew."""
    model, tokenizer, passes = toy_model("llama"), toy_tokenizers[True], []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    first = sample_contexts(model, tokenizer, count=2)
    assert len(passes) == 10
    assert sample_contexts(model, tokenizer)[:2] == first
    assert len(passes) % 10 == 0


def test_the_head_is_not_multiplied_by_a_slice(toy_tokenizers):
    """torch would copy the weight once for every row of a batch; whether it did shows in what it asks memory for."""
    model, tokenizer = toy_model("llama", dtype=torch.bfloat16), toy_tokenizers[True]
    for call in (
        lambda: sample_contexts(model, tokenizer),
        lambda: greedy_completion(Runner(model), tokenizer, ["The capital of France is", "Paris is in"] * 8, [2] * 16),
    ):
        inputs = []
        handle = model.lm_head.register_forward_hook(lambda _, args, __: inputs.append(args[0]))  # noqa: B023
        with Products() as products:
            call()
        handle.remove()
        assert inputs
        assert all(each.is_contiguous() for each in inputs)
        assert products.of_head == []


class Products(TorchDispatchMode):
    """Batched products with a matrix as wide as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.of_head = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default and args[1].shape[-1] == VOCABULARY:
            self.of_head.append(args[1].shape)
        return function(*args, **(kwargs or {}))


def test_a_product_dtype_that_is_faster_is_used_for_them(toy_tokenizers, monkeypatch):
    """As for everything else of an edit: a CPU without bfloat16 instructions multiplies it several times slower."""
    model, seen = toy_model("llama", dtype=torch.bfloat16), []
    real = torch.mm
    monkeypatch.setattr("rome_fast.search.contexts.usual_dtype", lambda device, dtype: torch.float32)
    monkeypatch.setattr(torch, "mm", lambda a, b, **rest: (seen.append(a.dtype), real(a, b, **rest))[1])
    assert len(sample_contexts(model, toy_tokenizers[True], count=2)) == 2
    # Ten passes through four layers of seven products and the head.
    assert seen == [torch.float32] * 10 * (4 * 7 + 1)


def test_a_model_that_cannot_fill_them_says_how_many_it_made(toy_tokenizers):
    """One that always writes the same letter has six lengths of five openings to offer."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    (letter,) = tokenizer("a")["input_ids"]
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(1e3 * model.lm_head.weight[letter])
    with pytest.raises(ModelError, match=r"contexts: got \d+ usable texts from the model, wanted 40; pass your own"):
        sample_contexts(model, tokenizer, count=40)


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
