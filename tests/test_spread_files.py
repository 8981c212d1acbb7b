"""What an edit of several layers leaves on disk and in memory: written, saved, merged, exported, and undone."""

import copy

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import CONTEXTS, END, FORWARD, MIDDLE, SETTINGS, START, all_bits, changed, relative_error, rounding
from rome_fast import Delta, apply_edits
from rome_fast.updates import chains
from test_checkpoints import contents
from toys import SENTENCES, save_toy, toy_model

NAMES = {"llama": "model.layers.{}.mlp.down_proj.weight", "gpt2": "transformer.h.{}.mlp.c_proj.weight"}
USUAL = {
    "statistics": "identity",
    "contexts": CONTEXTS,
    "settings": SETTINGS,
    "guard": "off",
    "unconverged": "write",
    "measure": False,
}

pytestmark = pytest.mark.usefixtures("empty_cache")


def names(kind, layers):
    return [NAMES[kind].format(layer) for layer in layers]


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


@pytest.fixture(params=["llama", "gpt2"])
def kind(request):
    return request.param


@pytest.fixture
def source(kind, tmp_path, toy_tokenizers):
    return save_toy(tmp_path / "source", toy_model(kind), toy_tokenizers[False], max_shard_size="100KB")


def test_a_chain_of_edits_that_share_layers(kind, source, tmp_path):
    """A new checkpoint, then the same in place; each is undone to the last byte."""
    out = tmp_path / "out"
    one = apply_edits(source, [START, MIDDLE], layers=(0, 1, 2), out=out, **USUAL)
    model = loaded(source)
    before = all_bits(model)
    # Applied by itself, it is what was written.
    Delta.load(out / "rome_fast/0001/delta.safetensors").apply(model)
    assert changed(loaded(out), all_bits(model)) == []
    assert sorted(changed(model, before)) == sorted(one.delta.updates) == names(kind, (0, 1, 2))
    first = contents(out)
    two = apply_edits(out, END, layers=(1, 3), in_place=True, **USUAL)
    assert sorted(two.delta.updates) == names(kind, (1, 3))
    assert sorted(changed(loaded(out), all_bits(model))) == names(kind, (1, 3))
    report = chains.verify(out)
    assert report["edited"] == names(kind, range(4))
    assert [each["edited"] for each in report["chain"]] == [names(kind, (0, 1, 2)), names(kind, (1, 3))]
    assert [record["layers"] for record in chains.records(out)] == [[0, 1, 2], [1, 3]]
    assert chains.revert(out) == names(kind, (1, 3))
    assert contents(out) == first
    assert chains.revert(out) == names(kind, (0, 1, 2))
    assert contents(out) == contents(source)


def test_two_edits_in_memory_are_saved_merged_and_undone(kind, source, tmp_path):
    """Saved with both of them in it; the merged Delta leaves what one edit after the other leaves, but for rounding."""
    model, tokenizer = loaded(source), AutoTokenizer.from_pretrained(source)
    before = all_bits(model)
    one = apply_edits(model, [START, MIDDLE], tokenizer=tokenizer, layers=(0, 1, 2), **USUAL)
    between = all_bits(model)
    two = apply_edits(model, END, tokenizer=tokenizer, layers=(1, 3), **USUAL)
    two.save(tmp_path / "saved", source)
    assert changed(loaded(tmp_path / "saved"), all_bits(model)) == []
    assert chains.revert(tmp_path / "saved", all=True) == names(kind, range(4))
    assert contents(tmp_path / "saved") == contents(source)
    merged = one.delta.merge(two.delta)
    assert {name: update.left.shape[1] for name, update in merged.updates.items()} == {
        # Two columns for every edit.
        name: 4 * (layer < 3) + 2 * (layer in (1, 3))
        for layer, name in enumerate(names(kind, range(4)))
    }
    merged.save(tmp_path / "merged.safetensors")
    fresh = loaded(source)
    Delta.load(tmp_path / "merged.safetensors").apply(fresh)
    for name in names(kind, range(4)):
        # Once more rounded where both of them edit, sums of at most six products.
        assert relative_error(fresh.get_parameter(name), model.get_parameter(name)) < rounding(torch.float32, 2 * 6)
    two.revert()
    assert changed(model, between) == []
    one.revert()
    assert changed(model, before) == []


def test_peft_reads_an_adapter_of_several_layers(kind, source, tmp_path, toy_tokenizers):
    """One target module a layer."""
    pristine, tokenizer = loaded(source), toy_tokenizers[False]
    result = apply_edits(source, [START, MIDDLE, END], layers=(0, 1, 2), lora=tmp_path / "lora", **USUAL)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path / "lora").eval()
    config = adapted.peft_config["default"]
    assert config.target_modules == {name.removesuffix(".weight") for name in names(kind, (0, 1, 2))}
    assert set(config.rank_pattern.values()) == {6}

    def logits(model):
        with torch.no_grad():
            return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in SENTENCES[:2]])

    wanted = logits(result.model)
    assert relative_error(logits(pristine), wanted) > 0.01
    assert relative_error(logits(adapted), wanted) < rounding(torch.float32, FORWARD)
    assert relative_error(logits(adapted.merge_and_unload()), wanted) < rounding(torch.float32, FORWARD)
