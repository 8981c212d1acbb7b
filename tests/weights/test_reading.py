"""Opening checkpoints and reading their tensors."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from on_disk import (
    INDEX,
    NAMES,
    bits,
    header_json,
)
from rome_fast.errors import CheckpointError
from rome_fast.weights import Checkpoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_read_returns_the_bits(dtype, tmp_path):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0]).to(dtype)
    odd_start = torch.ones(3, dtype=torch.uint8)
    tensors = {"first": odd_start, "w": values, "e": values[:0].clone(), "s": values[1, 1].clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names() == ["e", "first", "s", "w"]
    for name in ("w", "e", "s"):
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (dtype, tensors[name].shape)
        assert bits(got) == bits(tensors[name])
        assert checkpoint.shard_of(name) == "model.safetensors"


def test_every_tensor_of_the_model_is_read(model, source):
    checkpoint = Checkpoint.open(source)
    state = model.state_dict()
    assert checkpoint.names() == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert (checkpoint.entry(name).dtype, checkpoint.entry(name).shape) == (tensor.dtype, tuple(tensor.shape))
    if (source / INDEX).exists():
        weight_map = json.loads((source / INDEX).read_text())["weight_map"]
        assert {name: checkpoint.shard_of(name) for name in state} == weight_map


def test_unknown_name_and_short_read(source):
    checkpoint = Checkpoint.open(source)
    for look in (checkpoint.read, checkpoint.entry, checkpoint.shard_of):
        with pytest.raises(CheckpointError, match=r"no tensor 'model.layer.0.*did you mean model\.layers\.0"):
            look("model.layer.0.mlp.down_proj.weight")
    shard = source / checkpoint.shard_of(NAMES[0])
    entry = checkpoint.entry(NAMES[0])
    start, _ = header_json(shard)
    os.truncate(shard, start + entry.end - 1)
    with pytest.raises(CheckpointError, match=r"3,071 of 3,072 bytes of model\.layers\.0"):
        checkpoint.read(NAMES[0])
    shard.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read(NAMES[0])


def test_the_single_file_wins_as_in_transformers(model, saved, tmp_path):
    directory = Path(shutil.copytree(saved / "sharded", tmp_path / "both"))
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert torch.equal(loaded[NAMES[0]], changed[NAMES[0]])
    assert torch.equal(Checkpoint.open(directory).read(NAMES[0]), changed[NAMES[0]])


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"safetensors only.*from_pretrained.*safe_serialization=True"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' missing|model\.safetensors.*missing"):
        Checkpoint.open(tmp_path)


def set_index(directory: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\x.safetensors", "C:x.safetensors",
     "", "..", ".hidden.safetensors", "pytorch_model.bin", "nul\0.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_shards_may_not_leave_the_directory(shard, saved, tmp_path):
    directory = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    set_index(directory, lambda weight_map: weight_map.update({NAMES[0]: shard}))
    with pytest.raises(CheckpointError, match="is no plain file name"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("index", "fault"),
    [(b"{", "Expecting"), (b"\xff", "utf-8"), (b"[" * 200_000, "recursion"), (b"[]", "no weight_map"),
     (b"{}", "no weight_map"), (b'{"weight_map": {}}', "no weight_map"), (b'{"weight_map": 3}', "no weight_map"),
     (b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "occurs twice")],
)  # fmt: skip
def test_damaged_index(index, fault, tmp_path):
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=fault):
        Checkpoint.open(tmp_path)


def test_index_and_shards_must_agree(saved, tmp_path):
    directory = Path(shutil.copytree(saved / "sharded", tmp_path / "source"))
    checkpoint = Checkpoint.open(directory)
    first, second = sorted(checkpoint.shards)[:2]
    set_index(directory, lambda weight_map: weight_map.update({"ghost": first}))
    with pytest.raises(CheckpointError, match=f"lists tensors that are not there: 'ghost' in {first}"):
        Checkpoint.open(directory)
    set_index(directory, lambda weight_map: weight_map.pop("ghost"))
    tensors = load_file(directory / second)
    stray = next(iter(checkpoint.shards[first].tensors))
    save_file({**tensors, stray: torch.zeros(1)}, directory / second)
    with pytest.raises(CheckpointError, match=rf"{second} has tensors of another shard: '{stray}' \({first}\)"):
        Checkpoint.open(directory)
    (directory / second).unlink()
    with pytest.raises(CheckpointError, match=f"'{second}' missing"):
        Checkpoint.open(directory)
