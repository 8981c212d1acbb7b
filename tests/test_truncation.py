"""Adapters of a smaller rank than their update: as near as any matrix of that rank, by dense decompositions."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START, edited, rounding
from rome_fast import Ledger, Statistics
from rome_fast.errors import ArgumentError, StatisticsError
from rome_fast.updates.delta import Delta, LowRank
from rome_fast.updates.truncation import truncated
from toys import D_FF, HIDDEN, toy_model

NAME = f"model.layers.{LAYER}.mlp.down_proj.weight"
# Sums over d_ff and d, a decomposition of the small core (backward stable, of the order of its size) and one of C.
ALLOWED = rounding(torch.float64, 4 * (D_FF + HIDDEN))


def made(rank, dtype=torch.float64, d=HIDDEN, d_ff=D_FF):
    """Factors whose product has singular values that fall off by a half each, and neither is orthogonal."""
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, d_ff, generator=generator, dtype=torch.float64)
    return (left * 0.5 ** torch.arange(rank)).to(dtype), right.to(dtype)


def factor():
    """Cholesky factor of a C whose eigenvalues are two orders apart."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(D_FF, D_FF, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, D_FF)
    return torch.linalg.cholesky(root @ root.T + 0.01 * torch.eye(D_FF, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_nothing_of_that_rank_is_nearer(rank, weighted):
    left, right = made(8)
    root = factor() if weighted else None
    one, two, about = truncated(left, right, rank, root)
    assert (one.shape, two.shape, about.rank, about.of) == ((HIDDEN, rank), (rank, D_FF), rank, 8)
    dense = (left @ right).numpy()
    difference = dense - (one @ two).numpy()
    image = dense @ root.numpy() if weighted else dense
    values = np.linalg.svd(image, compute_uv=False)
    least = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    off = np.linalg.norm(difference @ root.numpy() if weighted else difference) / np.linalg.norm(image)
    # What is left is a difference of numbers 1 / least as large.
    assert off == pytest.approx(least, rel=ALLOWED / least)
    assert (about.output_error if weighted else about.error) == pytest.approx(least, rel=ALLOWED / least)
    assert about.error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(dense), rel=ALLOWED / least)
    assert (about.output_error is None) != weighted
    # It is another one than without C, and by its outputs nearer than that.
    if weighted:
        plain = np.linalg.norm((dense - torch.matmul(*truncated(left, right, rank, None)[:2]).numpy()) @ root.numpy())
        assert off < (1 - 1e-3) * plain / np.linalg.norm(image)


@pytest.mark.parametrize("rank", [8, 9, 10_000])
def test_a_rank_that_is_enough_changes_nothing(rank):
    left, right = made(8, torch.float32)
    one, two, about = truncated(left, right, rank, factor())
    assert one is left
    assert two is right
    assert (about.rank, about.error, about.output_error) == (8, 0.0, 0.0)


def test_factors_that_are_degenerate():
    """More columns than a weight has rows, two that are the same, and nothing at all."""
    left, right = made(3 * HIDDEN, torch.float32)
    one, two, about = truncated(left, right, HIDDEN, None)
    # A product of rank HIDDEN is met to the rounding of float32.
    assert float((one @ two - left @ right).norm() / (left @ right).norm()) < rounding(torch.float32, D_FF + 3 * HIDDEN)
    assert about.error < ALLOWED
    left, right = made(2)
    one, two, about = truncated(torch.cat([left, left], 1), torch.cat([right, right]), 2, None)
    assert float((one @ two - 2 * left @ right).norm() / (left @ right).norm()) < ALLOWED
    zero = torch.zeros(HIDDEN, 3), torch.zeros(3, D_FF)
    one, two, about = truncated(*zero, 1, factor())
    assert not torch.any(one @ two)
    assert (about.error, about.output_error) == (0.0, 0.0)


def read(directory):
    with safe_open(directory / "adapter_model.safetensors", "pt") as opened:
        tensors = {key.split(".")[-2]: opened.get_tensor(key).double() for key in opened.keys()}  # noqa: SIM118
        return tensors["lora_B"] @ tensors["lora_A"], opened.metadata()


def test_an_adapter_says_how_far_it_is_off(tmp_path, toy_tokenizers, toy_statistics):
    model = toy_model("llama")
    statistics = toy_statistics(model, False)
    result = edited(model, toy_tokenizers[False], [START, MIDDLE, END], statistics=statistics)
    delta = result.delta
    assert delta.to_lora(tmp_path / "whole", model) == {}
    dense = delta.updates[NAME].dense().double()
    for name, given in (("plain", None), ("outputs", statistics)):
        found = delta.to_lora(tmp_path / name, model, rank=2, statistics=given)
        product, metadata = read(tmp_path / name)
        off = float((product - dense).norm() / dense.norm())
        # Its factors are rounded to float32.
        assert found[NAME].error == pytest.approx(off, abs=rounding(torch.float32, 2))
        assert json.loads(metadata["truncation"])[NAME] == vars(found[NAME])
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 2
    assert found[NAME].output_error < found[NAME].error < 1
    assert delta.to_lora(tmp_path / "enough", model, rank=3)[NAME].error == 0
    whole, enough = ((tmp_path / n / "adapter_model.safetensors") for n in ("whole", "enough"))
    assert read(whole.parent)[0].equal(read(enough.parent)[0])
    for rank in (0, -1, 1.0, True, "8"):
        with pytest.raises(ArgumentError, match=f"rank: got {rank!r}, wanted a whole number from 1 on"):
            delta.to_lora(tmp_path / "never", model, rank=rank)
    with pytest.raises(StatisticsError, match="wanted layer 1 as well"):
        delta.to_lora(tmp_path / "never", model, rank=1, statistics=Statistics([]))
    with pytest.raises(ArgumentError, match="statistics: got them with a model that was read in parts"):
        delta.to_lora(tmp_path / "never", toy_model("llama").to("meta"), rank=1, statistics=statistics)
    assert not (tmp_path / "never").exists()


def test_an_adapter_of_a_ledger(tmp_path, toy_tokenizers, toy_statistics):
    model = toy_model("llama")
    statistics = toy_statistics(model, False)
    how = {"method": "c-rome", "layer": LAYER, "guard": "off", "unconverged": "write"}
    made = {"contexts": CONTEXTS, "settings": SETTINGS, **how}
    ledger = Ledger.create(tmp_path / "ledger", model, toy_tokenizers[False], statistics=statistics, **made)
    ledger.add([START, MIDDLE, END])
    delta = ledger.to_lora(tmp_path / "adapter", rank=2)
    wanted = delta.to_lora(tmp_path / "wanted", model, rank=2, statistics=statistics)
    assert delta.report["truncation"] == {NAME: vars(wanted[NAME])}
    assert read(tmp_path / "adapter")[0].equal(read(tmp_path / "wanted")[0])
    assert delta.updates[NAME].left.shape[1] == 3
    assert "truncation" not in ledger.to_lora(tmp_path / "whole").report
    with pytest.raises(ArgumentError, match="rank: got 0"):
        ledger.to_lora(tmp_path / "never", rank=0)


def test_the_rank_of_a_delta_made_by_hand(tmp_path):
    """Of any weight, each with a rank of its own."""
    model = toy_model("llama")
    updates = {f"model.layers.{n}.mlp.down_proj.weight": LowRank(*made(rank)) for n, rank in ((0, 2), (1, 6))}
    found = Delta(updates).to_lora(tmp_path / "adapter", model, rank=4)
    assert [(about.rank, about.of) for about in found.values()] == [(2, 2), (4, 6)]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) == [2, 4]
