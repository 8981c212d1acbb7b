"""A Delta: applied to the byte, taken back to the byte, saved, merged and exported."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from helpers import (
    CONTEXTS,
    END,
    FORWARD,
    LAYER,
    MIDDLE,
    START,
    all_bits,
    bits,
    changed,
    delta_w,
    edited,
    relative_error,
    rounding,
)
from rome_fast import Delta
from rome_fast.errors import ArgumentError, CheckpointError
from rome_fast.evaluation import evaluate
from rome_fast.updates.delta import AdapterWarning, LowRank
from rome_fast.updates.truncation import truncated
from toys import D_FF, HIDDEN, SENTENCES, toy_model

NAMES = {
    "llama": "model.layers.{}.mlp.down_proj.weight",
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "gptj": "transformer.h.{}.mlp.fc_out.weight",
}
KINDS = [("llama", True), ("gpt2", False), ("gptj", False)]


def random_delta(kind, rank=2, layers=(LAYER,), scale=0.1):
    return Delta(
        {
            NAMES[kind].format(layer): LowRank(scale * torch.randn(HIDDEN, rank), torch.randn(rank, D_FF))
            for layer in layers
        },
        {"method": "c-rome"},
    )


def weight_of(model, layer=LAYER):
    """(d, d_ff) float64"""
    return oracle.weight_and_bias(model, layer)[0].detach().double()


@pytest.mark.parametrize("kind", NAMES)
def test_apply_adds_the_product_to_the_weight_in_its_orientation(kind):
    model = toy_model(kind)
    before, pristine, delta = weight_of(model), all_bits(model), random_delta(kind, layers=(0, 2))
    delta.apply(model)
    assert changed(model, pristine) == [NAMES[kind].format(0), NAMES[kind].format(2)]
    assert relative_error(weight_of(model), before) == 0
    for layer in (0, 2):
        update = delta.updates[NAMES[kind].format(layer)]
        before, added = weight_of(toy_model(kind), layer), update.left.double() @ update.right.double()
        # Products and sums of rank + 1 terms, each rounded to fp32.
        terms = before.abs() + update.left.double().abs() @ update.right.double().abs()
        off = (weight_of(model, layer) - before - added).abs()
        assert bool((off <= (update.left.shape[1] + 2) * 2**-24 * terms).all())
        assert torch.equal(update.dense(), update.left @ update.right)
        assert torch.equal(bits(delta.originals[NAMES[kind].format(layer)]), pristine[NAMES[kind].format(layer)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", NAMES)
def test_revert_restores_every_bit(kind, dtype):
    model = toy_model(kind, dtype=dtype)
    # Subtracting the product again would turn -0.0 into 0.0, and round everything else.
    with torch.no_grad():
        model.get_parameter(NAMES[kind].format(LAYER))[0, :2] = torch.tensor([-0.0, 1e-7])
    before = all_bits(model)
    delta = random_delta(kind, scale=10.0)
    delta.apply(model)
    assert changed(model, before) == [NAMES[kind].format(LAYER)]
    delta.revert(model)
    assert changed(model, before) == []
    assert not delta.is_applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bos"), KINDS)
def test_a_saved_delta_gives_the_bytes_of_the_edit_itself(kind, bos, dtype, tmp_path, toy_tokenizers):
    model = toy_model(kind, dtype=dtype)
    result = edited(model, toy_tokenizers[bos], [START, MIDDLE, END])
    result.delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert json.loads(loaded.metadata.pop("contexts")) == list(CONTEXTS)
    assert loaded.metadata == {"method": "c-rome", "layers": "[1]", "model_type": kind}
    assert not loaded.is_applied
    other = toy_model(kind, dtype=dtype)
    loaded.apply(other)
    assert changed(other, all_bits(model)) == []


def test_a_float64_delta_is_saved_as_it_is(tmp_path):
    delta = Delta({"w": LowRank(torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64).T.T)})
    delta.save(tmp_path / "delta.safetensors")
    (update,) = Delta.load(tmp_path / "delta.safetensors").updates.values()
    assert torch.equal(update.left, delta.updates["w"].left)
    assert torch.equal(update.right, delta.updates["w"].right)


def test_a_delta_is_applied_once():
    model, delta = toy_model("llama"), random_delta("llama")
    delta.apply(model)
    before = all_bits(model)
    with pytest.raises(ArgumentError, match="delta: it is applied already; revert it before applying it again"):
        delta.apply(model)
    assert changed(model, before) == []


def test_a_delta_is_printed_in_a_line():
    """As a notebook shows it: no weights."""
    delta = random_delta("llama", layers=(0, 2))
    names = [NAMES["llama"].format(layer) for layer in (0, 2)]
    assert repr(delta) == f"Delta({names[0]}: rank 2, {names[1]}: rank 2, not applied)"
    delta.apply(toy_model("llama"))
    assert repr(delta).endswith(", applied)")


def test_a_delta_that_is_not_applied_cannot_be_reverted():
    model, delta = toy_model("llama"), random_delta("llama")
    with pytest.raises(ArgumentError, match="delta: it is not applied to any model"):
        delta.revert(model)
    delta.apply(model)
    delta.revert(model)
    with pytest.raises(ArgumentError, match="delta: it is not applied to any model"):
        delta.revert(model)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[3, 5].mul_(1 + 2**-20),
        lambda weight: weight[0, 0].neg_(),
        lambda weight: weight.copy_(weight.flip(0)),
        lambda weight: weight.copy_(weight.flip(1)),
    ],
    ids=["one bit", "one sign", "rows swapped", "columns swapped"],
)
def test_revert_is_refused_when_the_weight_changed_since(kind, change):
    model, delta = toy_model(kind), random_delta(kind)
    delta.apply(model)
    with torch.no_grad():
        change(model.get_parameter(NAMES[kind].format(LAYER)))
    before = all_bits(model)
    with pytest.raises(ArgumentError, match=r"mlp\..*weight was changed after this delta was applied"):
        delta.revert(model)
    assert changed(model, before) == []
    assert delta.is_applied


def test_a_revert_that_is_refused_for_one_weight_restores_none():
    model, delta = toy_model("llama"), random_delta("llama", layers=(0, 1, 2))
    delta.apply(model)
    with torch.no_grad():
        model.get_parameter(NAMES["llama"].format(2))[0, 0] += 1
    before = all_bits(model)
    with pytest.raises(ArgumentError, match=r"layers\.2\.mlp"):
        delta.revert(model)
    assert changed(model, before) == []


def test_of_two_deltas_the_last_one_is_reverted_first():
    model = toy_model("gpt2", dtype=torch.bfloat16)
    pristine = all_bits(model)
    first, second = random_delta("gpt2"), random_delta("gpt2")
    first.apply(model)
    between = all_bits(model)
    second.apply(model)
    with pytest.raises(ArgumentError, match="revert the later edits first"):
        first.revert(model)
    second.revert(model)
    assert changed(model, between) == []
    first.revert(model)
    assert changed(model, pristine) == []


def test_deltas_of_different_layers_are_reverted_in_any_order():
    model = toy_model("gpt2")
    pristine = all_bits(model)
    first, second = random_delta("gpt2", layers=(0,)), random_delta("gpt2", layers=(3,))
    first.apply(model)
    second.apply(model)
    first.revert(model)
    second.revert(model)
    assert changed(model, pristine) == []


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (lambda: random_delta("gpt2"), r"the model has no parameter transformer\.h\.1\.mlp\.c_proj\.weight"),
        (
            lambda: Delta({NAMES["llama"].format(1): LowRank(torch.ones(HIDDEN + 1, 1), torch.ones(1, D_FF))}),
            rf"has shape \({HIDDEN}, {D_FF}\), wanted \({HIDDEN + 1}, {D_FF}\); it was made for another model",
        ),
        (
            lambda: Delta(
                {NAMES["llama"].format(1): LowRank(torch.full((HIDDEN, 1), 1e38), torch.full((1, D_FF), 9.0))}
            ),
            r"would contain NaN or infinity in torch\.float32; nothing was written",
        ),
    ],
    ids=["another family", "another shape", "overflow"],
)
def test_a_delta_that_does_not_fit_changes_nothing(delta, message):
    """Even where another of its updates fits."""
    model, delta = toy_model("llama"), delta()
    before = all_bits(model)
    both = Delta({**random_delta("llama", layers=(0,)).updates, **delta.updates})
    with pytest.raises(ArgumentError, match=message):
        both.apply(model)
    assert changed(model, before) == []
    assert not both.is_applied


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.ones(3, 2), torch.ones(1, 5)),
        (torch.ones(3), torch.ones(1, 5)),
        (torch.ones(3, 1), torch.ones(1, 5).double()),
        (torch.ones(3, 1).half(), torch.ones(1, 5).half()),
    ],
    ids=["ranks", "dimensions", "dtypes", "narrow dtype"],
)
def test_factors_that_do_not_fit_together(left, right):
    with pytest.raises(ArgumentError, match=r"delta: got factors torch.*wanted \(d, r\) and \(r, d_ff\) in float32"):
        LowRank(left, right)


def test_an_update_that_fits_float32_but_not_float16_changes_nothing():
    model = toy_model("llama", dtype=torch.float16)
    before = all_bits(model)
    with pytest.raises(ArgumentError, match=r"would contain NaN or infinity in torch\.float16"):
        random_delta("llama", scale=1e6).apply(model)
    assert changed(model, before) == []


def test_edited_gives_the_weights_and_leaves_the_model():
    model, delta = toy_model("gpt2", dtype=torch.bfloat16), random_delta("gpt2")
    before = all_bits(model)
    edited_weights = delta.edited(model)
    assert changed(model, before) == []
    delta.apply(model)
    assert {name: bits(w).tolist() for name, w in edited_weights.items()} == {
        name: bits(model.get_parameter(name)).tolist() for name in delta.updates
    }


# Which weights it belongs to


def small_delta(kind="llama", layers=(LAYER,)):
    """An update of a hundredth of the weight, as edits are."""
    return random_delta(kind, rank=1, layers=layers, scale=0.002)


def used(delta, model):
    """The Delta as it is read from a file, after it was applied to a model and taken back."""
    delta.apply(model)
    delta.revert(model)
    return Delta(delta.updates, delta.metadata, delta.samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", NAMES)
def test_a_delta_is_not_applied_twice(kind, dtype, tmp_path):
    """Neither the object nor one from its file; also where the edited model was cast."""
    model, delta = toy_model(kind), small_delta(kind)
    delta.apply(model)
    delta.save(tmp_path / "delta.safetensors")
    model = model.to(dtype)
    before, again = all_bits(model), Delta.load(tmp_path / "delta.safetensors")
    for attempt in (again.apply, again.edited):
        with pytest.raises(ArgumentError, match=r"mlp\..*weight has this very update in it already, .* or force it"):
            attempt(model)
    assert changed(model, before) == []
    again.apply(model, force=True)
    assert changed(model, before) == [NAMES[kind].format(LAYER)]
    # On unedited weights of any dtype it is what it was made for.
    cast = toy_model(kind).to(dtype)
    Delta.load(tmp_path / "delta.safetensors").apply(cast)
    assert changed(cast, all_bits(toy_model(kind).to(dtype))) == [NAMES[kind].format(LAYER)]


def scaled(model):
    with torch.no_grad():
        model.get_parameter(NAMES["llama"].format(LAYER)).mul_(1.02)
    return model


def edited_otherwise(model):
    random_delta("llama", rank=1, scale=0.02).apply(model)
    return model


def with_adapter(model):
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).merge_and_unload()


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda _: toy_model("llama", seed=1), scaled, edited_otherwise, with_adapter])
def test_weights_that_a_delta_was_not_made_for(change, made_in):
    delta = used(small_delta(), toy_model("llama", dtype=made_in))
    model = change(toy_model("llama"))
    before = all_bits(model)
    with pytest.raises(ArgumentError, match=r"down_proj\.weight is not the weight that it was made for: .*force it"):
        delta.apply(model)
    assert changed(model, before) == []
    delta.apply(model, force=True)
    delta.revert(model)
    assert changed(model, before) == []


def test_a_delta_without_samples_is_accepted(tmp_path):
    """One made by hand, and files from before there were samples."""
    Delta(small_delta().updates).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta.samples == {}
    delta.apply(toy_model("llama", seed=3))


@pytest.mark.parametrize("on_top", [False, True])
def test_a_merged_delta_belongs_to_the_weights_below_both(on_top):
    """Whether the second was made on those as well, or on what the first one left."""
    model, first, second = toy_model("llama"), small_delta(layers=(0, LAYER)), small_delta()
    first.apply(model)
    if not on_top:
        first.revert(model)
    second.apply(model)
    merged = Delta(first.updates, {}, first.samples).merge(Delta(second.updates, {}, second.samples))
    fresh = toy_model("llama")
    merged.apply(fresh)
    with pytest.raises(ArgumentError, match="has this very update in it already"):
        Delta(merged.updates, {}, merged.samples).apply(fresh)
    with pytest.raises(ArgumentError, match="is not the weight that it was made for"):
        Delta(merged.updates, {}, merged.samples).apply(toy_model("llama", seed=1))
    # With a hand-made one, nobody knows.
    assert list(first.merge(Delta(small_delta().updates)).samples) == [NAMES["llama"].format(0)]


def test_the_delta_of_sequential_edits_belongs_to_the_unedited_model(toy_tokenizers, tmp_path):
    model = toy_model("gpt2")
    result = edited(model, toy_tokenizers[False], [START, MIDDLE, END], schedule="sequential")
    result.delta.save(tmp_path / "delta.safetensors")
    fresh = toy_model("gpt2")
    Delta.load(tmp_path / "delta.safetensors").apply(fresh)
    assert changed(fresh, all_bits(model)) == []
    with pytest.raises(ArgumentError, match="has this very update in it already"):
        Delta.load(tmp_path / "delta.safetensors").apply(fresh)


def test_isolated_evaluation_asks_the_same(toy_tokenizers):
    """Each row's update is added to the model's weights, which must not have it."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    result = edited(model, tokenizer, END)
    with pytest.raises(ArgumentError, match="has this very update in it already"):
        evaluate(model, tokenizer, [END], deltas=[result.delta])
    result.revert()
    (alone,) = evaluate(model, tokenizer, [END], deltas=[result.delta])
    result.delta.apply(model)
    (applied,) = evaluate(model, tokenizer, [END])
    # Sums of fp32 in another order; 1e-4 of a probability is far below what an edit changes.
    assert alone.probability == pytest.approx(applied.probability, rel=1e-4)


def test_weights_that_nothing_can_be_added_to():
    model, name = toy_model("llama"), NAMES["llama"].format(LAYER)
    adapters = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ArgumentError, match=r"has no parameter .*; merge its adapters first \(merge_and_unload\)"):
        small_delta().apply(adapters)
    module = model.get_submodule(name.removesuffix(".weight"))
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ArgumentError, match=r"has dtype torch\.int8, wanted .*load the model without quantisation"):
        small_delta().apply(model)
    with pytest.raises(ArgumentError, match="is not in memory"):
        small_delta().apply(toy_model("llama").to("meta"))
    with pytest.raises(ArgumentError, match="it was made for another model"):
        random_delta("gpt2").to_lora("never", toy_model("llama"))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"w": 1}',
        '{"w": {"rows": [], "columns": [], "before": []}}',
        '{"w": {"rows": [-1], "columns": [0], "before": [1]}}',
    ],
)
def test_a_fingerprint_that_is_damaged(text, tmp_path):
    path = saved(tmp_path / "delta.safetensors")
    save_file(load_file(path), path, {"format": "rome_fast delta 1", "fingerprint": text})
    with pytest.raises(CheckpointError, match="not a delta"):
        Delta.load(path)


def test_merge_is_the_sum_and_rounds_once():
    """Applied one by one to bf16, two updates of half a unit each are lost; merged, they are one unit."""
    model = toy_model("llama", dtype=torch.bfloat16)
    name = NAMES["llama"].format(LAYER)
    with torch.no_grad():
        model.get_parameter(name).fill_(1.0)
    # The step of bf16 above 1 is 2⁻⁷, and ties go to the even 1.
    half = Delta({name: LowRank(torch.full((HIDDEN, 1), 2.0**-8), torch.ones(1, D_FF))}, {"a": "1"})
    other = Delta({name: LowRank(torch.full((HIDDEN, 1), 2.0**-8), torch.ones(1, D_FF))}, {"b": "2"})
    merged = half.merge(other)
    assert merged.metadata == {"a": "1", "b": "2"}
    assert merged.updates[name].left.shape == (HIDDEN, 2)
    merged.apply(model)
    assert bool((model.get_parameter(name) == 1 + 2.0**-7).all())
    merged.revert(model)
    half.apply(model)
    other.apply(model)
    assert bool((model.get_parameter(name) == 1.0).all())


def test_merge_of_different_weights_and_ranks():
    one, two = random_delta("llama", rank=1, layers=(0, 1)), random_delta("llama", rank=3, layers=(1, 2))
    merged = one.merge(two)
    for layer, parts in {0: [one], 1: [one, two], 2: [two]}.items():
        name = NAMES["llama"].format(layer)
        wanted = sum(part.updates[name].dense() for part in parts)
        assert relative_error(merged.updates[name].dense(), wanted) < rounding(torch.float32, 2 * 4)
    assert set(one.updates) == {NAMES["llama"].format(layer) for layer in (0, 1)}
    assert one.updates[NAMES["llama"].format(1)].left.shape[1] == 1


# PEFT


def adapted(model, directory):
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()


def logits(model, tokenizer):
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0] for text in SENTENCES[:3]])


@pytest.mark.parametrize("count", [1, 3], ids=["rank 1", "rank 3"])
@pytest.mark.parametrize(("kind", "bos"), KINDS)
def test_peft_reads_the_adapter_and_gives_the_logits_of_the_edited_model(kind, bos, count, tmp_path, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    pristine = copy.deepcopy(model)
    result = edited(model, tokenizer, [MIDDLE, END, START][:count])
    result.delta.to_lora(tmp_path / "adapter", model)
    lora = adapted(pristine, tmp_path / "adapter")

    unedited, wanted, got = (logits(m, tokenizer) for m in (pristine, model, lora))
    change = float((wanted - unedited).abs().max())
    assert change > 0.1
    # A low-rank product is added behind the weight's, and not to the weight.
    assert float((got - wanted).abs().max()) < rounding(torch.float32, FORWARD) * float(wanted.abs().max())
    assert relative_error(logits(lora.merge_and_unload(), tokenizer), wanted) < rounding(torch.float32, FORWARD)


def test_an_adapter_of_a_second_edit_says_that_the_first_is_not_in_it(tmp_path, toy_tokenizers):
    """Put on the base that it names, it gives the second edit alone, which nothing said."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    first, second = (edited(model, tokenizer, each) for each in (END, START))
    first.delta.to_lora(tmp_path / "first", model)
    with pytest.warns(AdapterWarning, match="second belongs to a model with 1 earlier edit"):
        second.delta.to_lora(tmp_path / "second", model)
    second.revert()
    first.revert()
    second.delta.to_lora(tmp_path / "reverted", model)


def test_an_adapter_for_several_layers_of_different_ranks(tmp_path, toy_tokenizers):
    """A rank of its own for each module, and a scale of one for all of them."""
    pristine, tokenizer = toy_model("llama"), toy_tokenizers[True]
    model = copy.deepcopy(pristine)
    delta = random_delta("llama", rank=1, layers=(0, 1)).merge(random_delta("llama", rank=3, layers=(1, 2)))
    delta.apply(model)
    delta.to_lora(tmp_path / "adapter", model)
    got = logits(adapted(pristine, tmp_path / "adapter"), tokenizer)
    assert relative_error(got, logits(model, tokenizer)) < rounding(torch.float32, FORWARD)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) == [1, 3, 4]


def test_peft_reads_an_adapter_of_a_smaller_rank(tmp_path, toy_tokenizers):
    """It gives what the model gives with the product of its factors added to the weight."""
    pristine, tokenizer = toy_model("gpt2"), toy_tokenizers[True]
    delta, (name,) = random_delta("gpt2", rank=4), random_delta("gpt2").updates
    left, right, about = truncated(delta.updates[name].left, delta.updates[name].right, 2, None)
    assert delta.to_lora(tmp_path / "adapter", pristine, rank=2) == {name: about}
    model = copy.deepcopy(pristine)
    Delta({name: LowRank(left, right)}).apply(model)
    wanted, whole = logits(model, tokenizer), copy.deepcopy(pristine)
    delta.apply(whole)
    assert relative_error(logits(adapted(pristine, tmp_path / "adapter"), tokenizer), wanted) < rounding(
        torch.float32, FORWARD
    )
    assert relative_error(logits(whole, tokenizer), wanted) > 0.01


def test_an_adapter_never_replaces_a_directory(tmp_path):
    model, delta = toy_model("llama"), random_delta("llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(ArgumentError, match=r"directory: .*mine exists already; choose another name"):
        delta.to_lora(tmp_path / "mine", model)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["file/adapter", "x" * 300, "dangling"])
def test_an_adapter_that_cannot_be_written(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    update = LowRank(torch.ones(48, 1), torch.ones(1, 80))
    with pytest.raises((ArgumentError, CheckpointError), match=r"exists already|Not a directory|too long"):
        Delta({"model.layers.1.mlp.down_proj.weight": update}).to_lora(tmp_path / name, toy_model("llama"))


def test_an_empty_delta_has_no_adapter(tmp_path):
    with pytest.raises(ArgumentError, match=r"delta: .*(no|empty)"):
        Delta({}).to_lora(tmp_path / "adapter", toy_model("llama"))
    assert not (tmp_path / "adapter").exists()


# Damaged files


def saved(path):
    random_delta("llama").save(path)
    return path


def test_a_truncated_file(tmp_path):
    path = saved(tmp_path / "delta.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"delta\.safetensors"):
        Delta.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        Delta.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: metadata.pop("format"),
        lambda tensors, metadata: metadata.update(format="rome_fast second moment 1"),
        lambda tensors, metadata: tensors.pop(f"{NAMES['llama'].format(LAYER)}.left"),
        lambda tensors, metadata: tensors.update(weight=torch.ones(2)),
        lambda tensors, metadata: tensors.update({f"{NAMES['llama'].format(LAYER)}.left": torch.ones(HIDDEN)}),
        lambda tensors, metadata: tensors.update({f"{NAMES['llama'].format(LAYER)}.left": torch.ones(HIDDEN, 5)}),
        lambda tensors, metadata: tensors.update(
            {f"{NAMES['llama'].format(LAYER)}.left": torch.ones(HIDDEN, 2, dtype=torch.int32)}
        ),
    ],
    ids=["no format", "another format", "half a pair", "another tensor", "one dimension", "ranks differ", "integers"],
)
def test_a_file_that_is_not_a_delta(change, tmp_path):
    path = saved(tmp_path / "delta.safetensors")
    tensors, metadata = load_file(path), {"format": "rome_fast delta 1"}
    change(tensors, metadata)
    save_file(tensors, path, metadata or None)
    with pytest.raises(CheckpointError, match=r"delta: .*delta\.safetensors is .*not a delta"):
        Delta.load(path)


def test_delta_w_of_the_helpers_is_the_product():
    delta = random_delta("llama")
    assert relative_error(next(iter(delta.updates.values())).dense(), delta_w(delta)) < rounding(torch.float32, 2)
