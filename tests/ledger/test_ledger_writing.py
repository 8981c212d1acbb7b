"""A ledger's update in the model, in checkpoints and in adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers import (
    END,
    LAYER,
    MIDDLE,
    all_bits,
    bits,
    changed,
    edited,
    relative_error,
)
from ledgers import SEVERAL, bytes_of, copy_of_base
from on_disk import digests
from rome_fast import Ledger
from rome_fast.errors import ArgumentError, CheckpointError, CollapseError
from rome_fast.updates import chains
from rome_fast.updates.delta import Delta
from toys import save_toy, toy_model

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_an_empty_ledger(make, model, tmp_path, tokenizer):
    ledger = make("empty")
    before = all_bits(model)
    assert (len(ledger), ledger.entries(), ledger.log(), ledger.entries(at=0)) == (0, [], [], [])
    assert ledger.close().updates == ledger.apply().updates == {}
    assert changed(model, before) == []
    source = save_toy(tmp_path / "source", model, tokenizer)
    contents = digests(source)
    with pytest.raises(ArgumentError, match="so there is nothing to write"):
        ledger.write(source, tmp_path / "out")
    with pytest.raises(ArgumentError, match="it is empty"):
        ledger.to_lora(tmp_path / "out")
    ledger.write(source, in_place=True)
    assert digests(source) == contents
    ledger.compact()
    assert ledger.log() == []


def test_the_update_in_the_model(pool, model, tokenizer, monkeypatch):
    """What the ledger does later it does on the base, and what it has put there before makes room."""
    before = all_bits(model)
    weight = f"model.layers.{LAYER}.mlp.down_proj.weight"
    first = pool.apply()
    assert changed(model, before) == [weight]
    applied = all_bits(model)
    assert bytes_of(pool.close()) == bytes_of(first)
    assert changed(model, applied) == []
    pool.replace(SEVERAL[0])
    second = pool.apply()
    assert not first.is_applied
    copy = toy_model("llama", dtype=torch.float64)
    pool.apply(copy)
    assert changed(copy, all_bits(model)) == []
    with pytest.raises(ArgumentError, match="has this very update in it already"):
        pool.apply(copy)
    # Where the model reads much worse, the former update stays.
    applied = all_bits(model)
    monkeypatch.setattr("rome_fast.closing.effect.DRIFT_LIMIT", -100.0)
    ledger = Ledger.open(pool.folder, copy_of_base(), tokenizer, statistics="identity")
    object.__setattr__(pool._working.base, "guard", "raise")
    with pytest.raises(CollapseError, match="mean NLL of the contexts"):
        pool.apply(at=3)
    assert changed(model, applied) == []
    second.revert(model)
    assert changed(model, before) == []
    assert pool.close().updates.keys() == ledger.close().updates.keys()


def test_a_checkpoint_with_all_of_it(make, tmp_path, tokenizer, no_search):
    """A copy, and the base's own directory: what was written before is replaced, and the way back is to the base."""
    model = toy_model("llama")
    source = save_toy(tmp_path / "model", model, tokenizer)
    original = digests(source)
    ledger = make("ledger", model=model)
    ledger.add(SEVERAL[:3])
    no_search()
    delta = ledger.write(source, tmp_path / "out")
    name = f"model.layers.{LAYER}.mlp.down_proj.weight"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert bytes(bits(written[name])) == bytes(bits(delta.edited(model)[name]))
    chains.verify(tmp_path / "out")
    assert digests(source) == original
    ledger.write(source, in_place=True)
    assert load_file(source / "model.safetensors")[name].equal(written[name])
    ledger.remove(subject="Chicago")
    # From the disk, where the first update is still in it.
    reopened = Ledger.open(ledger.folder, source, statistics="identity", device="cpu")
    delta = reopened.write(source, in_place=True)
    assert bytes(bits(load_file(source / "model.safetensors")[name])) == bytes(bits(delta.edited(model)[name]))
    assert len(chains.verify(source)["chain"]) == 1
    assert chains.records(source)[0]["ledger"]["entries"] == [entry.id for entry in ledger.entries()]
    with pytest.raises(CheckpointError, match="are not those of the base"):
        make("second", model=model).write(source, in_place=True)
    kept = shutil.copytree(source, tmp_path / "kept")
    chains.revert(source)
    assert digests(source) == original
    reopened.remove([entry.id for entry in reopened.entries()])
    reopened.write(kept, in_place=True)
    assert digests(kept) == original
    with pytest.raises(ArgumentError, match="out: got none or in_place as well"):
        ledger.write(source)
    with pytest.raises(ArgumentError, match="exists already"):
        ledger.write(source, tmp_path / "out")


def test_an_edit_of_somebody_else_in_the_checkpoint_is_refused(make, tmp_path, tokenizer):
    model = toy_model("llama")
    source = save_toy(tmp_path / "model", model, tokenizer)
    ledger = make("ledger", model=model)
    ledger.add(END)
    edited(str(source), None, MIDDLE, in_place=True)
    contents = digests(source)
    with pytest.raises(CheckpointError, match="is not what the edit began with; nothing was changed"):
        ledger.write(source, in_place=True)
    assert digests(source) == contents
    with pytest.raises(ArgumentError, match="differ from those of the base"):
        Ledger.open(ledger.folder, source, statistics="identity", device="cpu")


def test_adapter(pool, tmp_path, model):
    pool.to_lora(tmp_path / "adapter", at=1)
    (update,) = pool.close(at=1).updates.values()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    product = torch.linalg.multi_dot([tensors[n] for n in sorted(tensors, reverse=True)])
    # Stored in float32, whose rounding both factors have.
    assert relative_error(product, update.dense()) < 4 * torch.finfo(torch.float32).eps
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 1


def test_a_saved_update_knows_its_base(pool, tmp_path):
    pool.close().save(tmp_path / "delta")
    delta = Delta.load(tmp_path / "delta")
    with pytest.raises(ArgumentError, match="is not the weight that it was made for"):
        delta.apply(toy_model("llama", dtype=torch.float64, seed=1))
    base = copy_of_base()
    delta.apply(base)
    assert changed(base, all_bits(copy_of_base())) == [f"model.layers.{LAYER}.mlp.down_proj.weight"]
