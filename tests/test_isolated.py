"""Evaluation of many single edits in one pass against applying, measuring and reverting them one at a time."""

from dataclasses import fields

import pytest
import torch

import zoo
from helpers import (
    CONTEXTS,
    END,
    LAYER,
    MIDDLE,
    START,
    all_bits,
    changed,
    edited,
    relative_error,
    rounding,
    rounding_of_log_p,
)
from rome_fast import Edit
from rome_fast.bench.flops import FlopCounter
from rome_fast.edits import Probe
from rome_fast.errors import ArgumentError
from rome_fast.evaluation import RowUpdates, distractors, edited_perplexities, evaluate, score, sentence_perplexity
from rome_fast.evaluation import isolated as module
from rome_fast.models.runner import Runner
from rome_fast.models.verification import verified
from rome_fast.updates.delta import Delta, LowRank
from toys import D_FF, KINDS, SENTENCES, toy_model

# The updates of this file move what they are added to by half of the weight.
ALLOWED, ALLOWED_64 = (1.5 * rounding_of_log_p(dtype) for dtype in (torch.float32, torch.float64))

# The lowest and the topmost of four layers, and one in between.
SEVERAL = (0, 1, 3)
# Each update moves what the next one sees, by half of its weight; sums of the zoo are 4/3 as long as those of the toys.
ALLOWED_SEVERAL_64 = 1.5**3 * 4 / 3 * rounding_of_log_p(torch.float64)

REQUESTS = [
    Edit(
        e.prompt,
        e.subject,
        e.target,
        "Vienna",
        ("They say that Chicago is near",),
        ("The capital of France is",),
        portability=(Probe("From Rome one flies to", ("Paris", "Rome"), "reversal"),),
        essence_prompts=(f"{e.subject} has", "The old town of {}"),
        negation_prompts=(f"{e.subject} is not",),
    )
    for e in (START, MIDDLE, END)
]


def a_model(kind, dtype=torch.float64):
    return toy_model(kind, dtype=dtype) if kind in KINDS else zoo.zoo_model(kind, dtype=dtype)


def random_deltas(model, count, ranks=(1,), seed=0, layers=(LAYER,)):
    """Updates half as large as the weight, so that what they do is far above rounding."""
    runner, generator = Runner(model), torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        updates = {}
        for number, layer in enumerate(layers):
            weight, rank = runner.weight(layer), ranks[(i + number) % len(ranks)]
            wide = torch.promote_types(weight.dtype, torch.float32)
            left = torch.randn(weight.shape[0], rank, generator=generator, dtype=wide)
            right = torch.randn(rank, weight.shape[1], generator=generator, dtype=wide)
            left *= 0.5 * weight.norm() / (left @ right).norm()
            updates[runner.weight_name(layer)] = LowRank(left, right)
        out.append(Delta(updates))
    return out


def one_by_one(model, deltas, measure):
    out = []
    for i, delta in enumerate(deltas):
        delta.apply(model)
        try:
            out.append(measure(i))
        finally:
            delta.revert(model)
    return out


def assert_metrics_are_those_of_the_loop(model, tokenizer, deltas, allowed):
    """Every figure of every request; returns the metrics."""
    before, prefixes = all_bits(model), {"contexts": CONTEXTS, "unseen_contexts": ("Far away from here, ",)}
    distracting = distractors(REQUESTS)
    together = evaluate(model, tokenizer, REQUESTS, **prefixes, distracting=distracting, deltas=deltas)
    assert not changed(model, before)

    def measured(i):
        own = {"distracting": [distracting[i]], "unedited": deltas[i]}
        return evaluate(model, tokenizer, [REQUESTS[i]], **prefixes, **own)[0]

    alone = one_by_one(model, deltas, measured)
    for mine, theirs in zip(together, alone, strict=True):
        for field in fields(mine):
            got, wanted = getattr(mine, field.name), getattr(theirs, field.name)
            assert wanted is not None, field.name
            # A divergence is a mean of differences of log-probabilities.
            bound = {"abs": 2 * allowed} if field.name == "essence_kl" else {"rel": allowed}
            assert got == (pytest.approx(wanted, **bound) if isinstance(wanted, float) else wanted), field.name
        assert len({mine.probability, mine.probability_prefixed, mine.probability_unseen}) == 3
    return together


@pytest.mark.parametrize(
    ("kind", "layers"), [(kind, (LAYER,)) for kind in KINDS] + [("llama", SEVERAL), ("gemma2", SEVERAL)]
)
def test_metrics_equal_the_loop(kind, layers, toy_tokenizers):
    """The last kind runs its first edit layer again: what is added there is normalised before it arrives."""
    model, tokenizer = a_model(kind), toy_tokenizers[False]
    allowed = ALLOWED_64 if len(layers) == 1 else ALLOWED_SEVERAL_64
    deltas = random_deltas(model, 3, ranks=(1, 2), layers=layers)
    together = assert_metrics_are_those_of_the_loop(model, tokenizer, deltas, allowed)
    for mine, untouched in zip(together, evaluate(model, tokenizer, REQUESTS), strict=True):
        assert mine.probability != pytest.approx(untouched.probability, rel=0.01)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_edits_spread_over_layers_equal_the_loop(kind, toy_tokenizers):
    """By `dual`, the first of them with a value of its own for the first token. Rows of the last kind are whole."""
    model, tokenizer = a_model(kind), toy_tokenizers[False]
    runner, deltas, layers = Runner(model), [], (0, 1, 2)
    for request in REQUESTS:
        result = edited(model, tokenizer, request, method="dual", layer=None, layers=layers)
        deltas.append(result.delta)
        result.revert()
    assert RowUpdates.of(runner, deltas).layers == list(layers)
    # These updates are smaller than the random ones.
    assert_metrics_are_those_of_the_loop(model, tokenizer, deltas, ALLOWED_SEVERAL_64)
    together = edited_perplexities(runner, tokenizer, SENTENCES[:2], RowUpdates.of(runner, deltas))
    alone = one_by_one(model, deltas, lambda _: sentence_perplexity(runner, tokenizer, SENTENCES[:2]))
    assert together == pytest.approx(alone, rel=ALLOWED_SEVERAL_64)
    untouched = sentence_perplexity(runner, tokenizer, SENTENCES[:2])
    assert all(abs(p / untouched - 1) > 1e4 * ALLOWED_SEVERAL_64 for p in together)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, ALLOWED_64), (torch.float32, ALLOWED)])
def test_perplexities_equal_the_loop(dtype, allowed, toy_tokenizers, monkeypatch):
    """Also where the rows of a batch do not fit together."""
    model, tokenizer = toy_model("llama", dtype=dtype), toy_tokenizers[False]
    runner, deltas = Runner(model), random_deltas(model, 5)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 100)
    together = edited_perplexities(runner, tokenizer, SENTENCES[:4], RowUpdates.of(runner, deltas))
    alone = one_by_one(model, deltas, lambda _: sentence_perplexity(runner, tokenizer, SENTENCES[:4]))
    assert together == pytest.approx(alone, rel=allowed)
    assert len({round(p, 3) for p in together}) == len(deltas)


def test_half_precision_differs_by_the_rounding_of_the_weight(toy_tokenizers):
    """An applied update is rounded to bf16 with the weight, an isolated one is not.

    Sums are made in fp32: some ten roundings per layer are left, in the three that follow; a log-probability is off by
    twice as much (see `rounding_of_log_p`), the mean over a hundred tokens by less.
    """
    model, tokenizer = toy_model("llama", dtype=torch.bfloat16), toy_tokenizers[False]
    runner, deltas = Runner(model), random_deltas(model, 4)
    together = edited_perplexities(runner, tokenizer, SENTENCES[:4], RowUpdates.of(runner, deltas))
    alone = one_by_one(model, deltas, lambda _: sentence_perplexity(runner, tokenizer, SENTENCES[:4]))
    assert together == pytest.approx(alone, rel=2 * rounding(torch.bfloat16, 3 * 10) / 100**0.5)


def test_sixty_four_edits_in_one_forward(toy_tokenizers):
    """One text under 64 edits: one pass through the layers below, one through those above."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[False]
    runner, deltas = Runner(model), random_deltas(model, 64)
    verified(runner, LAYER)
    passes: list[int] = []
    handles = [
        runner.layers[i].register_forward_hook(lambda _m, _a, out: passes.append(len(out))) for i in (0, LAYER + 1)
    ]
    pairs = [("The city of Chicago", " Rome")] * 65
    found = score(runner, tokenizer, pairs, RowUpdates.of(runner, deltas), [*range(64), -1])
    for handle in handles:
        handle.remove()
    assert passes == [1, 65]
    alone = one_by_one(model, deltas, lambda _: score(runner, tokenizer, pairs[:1])[0])
    alone.append(score(runner, tokenizer, pairs[:1])[0])
    assert [s.log_probability for s in found] == pytest.approx([s.log_probability for s in alone], rel=ALLOWED_64)
    assert len({round(s.log_probability, 6) for s in found}) == 65


def test_layers_below_are_run_once(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    runner, deltas = Runner(model), random_deltas(model, 8)
    verified(runner, LAYER)
    with FlopCounter() as together:
        edited_perplexities(runner, tokenizer, SENTENCES[:4], RowUpdates.of(runner, deltas))
    with FlopCounter() as alone:
        one_by_one(model, deltas, lambda _: sentence_perplexity(runner, tokenizer, SENTENCES[:4]))
    # Two of four layers are below the edit's end; the rest, with the head, is the same for both.
    assert alone.total / together.total >= 1.5


def test_updates_are_exact():
    """Of every layer, in each row those of its edit, whatever their ranks."""
    runner, layers = Runner(toy_model("llama")), (0, LAYER, 3)
    deltas = random_deltas(runner.model, 3, ranks=(1, 3), layers=layers)
    updates, generator = RowUpdates.of(runner, deltas), torch.Generator().manual_seed(1)
    assert (updates.count, updates.layers) == (3, list(layers))
    for layer in layers:
        weight = runner.weight(layer)
        keys = torch.randn(4, 5, weight.shape[1], generator=generator)
        values = torch.zeros(4, 5, weight.shape[0])
        updates.add_(layer, values, keys, torch.tensor([2, -1, 0, 1]))
        assert bool((values[1] == 0).all())
        for row, edit in ((0, 2), (2, 0), (3, 1)):
            update = deltas[edit].updates[runner.weight_name(layer)].dense().double()
            assert relative_error(values[row], keys[row].double() @ update.T) <= rounding(torch.float32, D_FF)


def test_bad_deltas(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    runner, (delta,) = Runner(model), random_deltas(model, 1)
    (update,) = delta.updates.values()
    elsewhere = Delta({runner.weight_name(LAYER + 1): update})
    both = Delta(delta.updates | elsewhere.updates)
    narrow = Delta({runner.weight_name(LAYER): LowRank(update.left, update.right[:, 1:].contiguous())})
    with pytest.raises(ArgumentError, match="got 1 for 3 edits"):
        evaluate(model, tokenizer, REQUESTS, deltas=[delta])
    with pytest.raises(ArgumentError, match=r"deltas: got NoneType, wanted result\.delta"):
        evaluate(model, tokenizer, REQUESTS, deltas=[delta, None, delta])
    for wrong, message in (
        ([delta, elsewhere], "those of the same layers in each"),
        ([delta, both], "those of the same layers in each"),
        ([delta, Delta({})], "those of the same layers in each"),
        ([Delta({})], "updates of nothing"),
        ([Delta({"lm_head.weight": update})], "those of the same layers in each"),
        ([delta, narrow], "has shape"),
    ):
        with pytest.raises(ArgumentError, match=message):
            RowUpdates.of(runner, wrong)
