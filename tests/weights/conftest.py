"""A small saved model, as one file and as shards."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The same model as one file and as shards; what writes into it works on a copy."""
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="12KB")
    assert len(list((root / "sharded").glob("*.safetensors"))) > 2
    return root


@pytest.fixture(params=["single", "sharded"])
def source(request, saved, tmp_path):
    return Path(shutil.copytree(saved / request.param, tmp_path / "source"))
