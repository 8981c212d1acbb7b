"""No tensor is made on the CPU beside a model on a GPU; shown without a GPU.

In these tests a tensor that is made without a device of its own lands on "meta", as it would on the CPU with a model on
a GPU, and meets the model's tensors with an error. What is made on the host on purpose says so.
"""

import pytest
import torch

from helpers import CONTEXTS, END, LAYER, MIDDLE, START, all_bits, changed, delta_w
from rome_fast import ValueSettings, collect_statistics
from rome_fast.bench import edit_as_released
from rome_fast.bench.shapes import random_factor
from rome_fast.bench.throughput import Setup
from rome_fast.contexts import sample_contexts
from rome_fast.evaluation import evaluate, sentence_perplexity
from rome_fast.flow import tokenise
from rome_fast.methods import METHODS
from rome_fast.runner import Runner
from toys import D_FF, SENTENCES, toy_model

EDITS = (START, MIDDLE, END)


def make(model, tokenizer, method, factor):
    settings = ValueSettings(steps=6, margin=0, draft_rows=1)
    setup = Setup(model, tokenizer, CONTEXTS, LAYER, method, settings, factor, [])
    requests = [tokenise(Runner(model), tokenizer, edit, CONTEXTS, setup.flow.how) for edit in EDITS]
    return setup.flow.solve_each(requests), setup.flow.solve(requests)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_makes_its_tensors_where_the_model_is(kind, method, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[False]
    factor = random_factor(D_FF, torch.device("cpu")).float()
    wanted, (wanted_joint, _) = make(model, tokenizer, method, factor)
    with torch.device("meta"):
        found, (joint, _) = make(model, tokenizer, method, factor)
    for (one, _), (two, _) in zip(found, wanted, strict=True):
        assert torch.equal(delta_w(one), delta_w(two))
    assert torch.equal(delta_w(joint), delta_w(wanted_joint))


def test_the_baseline_makes_its_tensors_where_the_model_is(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    settings = ValueSettings(steps=3, stop="loss")

    def run():
        return edit_as_released(model, tokenizer, MIDDLE, CONTEXTS, layer=LAYER, settings=settings, factor=None)

    wanted = run()
    with torch.device("meta"):
        found = run()
    assert torch.equal(delta_w(found.delta), delta_w(wanted.delta))


def test_contexts_and_statistics_do_so_too(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]

    def run():
        statistics = collect_statistics(model, tokenizer, SENTENCES[:4], [LAYER], tokens=60)
        return sample_contexts(model, tokenizer, count=4), statistics.layers[LAYER].moment

    wanted, wanted_moment = run()
    with torch.device("meta"):
        found, moment = run()
    assert found == wanted
    assert torch.equal(moment, wanted_moment)


def test_applying_and_measuring_do_so_as_well(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    runner, before = Runner(model), all_bits(model)
    ((delta, _), *_), _ = make(model, tokenizer, "c-rome", None)
    delta.apply(model)
    wanted = evaluate(model, tokenizer, EDITS, CONTEXTS), sentence_perplexity(runner, tokenizer, SENTENCES[:3])
    delta.revert(model)
    with torch.device("meta"):
        delta.apply(model)
        found = evaluate(model, tokenizer, EDITS, CONTEXTS), sentence_perplexity(runner, tokenizer, SENTENCES[:3])
        delta.revert(model)
    assert found == wanted
    assert changed(model, before) == []
