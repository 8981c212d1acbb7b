"""Statistics collected by several processes, one of which may die."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import FORWARD, LAYER, relative_error, rounding
from rome_fast import Statistics, collect_statistics
from rome_fast.errors import ArgumentError, RomeFastError
from rome_fast.runs.processes import Processes
from rome_fast.statistics import collect, reading, snapshots
from toys import SENTENCES, save_toy, toy_model

TOKENS = 700


@pytest.fixture(autouse=True)
def many_batches(monkeypatch, one_thread):
    """Many small ones, and a snapshot after each."""
    monkeypatch.setattr(snapshots, "_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(snapshots, "_MOST_SHARE", float("inf"))
    monkeypatch.setitem(collect._BATCH_TOKENS, "cpu", 32)
    monkeypatch.setattr(reading, "_WINDOW_BATCHES", 4)


@pytest.fixture
def together(toy_tokenizers, tmp_path):
    """A function of (count, out, deaths) that collects in forked processes; returns what each of them said."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    runs = 0

    def work(rank, count, out, died_at, store, texts):
        calls = 0
        add_batch = collect._add_batches

        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == died_at:
                os._exit(9)
            add_batch(*arguments)

        collect._add_batches = counted
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        statistics = collect_statistics(
            model, tokenizer, texts, [0, LAYER], TOKENS, max_length=16, out=out, distributed=True
        )
        return {"batches": calls, "tokens": statistics.layers[0].tokens}

    def run(count, out, deaths=None, texts=None):
        nonlocal runs
        runs += 1
        children = []
        for rank in range(count):
            said = tmp_path / f"said-{runs}-{rank}.json"
            child = os.fork()
            if child == 0:
                try:
                    died_at = (deaths or {}).get(rank)
                    given = (texts or {}).get(rank, SENTENCES)
                    result = work(rank, count, out, died_at, tmp_path / f"store-{runs}", given)
                except RomeFastError as error:
                    result = {"error": str(error)}
                said.write_text(json.dumps(result))
                # Neither pytest nor torch.distributed is to end in a child.
                os._exit(0)
            children.append((child, said))
        for child, _ in children:
            os.waitpid(child, 0)
        return [json.loads(said.read_text()) if said.exists() else None for _, said in children]

    return run


def same(got, wanted, allowed):
    assert got.layers.keys() == wanted.layers.keys()
    for layer, entry in wanted.layers.items():
        assert relative_error(got.layers[layer].moment, entry.moment) <= allowed
        assert (got.layers[layer].tokens, got.layers[layer].provenance) == (entry.tokens, entry.provenance)


@pytest.fixture
def alone(toy_tokenizers):
    return collect_statistics(toy_model("gpt2"), toy_tokenizers[False], SENTENCES, [0, LAYER], TOKENS, max_length=16)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("count", [2, 4])
def test_as_many_processes_as_you_like_find_the_same(count, together, alone, tmp_path):
    said = together(count, tmp_path / "out")
    assert [one["tokens"] for one in said] == [TOKENS] * count
    # Every batch was one process's, and none had much more to do than another.
    batches = [one["batches"] for one in said]
    assert max(batches) - min(batches) <= 1
    # Sums of the same terms in another order, in fp64, rounded to fp32 at the end: no more than one element in a
    # hundred can lie so near to the middle of two numbers, and it differs by the last bit, 2⁻²³.
    same(Statistics.load(tmp_path / "out"), alone, 2**-23 / 10)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_dies_ends_the_run_and_the_same_run_goes_on(together, tmp_path):
    whole = together(2, tmp_path / "whole")
    said = together(2, tmp_path / "out", {1: 4})
    assert said[1] is None
    assert re.match(r"process 0 of 2: another one has ended early .*; run the same command with", said[0]["error"])
    assert not list((tmp_path / "out").glob("layer-*"))
    resumed = together(2, tmp_path / "out")
    # The one that lived has nothing left to do, the other one what it had not.
    assert [one["batches"] for one in resumed] == [0, whole[1]["batches"] - 3]
    same(Statistics.load(tmp_path / "out"), Statistics.load(tmp_path / "whole"), 0.0)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["layer-0.safetensors", "layer-1.safetensors"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_with_different_texts_are_told(together, tmp_path):
    """Some texts would count twice and others not at all."""
    said = together(3, tmp_path / "out", texts={1: [*SENTENCES[1:], SENTENCES[0]]})
    assert {one["error"] for one in said} == {
        "texts: process(es) 1 of 3 got others than process 0; give all of them the same"
    }
    assert not list((tmp_path / "out").glob("layer-*"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_first_process_may_die_as_well(together, tmp_path):
    said = together(2, tmp_path / "out", {0: 4})
    assert said[0] is None
    assert "process 1 of 2: another one has ended early" in said[1]["error"]


def test_batches_go_round():
    taken = [[Processes(rank, 3).takes(batch) for rank in range(3)] for batch in range(4)]
    assert taken == [[True, False, False], [False, True, False], [False, False, True], [True, False, False]]


def test_together_needs_a_process_group(toy_tokenizers):
    with pytest.raises(ArgumentError, match="distributed: wanted an initialised torch"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], SENTENCES, [LAYER], distributed=True)


@pytest.mark.slow
def test_torchrun(tmp_path, toy_tokenizers, monkeypatch):
    """The documented command; ports are torchrun's to choose."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    Path("corpus.txt").write_text("\n\n".join(SENTENCES))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rome_fast", "statistics", "model", "--corpus", "corpus.txt", "--out", "out", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("800 tokens, 10.0 per dimension of the keys") == 1
    texts = Path("corpus.txt").read_text().split("\n\n")
    wanted = collect_statistics(toy_model("gpt2"), toy_tokenizers[False], texts, [LAYER])
    got = Statistics.load("out").layers[LAYER]
    assert got.tokens == 800
    # In batches of other sizes.
    assert relative_error(got.moment, wanted.layers[LAYER].moment) < 2 * rounding(torch.float32, FORWARD / 2)
