"""Second moments of checkpoints that are read while they run: those of a model in memory, to the bit."""

import json

import pytest
import torch

from helpers import LAYER
from rome_fast import ValueSettings, collect_statistics
from rome_fast.cli import main
from rome_fast.errors import ArgumentError
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.models.verification import check_model
from rome_fast.opening import checkpoints
from rome_fast.opening.defaults import select
from rome_fast.statistics import Choice, Statistics, tuned_choice
from rome_fast.statistics import collect as collect_module
from rome_fast.statistics.collect import opened_for
from toys import KINDS, LAYERS, SENTENCES, save_toy, toy_model

TOP = LAYERS - 2


def least(source, layers=(LAYER,)):
    """The smallest budget that is accepted."""
    with (
        pytest.raises(ArgumentError, match="memory: got 1 bytes, wanted at least") as caught,
        opened_for(source, layers, memory=1),
    ):
        pass
    return int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[False], max_shard_size="100KB")


@pytest.fixture
def small_batches(monkeypatch):
    """Several batches, so that their order matters."""
    monkeypatch.setitem(collect_module._BATCH_TOKENS, "cpu", 64)


def moments(statistics):
    return {layer: entry.moment for layer, entry in statistics.layers.items()}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for layer, moment in wanted.items():
        assert torch.equal(got[layer], moment)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    # Two kinds in both, the others in one of them; `make acceptance` asks for all.
    [
        pytest.param(kind, dtype, marks=[] if kind in ("llama", "gpt2") or i % 2 == j else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
        for j, dtype in enumerate((torch.float32, torch.bfloat16))
    ],
)
def test_streamed_equals_resident(kind, dtype, tmp_path, toy_tokenizers, small_batches):
    tokenizer = toy_tokenizers[True]
    source = save_toy(tmp_path / "source", toy_model(kind, dtype=dtype), tokenizer, max_shard_size="100KB")
    model, _, _ = checkpoints.load(source)
    wanted = collect_statistics(model, tokenizer, SENTENCES, [LAYER, TOP], 500)
    # That of the checkpoint may be another: the tokenizer class of Qwen2 never puts BOS first.
    streamed = collect_statistics(source, tokenizer, SENTENCES, [LAYER, TOP], 500, memory=least(source, [LAYER, TOP]))
    assert_same(moments(streamed), moments(wanted))
    for layer in (LAYER, TOP):
        assert streamed.layers[layer].tokens == 500
        assert streamed.layers[layer].fingerprint.matches(wanted.layers[layer].fingerprint)
        assert streamed.layers[layer].provenance == wanted.layers[layer].provenance


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_layers_are_read_once_for_several_batches(together, source, small_batches, monkeypatch):
    """And nothing above the last wanted one is read again; how many batches go together changes no bit."""
    wanted = collect_statistics(source, None, SENTENCES, [LAYER], 400)
    monkeypatch.setattr(collect_module, "_batches_together", lambda *_: together)
    with opened_for(source, [LAYER], memory=least(source)) as (runner, tokenizer):
        assert runner.stream is not None
        assert not runner.stream.placement.resident
        # That a model is what it is taken for is found out by running all of it, once.
        check_model(runner)
        taken = []
        take = runner.stream.take
        monkeypatch.setattr(runner.stream, "take", lambda index: (taken.append(index), take(index))[1])
        read = runner.stream.bytes_read
        got = collect_module.collect(runner, tokenizer, SENTENCES, [LAYER], 400)
        assert_same(moments(got), moments(wanted))
        passes = sum(a != 0 and b == 0 for a, b in zip([-1, *taken], taken, strict=False))
        assert set(taken) == set(range(LAYER + 1))
        layer_bytes = [block.size for block in runner.stream._parts.blocks]
        once = sum(layer_bytes[: LAYER + 1])
        # The fingerprint reads nothing by blocks; the reader may be one block ahead at the end.
        assert passes * once <= runner.stream.bytes_read - read <= (passes + 1) * once
    batches = len(taken) // 2 // (LAYER + 1)  # each run of a layer asks for it, and so does its own forward
    assert batches > 4
    assert passes == -(-batches // together)


def test_everything_fits(source):
    """Without a budget a small model is simply loaded."""
    with opened_for(source) as (runner, _):
        assert runner.stream is None


def test_interrupted_and_streamed(source, small_batches, tmp_path, monkeypatch):
    wanted = collect_statistics(source, None, SENTENCES, [LAYER], 400)
    monkeypatch.setattr("rome_fast.statistics.snapshots.Snapshots.due", lambda self: True)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done > total / 2:
            raise Stop

    budget = least(source)
    with pytest.raises(Stop):
        collect_statistics(source, None, SENTENCES, [LAYER], 400, progress=stop, out=tmp_path / "out", memory=budget)
    got = collect_statistics(source, None, SENTENCES, [LAYER], 400, out=tmp_path / "out", memory=budget)
    assert_same(moments(got), moments(wanted))


def test_without_layers_those_of_an_edit_are_collected(source, toy_tokenizers, empty_cache):
    """By the depth of the model, and below the layer that it was tuned to; in memory and on disk, the same."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    wanted = collect_statistics(model, tokenizer, SENTENCES, [0, 1, 2], 400)
    for layers in ([0, 1], [1, 2]):
        assert select(model.config, tuned=tuned_choice(Runner(model), None), spread=True).layers == tuple(layers)
        found = collect_statistics(model, tokenizer, SENTENCES, tokens=400)
        streamed = collect_statistics(source, None, SENTENCES, tokens=400, memory=least(source, layers))
        for got in (found, streamed):
            assert_same(moments(got), {layer: wanted.layers[layer].moment for layer in layers})
        Choice(2, ValueSettings(), Fingerprint.of(Runner(model), 2), "2026-01-01").save(
            empty_cache / "statistics" / "a"
        )


def test_command(source, tmp_path):
    corpus, report = tmp_path / "corpus.txt", tmp_path / "report.json"
    corpus.write_text("\n\n".join(SENTENCES))
    usual = ["statistics", str(source), "--corpus", str(corpus), "--tokens", "400", "--layers", str(LAYER)]
    assert main([*usual, "--out", str(tmp_path / "whole")]) == 0
    streamed = [*usual, "--out", str(tmp_path / "streamed"), "--memory", str(least(source))]
    assert main([*streamed, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["tokens"] == 400
    folders = (tmp_path / "streamed", tmp_path / "whole")
    got, wanted = (moments(Statistics.load(folder)) for folder in folders)
    assert_same(got, wanted)


def test_bad_input(source, toy_tokenizers):
    with pytest.raises(ArgumentError, match="memory: got a budget for a model that is in memory already"):
        collect_statistics(toy_model("llama"), toy_tokenizers[False], SENTENCES, [LAYER], 50, memory="1GiB")
    with pytest.raises(ArgumentError, match=f"layer: got {LAYERS}, wanted one of"):
        collect_statistics(source, None, SENTENCES, [0, LAYERS], 50)
    with pytest.raises(ArgumentError, match="layers: got"):
        collect_statistics(source, None, SENTENCES, [], 50)
    with pytest.raises(ArgumentError, match="memory: got 'much'"):
        collect_statistics(source, None, SENTENCES, [LAYER], 50, memory="much")
