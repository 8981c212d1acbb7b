"""What the closed form of each of several layers is solved with, and how much of it is there at a time."""

import weakref

import pytest
import torch

from helpers import relative_error, rounding
from rome_fast import Statistics
from rome_fast.closing.geometry import Geometries
from rome_fast.errors import StatisticsError
from rome_fast.methods import FIRST_TOKEN_WEIGHT
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.statistics import LayerStatistics
from toys import D_FF, save_toy, toy_model

LAYERS = (0, 1, 2)


def moments(runner, seed=0):
    """Well conditioned ones of all layers: eigenvalues of a Wishart matrix of twice as many keys, from 0.09 to 2.9."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(len(LAYERS), 2 * D_FF, D_FF, generator=generator)
    return [
        LayerStatistics(layer, k.T @ k / len(k), len(k), Fingerprint.of(runner, layer))
        for layer, k in zip(LAYERS, keys, strict=True)
    ]


def assert_factor(factor, matrix):
    """Lower triangular, and that of the matrix: a sum of D_FF products, on both sides."""
    assert torch.equal(factor, factor.tril())
    assert relative_error(factor @ factor.T, matrix) < rounding(torch.float64, 2 * D_FF)


def test_each_layer_is_solved_with_its_own():
    runner = Runner(toy_model("llama"))
    entries = moments(runner)
    made = Geometries(runner, LAYERS, Statistics(entries))
    assert (list(made), len(made)) == (list(LAYERS), 3)
    made.check()
    for layer, entry in zip(LAYERS, entries, strict=True):
        assert_factor(made[layer].factor, entry.moment.double())
        assert made[layer].held is None
        assert made[layer] is made[layer]


@pytest.mark.parametrize("identity", [False, True])
def test_first_tokens_hold_what_was_made_before_they_were_known(identity):
    """As in an edit, which checks its statistics before it has seen its requests."""
    runner = Runner(toy_model("llama"))
    entries, first = moments(runner), moments(runner, seed=1)
    made = Geometries(runner, LAYERS, None if identity else Statistics(entries))
    made.check()
    made.first_tokens = {entry.layer: entry for entry in first}
    for layer, entry, one in zip(LAYERS, entries, first, strict=True):
        moment = torch.eye(D_FF, dtype=torch.float64) if identity else entry.moment.double()
        assert (made[layer].factor is None) == identity
        assert_factor(made[layer].held, moment + FIRST_TOKEN_WEIGHT * one.moment.double())


def test_layers_without_statistics_are_named():
    runner = Runner(toy_model("llama"))
    entries = Statistics(moments(runner)[1:2])
    with pytest.raises(StatisticsError, match=r"got layer\(s\) 1, wanted layers 0, 2 as well; .*--layers 0 2 "):
        Geometries(runner, LAYERS, entries)


def test_a_streamed_model_has_one_factor_at_a_time(tmp_path, toy_tokenizers, monkeypatch):
    """While one is made the last one is gone, of C as well as of C with the first tokens held."""
    source = save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)
    stream = checkpoints.outline(source, memory=400_000, layer=LAYERS, identity=True).stream()
    runner = Runner(stream.model, stream)
    entries, first = moments(runner), moments(runner, seed=1)
    statistics = Statistics(entries)
    made = Geometries(runner, LAYERS, statistics)
    made.first_tokens = {entry.layer: entry for entry in first}
    factors: list[weakref.ref[torch.Tensor]] = []
    real = torch.linalg.cholesky_ex

    def factored(matrix):
        # One of C while that of C + λ C₁ of the same layer is made, and nothing of another layer.
        assert sum(ref() is not None for ref in factors) == len(factors) % 2
        found = real(matrix)
        factors.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(torch.linalg, "cholesky_ex", factored)
    for layer in (*LAYERS, *LAYERS):
        assert made[layer] is made[layer]
    assert len(factors) == 2 * 2 * len(LAYERS)
    made.check()
    assert sum(ref() is not None for ref in factors) == 2
    assert all(entry._factor is None for entry in statistics.layers.values())
    stream.close()
