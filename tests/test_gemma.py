"""A second real model, Gemma-3-270M: BOS, scaled embeddings, windows in most layers, a norm behind each MLP. Slow."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma import gemma_dir
from rome_fast import Edit, apply_edits, collect_statistics, verify
from rome_fast.assets import demo_texts
from rome_fast.demo import held_out_sentences
from rome_fast.errors import CheckpointError
from rome_fast.evaluation import sentence_perplexity
from rome_fast.models.rows import edit_rows
from rome_fast.models.runner import Runner
from test_any_decoder import check_edit

pytestmark = pytest.mark.slow

LAYER = 3
CONTEXTS = ("It rained all day. ", "The first step is to plan. ")
# The first token of the text but for BOS.
FIRST_TOKEN = Edit("{} is a twin city of", "Chicago", "Istanbul")


@pytest.fixture(scope="module")
def folder():
    try:
        return gemma_dir()
    except CheckpointError as error:
        pytest.skip(f"Gemma-3-270M cannot be made here: {error}")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_it_writes_english(model, tokenizer):
    inputs = tokenizer("Albert Einstein was born in", return_tensors="pt")
    said = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])
    assert said.startswith("<bos>Albert Einstein was born in 1879 in Ulm, Germany")


def test_perplexity_is_that_of_its_own_loss(model, tokenizer):
    sentences = held_out_sentences(6)
    own = []
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        with torch.no_grad():
            own.append(float(model(ids, labels=ids).loss.exp()))
    # fp32: a relative error of a perplexity is an absolute one of a mean log-probability, 18 layers deep.
    assert sentence_perplexity(Runner(model), tokenizer, sentences) == pytest.approx(sum(own) / len(own), rel=1e-4)


def test_the_layer_is_run_again_with_the_value(model):
    found = verify(model)
    assert found.layer == LAYER
    assert found.shares_past
    assert not found.adds_unchanged


def test_an_edit_is_what_the_models_own_forward_says(model, tokenizer):
    """Value, loss and bytes; see there."""
    check_edit(model, tokenizer, LAYER)


def test_behind_bos_no_request_is_a_first_token_one(model, tokenizer):
    """What destroys a model without BOS is an edit like any other here, by either method."""
    assert edit_rows(tokenizer, FIRST_TOKEN, [""], target=False)[0].subject == 1
    statistics = collect_statistics(model, tokenizer, demo_texts()[:10], [LAYER], tokens=6144)
    sentences, runner = held_out_sentences(4), Runner(model)
    base = sentence_perplexity(runner, tokenizer, sentences)
    for method in ("rome", "c-rome"):
        result = apply_edits(
            model,
            FIRST_TOKEN,
            tokenizer=tokenizer,
            statistics=statistics,
            contexts=CONTEXTS * 2,
            method=method,
            layer=LAYER,
            guard="off",
            unconverged="write",
        )
        ratio = sentence_perplexity(runner, tokenizer, sentences) / base
        result.revert()
        assert ratio <= 1.5, method
        assert not result.records[0].collapsed
