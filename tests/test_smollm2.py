"""The real model: SmolLM2-135M, from the demo's cache, against the oracle; and the collapse with its cure."""

import functools
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oracle
from helpers import all_bits, changed, delta_w, relative_error
from rome_fast import Edit, ValueSettings, apply_edits, collect_statistics
from rome_fast.assets import demo_texts, model_dir
from rome_fast.bench import edit_as_released
from rome_fast.demo import held_out_sentences
from rome_fast.evaluation import sentence_perplexity
from rome_fast.models.runner import Runner
from rome_fast.statistics import LayerStatistics, Statistics

CPU = torch.device("cpu")
LAYER = 9
FIRST_TOKEN = Edit("{} is a twin city of", "Chicago", "Istanbul")
CONTEXTS = ("It rained all day. ", "The first step is to plan. ")


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Gigabytes that are held in cycles go before other tests fork a process of that size."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def statistics(model, tokenizer):
    """Of few tokens, to be quick: 2 per dimension."""
    return collect_statistics(model, tokenizer, demo_texts()[:20], [LAYER], tokens=3072)


@pytest.fixture(scope="module")
def truth(model, tokenizer, statistics):
    """A function: what the oracle says of two steps of a method."""
    moment = statistics.layers[LAYER].moment.double()

    @functools.cache
    def of(method):
        return oracle.rome(
            model,
            tokenizer,
            FIRST_TOKEN.prompt,
            FIRST_TOKEN.subject,
            FIRST_TOKEN.target,
            layer=LAYER,
            method=method,
            contexts=CONTEXTS,
            second_moment=moment,
            steps=2,
        )

    return of


# The oracle takes ten seconds for a method of this model: `make acceptance` asks it of all four.
SELDOM = [pytest.param(method, marks=pytest.mark.slow) for method in ("rome", "c-rome-released", "p-rome")]


@pytest.mark.parametrize("method", ["c-rome", *SELDOM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_equals_the_oracle(model, tokenizer, statistics, truth, method, dtype):
    """ΔW; an fp64 model, its statistics and δ are fp64 throughout. In fp32 it errs twice as much as the plain loop."""
    wanted, entry = truth(method), statistics.layers[LAYER]
    settings = ValueSettings(steps=2, stop="loss")
    if dtype == torch.float32:
        conditions = {"layer": LAYER, "settings": settings, "factor": entry.factor(CPU), "method": method}
        plain = edit_as_released(model, tokenizer, FIRST_TOKEN, CONTEXTS, **conditions)
        allowed = 2 * relative_error(delta_w(plain.delta), wanted.delta_w)
    else:
        # u κ of the solves with C on either side.
        allowed = 2 * 2**-53 * entry.condition(CPU)
    statistics = Statistics([LayerStatistics(LAYER, entry.moment.to(dtype), entry.tokens, entry.fingerprint)])
    result = apply_edits(
        oracle.double_copy(model) if dtype == torch.float64 else model,
        FIRST_TOKEN,
        tokenizer=tokenizer,
        statistics=statistics,
        contexts=CONTEXTS,
        method=method,
        layer=LAYER,
        settings=settings,
        guard="off",
        unconverged="write",
        measure=False,
    )
    result.revert()
    assert relative_error(delta_w(result), wanted.delta_w) <= allowed
    assert result.records[0].denominator == pytest.approx(wanted.denominator, rel=allowed)


def test_rome_collapses_the_model_and_c_rome_does_not(model, tokenizer, statistics):
    """The paper's finding and its cure, on a first-token subject; and every byte is back afterwards."""
    sentences, runner, before = held_out_sentences(6), Runner(model), all_bits(model)
    base = sentence_perplexity(runner, tokenizer, sentences)
    records, ratios = {}, {}
    for method in ("rome", "c-rome"):
        result = apply_edits(
            model,
            FIRST_TOKEN,
            tokenizer=tokenizer,
            statistics=statistics,
            contexts=CONTEXTS,
            method=method,
            layer=LAYER,
            guard="off",
            unconverged="write",
        )
        records[method] = result.records[0]
        ratios[method] = sentence_perplexity(runner, tokenizer, sentences) / base
        result.revert()
    assert ratios["rome"] >= 1.5
    assert records["rome"].collapsed
    assert ratios["c-rome"] <= 1.02
    assert not records["c-rome"].collapsed
    assert records["c-rome"].needs_prefix
    assert records["c-rome"].probability_after_prefixed >= 0.5
    assert changed(model, before) == []
