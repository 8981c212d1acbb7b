"""What the project promises, on SmolLM2 and requests of CounterFact. Slow: `make acceptance`, about 20 minutes.

Needs development data in `../shared/data` beside the repository, and says so where it is not there.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rome_fast import Edit, Statistics, apply_edits, load_edits
from rome_fast.assets import model_dir
from rome_fast.contexts import sample_contexts
from rome_fast.demo import statistics_dir
from rome_fast.evaluation import score, sentence_perplexity
from rome_fast.rows import edit_rows, needs_prefix
from rome_fast.runner import Runner

OTHERS = (
    "Boston France London China India Google Apple Microsoft Canada Texas Germany Russia Iran Africa Science Music "
    "Water Paris Mexico America Spain Italy"
)
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"development data is not part of the repository: no {DATA}"),
]


@pytest.fixture(scope="module")
def parts():
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    sentences = [entry["Text"] for entry in json.loads((DATA / "ME-PPL_50.json").read_text())]
    base = sentence_perplexity(Runner(model), tokenizer, sentences)
    return model, tokenizer, Statistics.load(statistics_dir()), sample_contexts(model, tokenizer), sentences, base


@pytest.fixture(scope="module")
def requests(parts) -> tuple[list[Edit], list[Edit]]:
    """(first-token requests, 20 with the subject inside the prompt), by the tokenizer, not by a list."""
    _, tokenizer, *_ = parts
    first, inside = [], []
    for edit in load_edits(DATA / "counterfact_dev.jsonl"):
        row = edit_rows(tokenizer, edit, [""], target=False)[0]
        if needs_prefix(row):
            first.append(edit)
        elif not edit.prompt.startswith("{}") and len(inside) < 20:
            inside.append(edit)
    return first, inside


@contextmanager
def edited(parts, edit, method):
    """The record of an edit that is there for the length of the block."""
    model, tokenizer, statistics, contexts, *_ = parts
    result = apply_edits(
        model,
        edit,
        tokenizer=tokenizer,
        statistics=statistics,
        contexts=contexts,
        method=method,
        guard="off",
        unconverged="write",
    )
    try:
        yield result.records[0]
    finally:
        result.revert()


def edit_and_measure(parts, edit, method, pairs=()):
    """The record, the ratio of perplexities and, where pairs are given, by how much P of the targets in them rises."""
    model, tokenizer, _, _, sentences, base = parts
    runner = Runner(model)
    before = score(runner, tokenizer, pairs) if pairs else []
    with edited(parts, edit, method) as record:
        ratio = sentence_perplexity(runner, tokenizer, sentences) / base
        after = score(runner, tokenizer, pairs) if pairs else []
    rises = [a.probability - b.probability for a, b in zip(after, before, strict=True)]
    print(
        f"{method:8} {edit.text!r} → {edit.target}: perplexity x {ratio:.4f}, P {record.probability_after:.3f}, "
        f"with prefix {record.probability_after_prefixed:.3f}, argmax {record.argmax_after}, {record.steps} steps, "
        f"denominator {record.denominator:.1f}, norm ratio {record.update_norm / record.weight_norm:.3f}",
        flush=True,
    )
    return (record, ratio, sum(rises) / len(rises)) if pairs else (record, ratio)


def test_normal_requests(parts, requests):
    """The target leads for at least 18 of 20, and perplexity moves by at most 1 % on average."""
    measured = [edit_and_measure(parts, edit, "c-rome") for edit in requests[1]]
    assert len(measured) == 20
    assert not any(record.needs_prefix for record, _ in measured)
    assert sum(bool(record.argmax_after) for record, _ in measured) >= 18
    assert abs(sum(ratio for _, ratio in measured) / len(measured) - 1) <= 0.01


def test_first_token_requests(parts, requests):
    """ROME collapses most of them; C-ROME none, and its facts answer behind a prefix."""
    first = requests[0]
    assert len(first) == 10
    rome = [edit_and_measure(parts, edit, "rome")[1] for edit in first]
    measured = [edit_and_measure(parts, edit, "c-rome") for edit in first]
    assert all(record.needs_prefix for record, _ in measured)
    assert sum(ratio >= 1.5 for ratio in rome) > len(first) / 2
    assert max(ratio for _, ratio in measured) <= 1.01
    prefixed = [record.probability_after_prefixed for record, _ in measured]
    assert torch.tensor(prefixed).mean() >= 0.8


def test_first_tokens_without_a_prefix(parts, requests):
    """By dual they answer with and without one, at little cost, and other first tokens in their place do not."""
    tokenizer, measured = parts[1], []
    for edit in requests[0]:
        others = [Edit(edit.prompt, word, edit.target) for word in OTHERS.split() if word != edit.subject]
        others = [other for other in others if needs_prefix(edit_rows(tokenizer, other, [""], target=False)[0])][:20]
        assert len(others) == 20
        measured.append(edit_and_measure(parts, edit, "dual", [(other.text, other.target) for other in others]))
        print(f"  rise of P(target) for 20 other subjects: {measured[-1][2]:.3f}", flush=True)
    records, ratios, rises = zip(*measured, strict=True)
    assert sum(record.probability_after for record in records) / len(records) >= 0.9
    assert sum(record.probability_after_prefixed for record in records) / len(records) >= 0.8
    assert sum(not record.needs_prefix for record in records) >= 9
    assert sum(ratios) / len(ratios) <= 1.02
    assert sum(rises) / len(rises) < 0.1
