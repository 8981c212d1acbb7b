"""Tensors saved to a file of their own."""

import os

import pytest
import torch

from on_disk import (
    digests,
    forks,
    killed_at_line,
    lines_executed,
)
from rome_fast.errors import CheckpointError
from rome_fast.weights import load_tensors, save_tensors


def test_saved_tensors_come_back_to_the_bit(tmp_path):
    path = tmp_path / "delta.safetensors"
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "whole": base,
        "again": base,
        "columns": base[:, ::2],
        "bf16": base.bfloat16(),
        "fp64": base.double(),
        "empty": base[:0],
        "scalar": base[0, 0],
        "grad": torch.nn.Parameter(base),
    }
    save_tensors(path, tensors, {"layer": "9", "größe": "≤"})
    got, metadata = load_tensors(path)
    assert metadata == {"layer": "9", "größe": "≤"}
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    save_tensors(path, {}, {})
    assert load_tensors(path) == ({}, {})
    assert os.listdir(tmp_path) == ["delta.safetensors"]


def test_saved_file_is_as_readable_as_any_new_file(tmp_path):
    """safetensors' own writer makes files of mode 0600: no other user could read shared statistics."""
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_save_keeps_the_old_file(tmp_path):
    path, good = tmp_path / "x.safetensors", {"a": torch.ones(2)}
    save_tensors(path, good, {"k": "v"})
    before = digests(tmp_path)
    for tensors, metadata in (
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}),
        ({"a": torch.ones(2).to_sparse()}, {}),
        ({"__metadata__": torch.ones(2)}, {}),
        ({"\ud800": torch.ones(2)}, {}),
        (good, {"k": 1}),
        (good, {"k": "\ud800"}),
    ):
        with pytest.raises(CheckpointError, match=r"writing .*x\.safetensors"):
            save_tensors(path, tensors, metadata)
    for target in (tmp_path / "no" / "x", tmp_path):
        with pytest.raises(CheckpointError):
            save_tensors(target, good, {})
    assert digests(tmp_path) == before
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "missing")


@forks
def test_kill_9_at_any_moment_of_a_save(tmp_path):
    path = tmp_path / "x.safetensors"

    def write_new() -> None:
        save_tensors(path, {"a": torch.ones(3)}, {})

    lines = lines_executed(write_new)
    for line in range(1, lines, lines // 20):
        save_tensors(path, {"a": torch.zeros(3)}, {})
        killed_at_line(write_new, line)
        assert load_tensors(path)[0]["a"].tolist() in ([0, 0, 0], [1, 1, 1])
        write_new()
        assert os.listdir(tmp_path) == ["x.safetensors"]
