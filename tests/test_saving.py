"""What is saved is the model in memory, whatever was done to it, and every edit of it can be undone."""

import copy
import gc
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import END, LAYER, MIDDLE, SETTINGS, START, all_bits, bits, changed, edited
from on_disk import forks, killed_at_line, lines_executed
from rome_fast import Delta, apply_edits
from rome_fast.errors import ArgumentError, CheckpointError, ModelError
from rome_fast.opening import checkpoints
from rome_fast.updates import chains, saving
from rome_fast.updates.delta import _APPLIED, applied_to
from rome_fast.weights import Checkpoint
from toys import SENTENCES, VOCABULARY, save_toy, toy_model

QUICK = replace(SETTINGS, steps=2)
NAME = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture
def source(tmp_path, toy_tokenizers):
    return save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[True], max_shard_size="100KB")


@pytest.fixture
def tokenizer(toy_tokenizers):
    return toy_tokenizers[True]


def loaded(directory, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def edit(model, tokenizer, edits=END, **changes):
    return edited(model, tokenizer, edits, settings=QUICK, **changes)


def contents(directory, folder=True):
    """The bytes of every file by its path; without `folder`, of those that are not ours."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    found = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if folder or not name.startswith("rome_fast/")}


def logits(model, tokenizer):
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in SENTENCES[:2]])


def record_of(out, number=1):
    return json.loads((out / f"rome_fast/{number:04}/record.json").read_text())


def assert_saved(out, model, tokenizer, *, to_logits=True):
    """A fresh load has the weights, and so the logits, of the model in memory, to the bit."""
    again = loaded(out)
    assert again.dtype == model.dtype
    state, wanted = again.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(bits(state[name]), bits(wanted[name]))] == []
    assert not to_logits or torch.equal(logits(again, tokenizer), logits(model, tokenizer))
    chains.verify(out)


def merged_lora(model, modules=("q_proj", "v_proj")):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False))
    return adapted.merge_and_unload().eval()


# Changed before the edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_that_was_merged_before_the_edit_is_saved(dtype, tmp_path, tokenizer):
    source = save_toy(tmp_path / "source", toy_model("llama", dtype=dtype), tokenizer)
    model = merged_lora(loaded(source))
    base = copy.deepcopy(model)
    assert not torch.equal(logits(model, tokenizer), logits(loaded(source), tokenizer))
    edit(model, tokenizer).save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    record = record_of(tmp_path / "out")
    assert record["weights"] == "memory"
    assert record["weights_reason"].startswith(f"the weights differ from those in {source}: model.layers.0.self_attn.")
    # What is undone is the edit alone.
    assert chains.revert(tmp_path / "out") == [NAME.format(LAYER)]
    assert_saved(tmp_path / "out", base, tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert contents(tmp_path / "out") == contents(tmp_path / "base")


def test_a_lora_on_the_edited_weight_itself(tmp_path, source, tokenizer):
    model = merged_lora(loaded(source), ["down_proj"])
    base = copy.deepcopy(model)
    edit(model, tokenizer).save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    chains.revert(tmp_path / "out")
    assert_saved(tmp_path / "out", base, tokenizer)


def test_a_lora_that_is_merged_after_the_edit(tmp_path, source, tokenizer):
    """On other weights it is saved, and the edit below it can be undone; on the edited one it could not be."""
    model = loaded(source)
    result = edit(model, tokenizer)
    assert merged_lora(model) is model
    result.save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    chains.revert(tmp_path / "out")
    assert torch.equal(
        loaded(tmp_path / "out").get_parameter(NAME.format(LAYER)), loaded(source).get_parameter(NAME.format(LAYER))
    )
    merged_lora(model, ["down_proj"])
    with pytest.raises(ArgumentError, match=r"out: .*down_proj.weight changed after the edit, .*model.save_pretrained"):
        result.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("size", [VOCABULARY + 8, VOCABULARY - 8])
def test_resized_embeddings(size, tie, tmp_path, tokenizer):
    source = save_toy(tmp_path / "source", toy_model("llama", tie=tie), tokenizer)
    model = loaded(source)
    # Rows that came new are zero, so that nothing is drawn for them.
    model.resize_token_embeddings(size, mean_resizing=False)
    edit(model, tokenizer).save(tmp_path / "out")
    assert len(loaded(tmp_path / "out").get_input_embeddings().weight) == size
    assert_saved(tmp_path / "out", model, tokenizer)
    assert "vocab_size" in record_of(tmp_path / "out")["weights_reason"]


@pytest.mark.parametrize("tie", [False, True])
def test_a_head_that_was_tied_or_untied_since(tie, tmp_path, tokenizer):
    """The config goes on saying what it said; a load by that would give another head."""
    source = save_toy(tmp_path / "source", toy_model("llama", tie=tie), tokenizer)
    model = loaded(source)
    with torch.no_grad():
        model.lm_head.weight = (
            torch.nn.Parameter(model.lm_head.weight * 2) if tie else model.get_input_embeddings().weight
        )
    edit(model, tokenizer).save(tmp_path / "out")
    assert model.config.tie_word_embeddings == tie
    assert_saved(tmp_path / "out", model, tokenizer)


def test_an_fp32_checkpoint_in_bf16_is_saved_in_bf16(tmp_path, source, tokenizer):
    model = loaded(source, torch.bfloat16)
    edit(model, tokenizer).save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    assert record_of(tmp_path / "out")["weights"] == "memory"
    original = load_file(tmp_path / "out/rome_fast/0001/originals.safetensors")[NAME.format(LAYER)]
    assert torch.equal(original, loaded(source, torch.bfloat16).get_parameter(NAME.format(LAYER)))


def test_a_config_that_says_bf16_of_fp32_weights(tmp_path, source, tokenizer):
    """Edited by its path, the checkpoint is run in bf16, and no digit of its weights is lost."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    usual = {"statistics": "identity", "layer": LAYER, "settings": QUICK, "guard": "off", "unconverged": "write"}
    result = apply_edits(source, END, contexts=["It is. "], measure=False, out=tmp_path / "out", **usual)
    assert result.model.dtype == torch.bfloat16
    wanted = loaded(source, torch.float32)
    Delta(result.delta.updates).apply(wanted)
    assert changed(loaded(tmp_path / "out", torch.float32), all_bits(wanted)) == []
    chains.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_a_model_that_was_never_saved(tmp_path, tokenizer):
    model = toy_model("gpt2")
    edit(model, tokenizer).save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    assert record_of(tmp_path / "out")["weights_reason"] == "the model does not say which checkpoint it was loaded from"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(END.text)["input_ids"] == tokenizer(END.text)["input_ids"]


def test_a_model_of_the_hub_that_is_not_in_the_cache_is_not_fetched_for_it(tmp_path, tokenizer, monkeypatch):
    model = toy_model("gpt2")
    model.config._name_or_path = "no/such-model"
    asked, real = [], checkpoints.snapshot_download

    def look(*arguments, local_files_only, **others):
        asked.append(local_files_only)
        return real(*arguments, local_files_only=local_files_only, **others)

    monkeypatch.setattr(checkpoints, "snapshot_download", look)
    edit(model, tokenizer).save(tmp_path / "out")
    assert asked == [True]
    assert_saved(tmp_path / "out", model, tokenizer)
    assert record_of(tmp_path / "out")["weights_reason"] == "there is no checkpoint at no/such-model on this machine"


def test_a_source_that_is_gone_or_another_model(tmp_path, source, tokenizer):
    model = loaded(source)
    result = edit(model, tokenizer)
    other = save_toy(tmp_path / "other", toy_model("llama", seed=1), tokenizer)
    gpt2 = save_toy(tmp_path / "gpt2", toy_model("gpt2"), tokenizer)
    for name, given, reason in (("a", other, "the weights differ"), ("b", gpt2, "the config differs")):
        result.save(tmp_path / name, source=given)
        assert_saved(tmp_path / name, model, tokenizer)
        assert record_of(tmp_path / name)["weights_reason"].startswith(f"{reason} from th")
    shutil.rmtree(source)
    result.save(tmp_path / "c")
    assert_saved(tmp_path / "c", model, tokenizer)
    assert record_of(tmp_path / "c")["weights_reason"] == f"there is no checkpoint at {source} on this machine"
    with pytest.raises(CheckpointError, match=r"model: .*nowhere is neither a directory"):
        result.save(tmp_path / "d", source=tmp_path / "nowhere")


def test_one_changed_bit_anywhere_is_noticed(tmp_path, source, tokenizer):
    model = loaded(source)
    result = edit(model, tokenizer)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight.view(torch.int32)[3] ^= 1
    result.save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    assert record_of(tmp_path / "out")["weights_reason"].endswith(": model.norm.weight")


def test_a_config_and_settings_of_generation_that_were_changed(tmp_path, source, tokenizer):
    """Those of generation are a file of their own; they may contradict each other, which save_pretrained refuses."""
    model = loaded(source)
    result = edit(model, tokenizer)
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, False
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "refused")
    result.save(tmp_path / "copied")
    model.config.initializer_range = 0.5
    result.save(tmp_path / "written")
    assert loaded(tmp_path / "written").config.initializer_range == 0.5
    assert_saved(tmp_path / "written", model, tokenizer)
    for name, weights in (("copied", "source"), ("written", "memory")):
        assert record_of(tmp_path / name)["weights"] == weights
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"] == 0.3
    assert model.generation_config.temperature == 0.3


def test_an_unchanged_model_is_copied_and_its_shards_linked(tmp_path, source, tokenizer):
    model = loaded(source)
    model.generate(**tokenizer("Paris", return_tensors="pt"), max_new_tokens=2, do_sample=True)
    result = edit(model, tokenizer)
    result.save(tmp_path / "out", link="hard")
    assert_saved(tmp_path / "out", model, tokenizer)
    assert record_of(tmp_path / "out")["weights"] == "source"
    shared = [path.name for path in source.glob("model-*") if path.samefile(tmp_path / "out" / path.name)]
    assert len(shared) == len(list(source.glob("model-*"))) - 1
    chains.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("change", ["bos", "template", "none"])
def test_the_tokenizer_that_the_edit_was_made_by_is_saved(change, tmp_path, source, toy_tokenizers):
    """The copy had that of the source, by which a fresh process asked for other tokens than were edited."""
    tokenizer = copy.deepcopy(toy_tokenizers[change != "bos"])
    if change == "template":
        tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    if change == "none":
        for file in source.glob("tokenizer*"):
            file.unlink()
    # What a batch leaves behind is none.
    tokenizer(["Rome", "Rome and Berlin"], padding=True)
    edit(loaded(source), tokenizer).save(tmp_path / "memory")
    edit(source, tokenizer, out=tmp_path / "path")
    for name in ("memory", "path"):
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again(SENTENCES[0])["input_ids"] == tokenizer(SENTENCES[0])["input_ids"]
        assert again.chat_template == tokenizer.chat_template
        assert record_of(tmp_path / name)["weights"] == "source"


def test_another_tokenizer_is_not_left_out_in_place(tmp_path, source, toy_tokenizers):
    """What is there stays there: the edit would be of other tokens than a fresh process asks for."""
    before, own = contents(source), AutoTokenizer.from_pretrained(source)
    other = next(t for t in toy_tokenizers.values() if t("Rome")["input_ids"] != own("Rome")["input_ids"])
    with pytest.raises(ArgumentError, match="which in_place=True leaves there"):
        edit(source, other, in_place=True)
    assert contents(source) == before
    edit(source, own, in_place=True)
    assert contents(source) != before


def test_masks_of_old_checkpoints_are_no_difference(tmp_path, tokenizer):
    """As GPT-2 was published: no prefix, buffers that nothing reads, and no head."""
    source = save_toy(tmp_path / "source", toy_model("gpt2", tie=True), tokenizer)
    path = source / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path, {"format": "pt"})
    model = loaded(source)
    edit(model, tokenizer).save(tmp_path / "out")
    assert record_of(tmp_path / "out")["weights"] == "source"
    assert_saved(tmp_path / "out", model, tokenizer)
    chains.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


# Changed after the edit


def test_a_model_that_was_cast_after_the_edit(tmp_path, source, tokenizer):
    """The weights before the edit are then the cast ones, which is also what revert puts back."""
    model = loaded(source)
    result = edit(model, tokenizer)
    model.to(torch.bfloat16)
    result.save(tmp_path / "out")
    # Rotary frequencies, which are not stored, were cast as well: the weights are compared.
    assert_saved(tmp_path / "out", model, tokenizer, to_logits=False)
    base = loaded(source).to(torch.bfloat16)
    chains.revert(tmp_path / "out")
    assert_saved(tmp_path / "out", base, tokenizer, to_logits=False)
    result.revert()
    assert changed(model, all_bits(base)) == []


def test_save_after_revert_twice_and_inside_the_source(tmp_path, source, tokenizer):
    model = loaded(source)
    result = edit(model, tokenizer)
    with pytest.raises(ArgumentError, match="lies inside the source"):
        result.save(source / "out")
    result.save(tmp_path / "out")
    result.save(tmp_path / "again")
    assert contents(tmp_path / "out", folder=False) == contents(tmp_path / "again", folder=False)
    with pytest.raises(ArgumentError, match="exists already"):
        result.save(tmp_path / "out")
    result.revert()
    with pytest.raises(ArgumentError, match=r"out: the edit was reverted; .*result\.delta\.apply\(model\)"):
        result.save(tmp_path / "reverted")
    result.delta.apply(model)
    result.save(tmp_path / "reverted")
    assert contents(tmp_path / "out", folder=False) == contents(tmp_path / "reverted", folder=False)
    assert record_of(tmp_path / "reverted")["edits"] == [r.to_json() for r in result.records]


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path, source, tokenizer, monkeypatch):
    model, before = loaded(source), all_bits(loaded(source))
    with pytest.raises(ArgumentError, match=r"out: the directory .*no does not exist"):
        apply_edits(source, END, out=tmp_path / "no" / "out", statistics="not looked at")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match=r"writing .*Permission denied"):
        apply_edits(model, END, tokenizer=tokenizer, out=tmp_path / "out", statistics="not looked at")
    assert changed(model, before) == []


def test_adapters_that_are_still_there(tmp_path, tokenizer):
    """save_pretrained would write them alone."""
    model = toy_model("llama")
    result = edit(model, tokenizer)
    model._hf_peft_config_loaded = True  # what model.add_adapter leaves
    with pytest.raises(ModelError, match=r"model: it has adapters, .*merge or unload them first"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Several edits of one model


@pytest.mark.parametrize("layers", [(LAYER, 2), (LAYER, LAYER)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["copied", "written"])
def test_two_edits_are_a_chain(where, dtype, layers, tmp_path, tokenizer):
    """At one layer as at two; the first result need not be kept."""
    model = toy_model("llama", dtype=dtype)
    if where == "copied":
        model = loaded(save_toy(tmp_path / "source", model, tokenizer))
    base = copy.deepcopy(model)
    first = edit(model, tokenizer, END, layer=layers[0])
    records, between = [r.to_json() for r in first.records], copy.deepcopy(model)
    del first
    second = edit(model, tokenizer, MIDDLE, layer=layers[1])
    out = tmp_path / "out"
    second.save(out)
    assert_saved(out, model, tokenizer)
    assert record_of(out, 1)["edits"] == records
    assert record_of(out, 2)["edits"] == [r.to_json() for r in second.records]
    assert [record_of(out, n)["weights"] for n in (1, 2)] == [{"copied": "source", "written": "memory"}[where]] * 2
    again = copy.deepcopy(base)
    for number, wanted in ((1, between), (2, model)):
        Delta.load(out / f"rome_fast/{number:04}/delta.safetensors").apply(again)
        assert changed(again, all_bits(wanted)) == []
    shutil.copytree(out, tmp_path / "all")
    assert chains.revert(out) == [NAME.format(layers[1])]
    assert_saved(out, between, tokenizer)
    assert chains.revert(out) == [NAME.format(layers[0])]
    assert_saved(out, base, tokenizer)
    assert chains.revert(tmp_path / "all", all=True) == sorted({NAME.format(layer) for layer in layers})
    assert contents(tmp_path / "all") == contents(out)
    if where == "copied":
        assert contents(out) == contents(tmp_path / "source")


def test_the_first_result_saves_the_model_with_both_edits(tmp_path, source, tokenizer):
    model = loaded(source)
    first = edit(model, tokenizer, END)
    first.save(tmp_path / "one")
    second = edit(model, tokenizer, MIDDLE)
    first.save(tmp_path / "two")
    assert_saved(tmp_path / "two", model, tokenizer)
    assert len(chains.edits_of(tmp_path / "two")) == 2
    # From the first copy, which holds one of them already.
    second.save(tmp_path / "other", source=tmp_path / "one")
    assert [e.document()["edits"][0]["subject"] for e in chains.edits_of(tmp_path / "other")] == ["Paris", "Istanbul"]
    assert contents(tmp_path / "other", folder=False) == contents(tmp_path / "two", folder=False)
    # And what holds both needs nothing more.
    second.save(tmp_path / "same", source=tmp_path / "two")
    assert contents(tmp_path / "same") == contents(tmp_path / "two")
    second.revert()
    first.save(tmp_path / "left")
    assert contents(tmp_path / "left", folder=False) == contents(tmp_path / "one", folder=False)
    assert len(chains.edits_of(tmp_path / "left")) == 1
    chains.revert(tmp_path / "other", all=True)
    assert contents(tmp_path / "other") == contents(source)


def test_an_edit_of_a_saved_copy_goes_on_with_its_chain(tmp_path, source, tokenizer):
    edit(loaded(source), tokenizer, END).save(tmp_path / "one")
    model = loaded(tmp_path / "one")
    edit(model, tokenizer, MIDDLE).save(tmp_path / "two")
    assert_saved(tmp_path / "two", model, tokenizer)
    assert [edit["place"] for edit in chains.verify(tmp_path / "two")["chain"]] == ["rome_fast/0001", "rome_fast/0002"]
    chains.revert(tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_edit_undone_by_other_means_is_no_part_of_the_chain(tmp_path, source, tokenizer):
    model = loaded(source)
    state = copy.deepcopy(model.state_dict())
    edit(model, tokenizer, END)
    model.load_state_dict(state)
    edit(model, tokenizer, MIDDLE).save(tmp_path / "out")
    assert_saved(tmp_path / "out", model, tokenizer)
    assert len(chains.edits_of(tmp_path / "out")) == 1
    chains.revert(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_originals_are_kept_once_for_a_model_however_often_it_is_edited(tokenizer):
    """One copy of a weight for as long as the model lives, not one for every edit, and none when it is gone."""
    model = toy_model("llama")
    for one in (END, MIDDLE, START):
        edit(model, tokenizer, one)
    applied = applied_to(model)
    assert [list(entry.originals) for entry in applied] == [[NAME.format(LAYER)], [], []]
    count = len(_APPLIED)
    del model, applied
    gc.collect()
    assert len(_APPLIED) < count


# Killed, and a full disk


@forks
def test_kill_9_at_any_moment_of_a_save_from_memory(tmp_path, tokenizer):
    model = toy_model("llama")
    edit(model, tokenizer, END)
    result, out = edit(model, tokenizer, MIDDLE), tmp_path / "out"

    def save():
        result.save(out)

    lines, found = lines_executed(save), {"absent": 0, "new": 0}
    new = contents(out, folder=False)
    shutil.rmtree(out)
    for line in [*range(1, lines + 1, max(1, lines // 6)), lines - 2, lines]:
        assert killed_at_line(save, line) in (0, -signal.SIGKILL)
        found["new" if out.exists() else "absent"] += 1
        if out.exists():
            chains.verify(out)
            assert contents(out, folder=False) == new
            shutil.rmtree(out)
        save()
        assert contents(out, folder=False) == new
        assert os.listdir(tmp_path) == ["out"]
        shutil.rmtree(out)
    assert min(found.values()) > 0


def test_a_disk_that_fills_up_while_memory_is_written(tmp_path, tokenizer, monkeypatch):
    result = edit(toy_model("llama"), tokenizer)

    def fill(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", fill)
        with pytest.raises(CheckpointError, match=r"out: the weights cannot be written \(No space left"):
            result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    result.save(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").names()


def test_what_was_written_otherwise_than_it_is_in_memory_is_not_kept(tmp_path, tokenizer, monkeypatch):
    model = toy_model("llama")
    result, other = edit(model, tokenizer), toy_model("llama")
    monkeypatch.setattr(saving, "_save_pretrained", lambda _, __, folder: other.save_pretrained(folder))
    with pytest.raises(CheckpointError, match=r"down_proj.weight would not be stored as in memory"):
        result.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Read by others


def read_in_name_order(directory: Path) -> dict[str, torch.Tensor]:
    """As loaders do that take every *.safetensors of a folder: a later file's tensors replace those of an earlier."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    return state


@pytest.mark.parametrize("where", ["copied", "written", "in place"])
def test_a_loader_of_every_file_reads_the_edited_model(where, tmp_path, source, tokenizer):
    out = tmp_path / "out"
    if where == "in place":
        out = source
        usual = {"statistics": "identity", "layer": LAYER, "settings": QUICK, "guard": "off", "unconverged": "write"}
        model = apply_edits(source, END, contexts=["It is. "], measure=False, in_place=True, **usual).model
    else:
        model = loaded(source) if where == "copied" else toy_model("llama")
        edit(model, tokenizer).save(out)
    state = read_in_name_order(out)
    assert {name: bits(t).tolist() for name, t in state.items()} == {
        name: bits(t).tolist() for name, t in model.state_dict().items()
    }
    assert sorted(path.name for path in (out / "rome_fast" / "0001").iterdir()) == [
        "delta.safetensors",
        "originals.safetensors",
        "record.json",
    ]
