"""Edits that would destroy the model: found before anything is written, and what is done about them."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch

import oracle
from helpers import (
    CONTEXTS,
    END,
    LAYER,
    MIDDLE,
    SETTINGS,
    all_bits,
    changed,
    delta_w,
    edited,
    relative_error,
    rounding,
    rounding_of_edit,
)
from rome_fast import Edit, Statistics
from rome_fast.closing.guard import UPDATE_RATIO_LIMIT, CollapseWarning, judge, largest_harmless, predicts_collapse
from rome_fast.closing.judging import SharedKeyWarning
from rome_fast.errors import ArgumentError, CollapseError
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.statistics import LayerStatistics
from toys import toy_model

KIND, BOS = "gpt2", False


@pytest.fixture
def tokenizer(toy_tokenizers):
    return toy_tokenizers[BOS]


@pytest.fixture
def collapsing(tokenizer):
    """Statistics under which the mean key and the unprefixed key of END are almost orthogonal.

    C⁻¹ = I + t w wᵀ with w = k̄/‖k̄‖ - k_u/‖k_u‖, and t such that k̄ᵀ C⁻¹ k_u is a thousandth of k̄ᵀ k_u. The denominator
    of ROME is that product; the consistent variants have k̄ᵀ C⁻¹ k̄.
    """
    model = toy_model(KIND)
    keys = oracle.rome(
        model, tokenizer, END.prompt, END.subject, END.target, layer=LAYER, method="rome", contexts=CONTEXTS, steps=1
    )
    mean, unprefixed = keys.k_mean / keys.k_mean.norm(), keys.k_unprefixed / keys.k_unprefixed.norm()
    w, cosine = mean - unprefixed, mean @ unprefixed
    t = (1 - 1e-3) * cosine / (1 - cosine) ** 2
    moment = torch.linalg.inv(torch.eye(len(w), dtype=w.dtype) + t * torch.outer(w, w)).float()
    return Statistics([LayerStatistics(LAYER, moment, 1000, Fingerprint.of(Runner(model), LAYER))])


def test_the_collapse_is_one(collapsing, tokenizer):
    """The update is many times as large as the weight; by a consistent variant it is a small part of it."""
    ratios = {}
    for method in ("rome", "c-rome", "p-rome"):
        result = edited(toy_model(KIND), tokenizer, END, statistics=collapsing, method=method)
        (record,) = result.records
        ratios[method] = float(delta_w(result).norm()) / record.weight_norm
        assert record.collapsed is (ratios[method] > UPDATE_RATIO_LIMIT)
    assert ratios["rome"] > 10
    assert ratios["c-rome"] < 1
    assert ratios["p-rome"] < 1


def test_raise(collapsing, tokenizer):
    model = toy_model(KIND)
    before = all_bits(model)
    with pytest.raises(
        CollapseError,
        match=r"(?s)1 edit\(s\) by method 'rome' would collapse .*'Paris' → 'Rome, the old capital': ‖Δ‖ = .*‖W‖ = .*"
        r"denominator .*nothing was written; use method='dual', the default",
    ):
        edited(model, tokenizer, [MIDDLE, END], statistics=collapsing, method="rome", guard="raise")
    assert changed(model, before) == []


def test_raise_in_the_middle_of_a_sequence_takes_the_earlier_edits_back(collapsing, tokenizer):
    model = toy_model(KIND)
    before = all_bits(model)
    with pytest.raises(CollapseError, match="'Paris'"):
        edited(
            model,
            tokenizer,
            [MIDDLE, END],
            statistics=collapsing,
            method="rome",
            guard="raise",
            schedule="sequential",
        )
    assert changed(model, before) == []


def test_raise_lets_a_consistent_variant_pass(collapsing, tokenizer):
    result = edited(toy_model(KIND), tokenizer, END, statistics=collapsing, method="c-rome", guard="raise")
    assert (result.records[0].applied, result.records[0].collapsed) == (True, False)


def test_warn_applies_it_all_the_same(collapsing, tokenizer):
    with pytest.warns(CollapseWarning, match=r"'Paris' → 'Rome, the old capital'"):
        warned = edited(toy_model(KIND), tokenizer, END, statistics=collapsing, method="rome", guard="warn")
    silent = edited(toy_model(KIND), tokenizer, END, statistics=collapsing, method="rome", guard="off")
    assert torch.equal(delta_w(warned), delta_w(silent))
    assert (warned.records[0].applied, warned.records[0].collapsed) == (True, True)


def test_off_says_nothing(collapsing, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = edited(toy_model(KIND), tokenizer, END, statistics=collapsing, method="rome", guard="off")
    assert (result.records[0].applied, result.records[0].collapsed) == (True, True)


@pytest.mark.parametrize("schedule", ["joint", "sequential"])
def test_skip_leaves_out_what_collapses_and_nothing_else(schedule, collapsing, tokenizer):
    alone = edited(toy_model(KIND), tokenizer, MIDDLE, statistics=collapsing, method="rome", guard="raise")
    both = edited(
        toy_model(KIND),
        tokenizer,
        [END, MIDDLE],
        statistics=collapsing,
        method="rome",
        guard="skip",
        schedule=schedule,
    )
    assert [(r.subject, r.applied, r.collapsed) for r in both.records] == [
        ("Paris", False, True),
        ("Istanbul", True, False),
    ]
    condition = float(torch.linalg.cond(collapsing.layers[LAYER].moment.double()))
    assert relative_error(delta_w(both), delta_w(alone)) < rounding_of_edit(torch.float32, condition)


def test_skip_of_everything_changes_nothing(collapsing, tokenizer):
    model = toy_model(KIND)
    before = all_bits(model)
    result = edited(model, tokenizer, END, statistics=collapsing, method="rome", guard="skip")
    assert result.delta.updates == {}
    assert result.records[0].applied is False
    assert changed(model, before) == []


def test_edits_that_only_together_collapse_the_model_are_met_in_part(tokenizer):
    """Two values for keys that are all but equal: one update alone is an eighth of ‖W‖, both together twice ‖W‖."""
    model = toy_model(KIND)
    pair = [
        Edit("Snow fell in Berlin and snow fell in Paris and in the city of {}", "Chicago", "Rome"),
        Edit("Snow fell in Vienna and snow fell in Paris and in the city of {}", "Chicago", "Paris"),
    ]
    alone = [edited(copy.deepcopy(model), tokenizer, edit, layer=0).records[0] for edit in pair]
    weight_norm = alone[0].weight_norm
    assert all(record.update_norm < 0.5 * weight_norm for record in alone)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = edited(copy.deepcopy(model), tokenizer, pair, layer=0, guard="off")
    assert float(delta_w(exact).norm()) > UPDATE_RATIO_LIMIT * weight_norm
    # Both keys are met as far as they can be told apart in fp32.
    assert all(record.missed < rounding_of_edit(torch.float32, exact.condition) for record in exact.records)

    with pytest.warns(SharedKeyWarning, match=r"(?s)2 edit\(s\) are met in part.*'Rome': \d+% off.*guard='off'"):
        held = edited(model, tokenizer, pair, layer=0, guard="raise")
    # Both factors are rounded to fp32; held, their columns hardly cancel.
    assert float(delta_w(held).norm()) == pytest.approx(
        UPDATE_RATIO_LIMIT * weight_norm, rel=rounding(torch.float32, 2)
    )
    assert all(0.05 < record.missed < 0.5 and record.applied for record in held.records)


@pytest.mark.parametrize("guard", ["raise", "warn", "skip"])
def test_a_studys_limit_holds_for_edits_together_as_well(guard):
    assert largest_harmless(guard, 8.0) == UPDATE_RATIO_LIMIT * 8
    assert largest_harmless(guard, 8.0, 0.5) == 4
    assert largest_harmless("off", 8.0, 0.5) == math.inf


# The rules themselves


@pytest.mark.parametrize(
    ("update", "weight", "wanted"),
    [
        (0.0, 1.0, False),
        (0.9, 1.0, False),
        (UPDATE_RATIO_LIMIT * 8, 8.0, False),
        (UPDATE_RATIO_LIMIT * 8.001, 8.0, True),
        (float("inf"), 1.0, True),
        (float("nan"), 1.0, True),
        (1.0, float("nan"), True),
        (1.0, 0.0, True),
    ],
)
def test_predicts_collapse(update, weight, wanted):
    assert predicts_collapse(update, weight) is wanted


def test_judge_keeps_the_order(tokenizer):
    (one,) = edited(toy_model(KIND), tokenizer, END).records
    one = replace(one, target="t", update_norm=4.0, weight_norm=1.0, denominator=0.5)
    records = [replace(one, subject=name, collapsed=name in "bd") for name in "abcd"]
    assert judge(records, "skip") == [True, False, True, False]
    assert judge(records, "off") == [True] * 4
    with pytest.warns(CollapseWarning, match=r"(?s)2 edit\(s\).*'b' → 't'.*'d' → 't'"):
        assert judge(records, "warn") == [True] * 4
    assert judge(records[:1], "raise") == [True]
    with pytest.raises(CollapseError, match=r"'b' → 't': ‖Δ‖ = 4 against ‖W‖ = 1, denominator 0\.5"):
        judge(records, "raise")


def test_an_unknown_guard(tokenizer):
    with pytest.raises(ArgumentError, match="guard: got 'maybe', wanted one of raise, warn, skip, off"):
        edited(toy_model(KIND), tokenizer, END, guard="maybe", settings=SETTINGS)
