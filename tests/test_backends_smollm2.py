"""The same edit of the real model on every backend: SmolLM2-135M, its statistics included.

Triton runs in its interpreter, in a process of its own: this file as a program, which writes what it found to a file.
"""

import os
import subprocess
import sys

import pytest
import torch
from rome_fast.kernels import native
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import broken_interpreter, relative_error, rounding
from rome_fast import Edit, ValueSettings, apply_edits, collect_statistics
from rome_fast.assets import demo_texts, model_dir

LAYER = 9
# One subject at the start and one inside; two, because the mean key of a single edit needs no kernel.
EDITS = (
    Edit("{} is a twin city of", "Chicago", "Istanbul"),
    Edit("The mother tongue of {} is", "Marie Curie", "Dutch"),
)
CONTEXTS = ("It rained all day. ", "The first step is to plan. ")


def edited_by_the_backend_in_force():
    """C of layer 9, ΔW of one edit of two facts, and the edited weight in bf16, for which there are kernels everywhere.

    The ridge keeps C from magnifying its own rounding: with 1e-3 in place of 1, ΔW differs by 1e-4 and 2e-4.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    statistics = collect_statistics(model, tokenizer, demo_texts()[:20], [LAYER], tokens=512)
    statistics.layers[LAYER].ridge = 1.0
    result = apply_edits(
        model,
        EDITS,
        tokenizer=tokenizer,
        statistics=statistics,
        contexts=CONTEXTS,
        layer=LAYER,
        # In bfloat16 a factor that another order of a sum moves to its neighbour changes δ by more than any mistake.
        settings=ValueSettings(steps=3, stop="loss", compute_dtype="float32"),
        guard="off",
        unconverged="write",
        measure=False,
    )
    result.revert()
    ((name, update),) = result.delta.updates.items()
    edited = result.delta.edited(model.to(torch.bfloat16))[name]
    return {"C": statistics.layers[LAYER].moment, "ΔW": update.dense(), "W": edited}


@pytest.fixture(scope="module")
def by_reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_FAST_KERNELS", "reference")
        return edited_by_the_backend_in_force()


def by_native_kernels(_folder):
    if obstacle := native.obstacle() or native.doubt("second_moment_"):
        pytest.skip(obstacle)
    # Not forced: they take no fp32 weights, which torch updates as fast.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROME_FAST_KERNELS", raising=False)
        return edited_by_the_backend_in_force()


def by_triton(folder):
    pytest.importorskip("triton", reason="the kernels extra is not installed")
    if obstacle := broken_interpreter():
        pytest.skip(obstacle)
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "found.safetensors")],
        env=os.environ | {"ROME_FAST_KERNELS": "triton", "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "found.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("edited", [by_native_kernels, by_triton])
def test_every_backend_makes_the_same_edit(edited, by_reference, tmp_path):
    found, wanted = edited(tmp_path), by_reference
    assert not torch.equal(found["C"], wanted["C"]), "the reference ran here too: other code rounds otherwise"
    # The same keys summed in another order, in chains of up to 512 tokens; with this ridge, solving for ΔW of two edits
    # magnifies that by up to ten.
    allowed = rounding(torch.float32, 512)
    assert relative_error(found["C"], wanted["C"]) <= allowed
    assert relative_error(found["ΔW"], wanted["ΔW"]) <= 10 * allowed
    # One unit in the last place: the interpreter truncates what it stores in bf16.
    unit = torch.finfo(torch.bfloat16).eps * wanted["W"].double().abs()
    difference = (found["W"].double() - wanted["W"].double()).abs()
    assert bool((difference <= unit + (found["ΔW"].double() - wanted["ΔW"].double()).abs()).all())


def in_the_interpreter(out):
    """Write what triton's interpreter finds, with few and large tiles: it takes about as long for small ones."""
    from rome_fast.kernels import configs

    from rome_fast.models import fused

    configs.SECOND_MOMENT[configs.OTHER] = configs.Tile(512, 512, 512, warps=4, stages=1, descriptors=False)
    configs.PREPARE_BLOCK = configs.ADD_BLOCK = (512, 512)
    configs.RANK_UPDATE_BLOCK = (256, 512)
    fused.ENABLED = False  # norms and rotations are a program for every position, which takes ten minutes here
    save_file(edited_by_the_backend_in_force(), out)


if __name__ == "__main__":
    in_the_interpreter(sys.argv[1])
