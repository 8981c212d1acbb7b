"""Edits whose values several processes share, one of which may die."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import CONTEXTS, END, LAYER, MIDDLE, SETTINGS, START, all_bits, changed, relative_error, rounding_of_edit
from rome_fast import Delta, Edit, apply_edits
from rome_fast.errors import ArgumentError, RomeFastError
from rome_fast.search import search
from toys import save_toy, toy_model

EDITS = (START, MIDDLE, END, Edit("The museum of {}", "Vienna", "Paris"))
pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT = f"transformer.h.{LAYER}.mlp.c_proj.weight"


@pytest.fixture
def together(toy_tokenizers, tmp_path):
    """A function that edits in forked processes; returns what each of them said, None of one that died."""
    tokenizer = toy_tokenizers[False]
    options = {"method": "c-rome", "statistics": "identity", "layer": LAYER, "contexts": CONTEXTS, "settings": SETTINGS}
    options |= {"guard": "off", "unconverged": "write", "measure": True}

    def work(rank, dies, own):
        model = toy_model("gpt2", dtype=torch.float64)
        before = all_bits(model)
        found, optimise = 0, search.optimise_values

        def counted(runner, chunks, layer, settings, edits, **options):
            nonlocal found
            if rank == dies:
                os._exit(9)
            found += edits
            return optimise(runner, chunks, layer, settings, edits, **options)

        search.optimise_values = counted
        try:
            result = apply_edits(model, EDITS, tokenizer=tokenizer, distributed=True, **options | own)
        except RomeFastError as error:
            return {"error": str(error), "changed": changed(model, before)}
        result.delta.save(tmp_path / f"delta-{rank}.safetensors")
        return {"found": found, "probabilities": [record.probability_after for record in result.records]}

    def run(count, dies=None, differing=None, **given):
        children = []
        store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        for rank in range(count):
            said = store.with_name(f"{store.name}-said-{rank}.json")
            child = os.fork()
            if child == 0:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
                said.write_text(json.dumps(work(rank, dies, given | (differing or {}).get(rank, {}))))
                # Neither pytest nor torch.distributed is to end in a child.
                os._exit(0)
            children.append((child, said))
        for child, _ in children:
            os.waitpid(child, 0)
        return [json.loads(said.read_text()) if said.exists() else None for _, said in children]

    def alone(weight=WEIGHT, **given):
        model = toy_model("gpt2", dtype=torch.float64)
        result = apply_edits(model, EDITS, tokenizer=tokenizer, **options | given)
        dense = {name: update.dense() for name, update in result.delta.updates.items()}
        return dense if weight is None else dense[weight]

    run.alone = alone
    return run


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("count", "own"), [(2, {}), (3, {"schedule": "sequential", "batch_size": 2}), (6, {})])
def test_as_many_processes_as_you_like_make_the_same_edit(count, own, together, tmp_path):
    """Also more than there are edits."""
    said = together(count, **own)
    assert sum(one["found"] for one in said) == len(EDITS)
    assert max(one["found"] for one in said) <= -(-len(EDITS) // count) + bool(own)
    deltas = [Delta.load(tmp_path / f"delta-{rank}.safetensors").updates[WEIGHT].dense() for rank in range(count)]
    wanted = together.alone(**own)
    for delta in deltas:
        assert relative_error(delta, wanted) < rounding_of_edit(torch.float64)
        assert torch.equal(delta, deltas[0])
    # Measured once.
    assert all(value > 0 for value in said[0]["probabilities"])
    assert {value for one in said[1:] for value in one["probabilities"]} == {None}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("rounds", [1, 2])
def test_an_edit_of_several_layers_is_that_of_one_process(rounds, together, tmp_path, empty_cache):
    """The values are dealt out, and what comes after is the same in all; one of the subjects is the first token."""
    spread = {"method": "dual", "layer": None, "layers": [0, 1, 2], "rounds": rounds}
    said = together(2, **spread)
    assert all(one["found"] >= rounds * (len(EDITS) // 2) for one in said)
    wanted = together.alone(weight=None, **spread)
    for rank in range(2):
        delta = Delta.load(tmp_path / f"delta-{rank}.safetensors")
        assert len(delta.updates) == 3
        for name, update in delta.updates.items():
            assert relative_error(update.dense(), wanted[name]) < rounding_of_edit(torch.float64, 1e4)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_all_take_back_what_the_first_one_finds_to_harm_the_model(together, monkeypatch):
    monkeypatch.setattr("rome_fast.closing.guard.UPDATE_RATIO_LIMIT", math.inf)
    monkeypatch.setattr("rome_fast.closing.effect.DRIFT_LIMIT", -math.inf)
    said = together(2, guard="raise")
    assert all("reads ordinary text much worse" in one["error"] for one in said)
    assert [one["changed"] for one in said] == [[], []]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_run_and_nothing_is_changed(dies, together):
    said = together(2, dies)
    assert said[dies] is None
    living = said[1 - dies]
    pattern = rf"process {1 - dies} of 2: another one has ended early .*; nothing was written: run the same command"
    assert re.match(pattern, living["error"])
    assert living["changed"] == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "other", [{"contexts": CONTEXTS[:-1]}, {"rounds": 2}, {"batch_size": 2}], ids=lambda o: next(iter(o))
)
def test_processes_with_different_options_are_told(other, together):
    said = together(2, differing={1: other})
    wanted = "model, edits, options: process(es) 1 of 2 got others than process 0; give all of them the same"
    assert [one["error"] for one in said] == [wanted] * 2
    assert [one["changed"] for one in said] == [[], []]


def test_together_needs_a_process_group(toy_tokenizers):
    with pytest.raises(ArgumentError, match="distributed: wanted an initialised torch"):
        apply_edits(toy_model("gpt2"), END, tokenizer=toy_tokenizers[False], statistics="identity", distributed=True)


@pytest.mark.slow
def test_torchrun(tmp_path, toy_tokenizers, monkeypatch):
    """The documented command; ports are torchrun's to choose. One process writes, and one says what it did."""
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("gpt2"), toy_tokenizers[False])
    lines = [{"prompt": e.prompt, "subject": e.subject, "target_new": e.target} for e in EDITS]
    Path("edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rome_fast", "edit", "model", "--edits", "edits.jsonl", "--identity", "--layer", str(LAYER)]
    command += ["--unconverged", "write", "--guard", "off", "--out", "edited", "--json", "report.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("edited checkpoint: edited") == 1
    assert json.loads(Path("report.json").read_text())["edits"]
    assert (Path("edited/rome_fast/0001/record.json")).exists()
