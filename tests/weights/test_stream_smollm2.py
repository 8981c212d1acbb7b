"""The real model under a quarter of its size: streamed edits have the bytes of resident ones."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import bits
from rome_fast import Edit, ValueSettings, apply_edits
from rome_fast.assets import model_dir
from rome_fast.opening import checkpoints

EDITS = [
    Edit("{} is a twin city of", "Chicago", "Istanbul"),
    Edit("The mother tongue of {} is", "Danielle Darrieux", "English"),
]
USUAL = {
    "statistics": "identity",
    "layer": 9,
    "contexts": ("It rained all day. ", "The first step is to plan. "),
    "settings": ValueSettings(steps=2, stop="loss"),
    "guard": "off",
    "unconverged": "write",
    "measure": False,
}


@pytest.mark.parametrize(
    ("dtype", "edits"),
    [
        # One edit takes the way of several, but for the closed form; `make acceptance` has it, too.
        pytest.param(torch.float32, EDITS[:1], marks=pytest.mark.slow),
        (torch.float32, EDITS),
        # Arithmetic in bfloat16 is slow on CPUs without instructions for it.
        pytest.param(torch.bfloat16, EDITS[:1], marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, EDITS, marks=pytest.mark.slow),
    ],
    ids=["float32 single", "float32 joint", "bfloat16 single", "bfloat16 joint"],
)
def test_same_bytes_under_a_quarter_of_the_model(dtype, edits, tmp_path):
    source = model_dir()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if dtype != torch.float32:
        source = tmp_path / "source"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    result = apply_edits(model, edits, tokenizer=tokenizer, **USUAL)
    (name,) = result.delta.updates
    wanted = bits(model.get_parameter(name))
    del model, result
    placement = checkpoints.outline(source, memory=size // 4, layer=9, identity=True).placement
    assert placement.budget_bytes == size // 4
    apply_edits(source, edits, out=tmp_path / "out", memory=size // 4, **USUAL)
    assert torch.equal(bits(checkpoints.Checkpoint.open(tmp_path / "out").read(name)), wanted)
