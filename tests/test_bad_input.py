"""Every wrong input to apply_edits ends in one RomeFastError that says what to do, before anything is written.

What the parts refuse on their own is tested with them: edits files in test_edits, statistics in test_statistics,
checkpoints in test_checkpoints and test_cli.
"""

import copy
import re
import warnings
from functools import partial
from types import SimpleNamespace

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import CONTEXTS, END, MIDDLE, SETTINGS, all_bits, changed, delta_w, edited
from rome_fast import Edit, RomeFastError, ValueSettings, apply_edits, collect_statistics, plan
from rome_fast.errors import ArgumentError, CheckpointError, EditError, ModelError, StatisticsError
from rome_fast.evaluation import evaluate
from toys import LAYERS, SENTENCES, save_toy, toy_model, toy_tokenizer

LONG = " ".join(SENTENCES)


def assert_refused(error, message, model, tokenizer, edits=END, **arguments):
    """`error` says `message`, in a line or a few, and no weight has changed."""
    before = all_bits(model)
    with pytest.raises(RomeFastError, match=message) as caught:
        edited(model, tokenizer, edits, **arguments)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 1000
    assert changed(model, before) == []
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"method": "memoir"},
            ArgumentError,
            "method: got 'memoir', wanted one of rome, c-rome-released, c-rome, p-rome",
        ),
        ({"method": None}, ArgumentError, "method: got None, wanted one of"),
        ({"method": ["rome"]}, ArgumentError, r"method: got \['rome'\], wanted one of"),
        ({"guard": "ask"}, ArgumentError, "guard: got 'ask', wanted one of raise, warn, skip, off"),
        ({"guard": None}, ArgumentError, "guard: got None, wanted one of"),
        ({"schedule": "both"}, ArgumentError, "schedule: got 'both', wanted 'joint' or 'sequential'"),
        ({"unconverged": "ask"}, ArgumentError, "unconverged: got 'ask', wanted one of skip, write, raise"),
        ({"layer": LAYERS}, ArgumentError, rf"layer: got {LAYERS}, wanted one of 0 \.\. {LAYERS - 1}"),
        ({"layer": -1}, ArgumentError, r"layer: got -1, wanted one of 0 \.\. 3"),
        ({"layer": 1.0}, ArgumentError, r"layer: got 1\.0, wanted one of 0 \.\. 3"),
        ({"layer": "1"}, ArgumentError, r"layer: got '1', wanted one of 0 \.\. 3"),
        ({"layer": True}, ArgumentError, r"layer: got True, wanted one of 0 \.\. 3"),
        ({"edits": []}, ArgumentError, "edits: got none, wanted at least one"),
        ({"edits": "edits.jsonl"}, ArgumentError, "edits: got .*str.*, wanted .*Edit.*load_edits"),
        ({"edits": [{"prompt": "{} is", "subject": "a"}]}, ArgumentError, "edits: got .*dict.*, wanted .*Edit"),
        ({"edits": [END, None]}, ArgumentError, "edits: got .*NoneType.*, wanted .*Edit"),
        (
            {"edits": [END, MIDDLE, Edit(END.prompt, END.subject, "Vienna")]},
            EditError,
            r"edits\[0\] and edits\[2\] ask for .*'Rome, the old capital' and -> 'Vienna'; keep one",
        ),
        ({"edits": [END, END]}, EditError, r"edits\[0\] and edits\[1\] both ask for .*drop one"),
        ({"contexts": []}, ArgumentError, r"contexts: got none, wanted texts .* as 'It rained\. '"),
        (
            {"contexts": ["It rained."]},
            ArgumentError,
            r"contexts: got \['It rained\.'\], wanted texts .*end in a space",
        ),
        ({"contexts": ["It rained. ", ""]}, ArgumentError, r"contexts: got \[''\], wanted texts that are not empty"),
        ({"contexts": ["   "]}, ArgumentError, r"contexts: got \['   '\]"),
        ({"contexts": [None]}, ArgumentError, r"contexts: got \[None\]"),
        ({"contexts": "It rained. "}, ArgumentError, r"contexts: got 'It rained\. ', wanted texts .* as \['It rained"),
        ({"contexts": 5}, ArgumentError, "contexts: got 5, wanted texts"),
        ({"contexts": None, "seed": "x"}, ArgumentError, "seed: got 'x', wanted a whole number"),
        ({"contexts": None, "seed": 2**64}, ArgumentError, "seed: got 18446744073709551616, wanted a whole number"),
        ({"contexts": [LONG + " "]}, EditError, r"subject 'Paris': got \d+ tokens .*at most the 256 .*shorten"),
        ({"edits": Edit(LONG + " {} is", "Paris and", "Rome")}, EditError, r"got \d+ tokens .*at most the 256"),
        ({"edits": Edit("{} is", "Paris", LONG)}, EditError, r"got \d+ tokens .*at most the 256"),
        ({"statistics": "none"}, ArgumentError, "statistics: got 'none', wanted a Statistics, 'identity' or None"),
        (
            {"statistics": torch.eye(80)},
            StatisticsError,
            r"statistics: got Tensor, .*collect_statistics\(.*layers=\[1\]",
        ),
        ({"statistics": {}}, StatisticsError, "statistics: got dict, wanted a Statistics"),
        ({"statistics": None}, StatisticsError, "(?s)none for layer 1 .*rome-fast statistics .*'identity'"),
        ({"tokenizer": None}, ArgumentError, "tokenizer: got None, wanted the model's tokenizer"),
        ({"tokenizer": SimpleNamespace(is_fast=False)}, ModelError, "tokenizer: got SimpleNamespace without character"),
        (
            {"settings": [3]},
            ArgumentError,
            "settings: got list, wanted .*ValueSettings, a mapping of some",
        ),
        ({"settings": {"decay": 3}}, ArgumentError, "settings: got decay, wanted some of steps, .*weight_decay"),
        ({"settings": {"steps": 0}}, ArgumentError, "settings: got steps 0"),
        ({"batch_size": 0, "schedule": "sequential"}, ArgumentError, "batch_size: got 0, wanted at least 1"),
    ],
)
def test_arguments(arguments, error, message, empty_cache, toy_tokenizers):
    arguments = {"tokenizer": toy_tokenizers[False], "edits": END, "measure": True, **arguments}
    assert_refused(error, message, toy_model("gpt2"), **arguments)


# The model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.3.attn.c_attn.bias"])
def test_weights_that_are_not_finite(name, dtype, value, toy_tokenizers):
    model = toy_model("gpt2", dtype=dtype)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    message = rf"model: {name.replace('.', '[.]')} contains NaN or infinity; load an undamaged checkpoint"
    assert_refused(ModelError, message, model, toy_tokenizers[False])


def test_infinities_that_cancel_are_found(toy_tokenizers):
    model = toy_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[-1, :2] = torch.tensor([float("inf"), float("-inf")])
    assert_refused(ModelError, "wpe.weight contains NaN or infinity", model, toy_tokenizers[False])


def test_large_finite_weights_are_not_taken_for_infinite(toy_tokenizers):
    """Their sum overflows, they do not."""
    model = toy_model("gpt2", dtype=torch.float16)
    with torch.no_grad():
        model.transformer.wpe.weight[-3:] = 6e4
    assert edited(model, toy_tokenizers[False], END).records[0].applied


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2)], ids=["None", "a number", "a module"])
def test_what_is_no_model(model, tmp_path, toy_tokenizers):
    for out in (None, tmp_path / "out"):
        with pytest.raises(RomeFastError, match=r"model: got .*, wanted"):
            edited(model, toy_tokenizers[False], END, out=out)
    with pytest.raises(ModelError, match=r"model: got .*, wanted a transformers PreTrainedModel"):
        collect_statistics(model, toy_tokenizers[False], SENTENCES, [1])
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_needs_a_place_to_go(tmp_path, toy_tokenizers):
    for place in (tmp_path, str(tmp_path)):
        with pytest.raises(ArgumentError, match="out: got None, wanted a new directory, since the model is a check"):
            apply_edits(place, END)


def test_weights_in_eight_bits(toy_tokenizers):
    model = toy_model("llama")
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert_refused(
        ModelError,
        r"layers.1.mlp.down_proj.weight has dtype torch.float8_e4m3fn, wanted .*bfloat16.*without quantisation",
        model,
        toy_tokenizers[False],
    )


def test_a_tokenizer_of_another_model(toy_tokenizers):
    """Ids beyond the embedding were an IndexError of torch."""
    model = toy_model("gpt2")
    model.resize_token_embeddings(300)
    assert_refused(
        ModelError, r"tokenizer: got token \d+, wanted ids below the model's 300", model, toy_tokenizers[False]
    )


# The requests' texts


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            Edit("{} is in", "Paris", "~"),
            "target '~': got no token from the tokenizer that continues 'Paris is in' by it, wanted at least one",
        ),
        (Edit("{} is in", "~", "Rome"), "subject '~': got no token from the tokenizer"),
    ],
    ids=["target", "subject"],
)
def test_texts_without_a_token(edit, message, bos):
    """The tokenizer drops every ~ and, where it stood alone, the blank before it."""
    tokenizer = toy_tokenizer(bos)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ~", ""), normalizers.Replace("~", "")]
    )
    assert_refused(EditError, message, toy_model("gpt2"), tokenizer, edit)
    # And among others that are fine.
    assert_refused(EditError, message, toy_model("gpt2"), tokenizer, [END, edit, MIDDLE])


def test_a_fault_in_a_later_batch_of_a_sequence_leaves_no_earlier_edit(toy_tokenizers):
    long = Edit("{} is", "Rome", LONG)
    assert_refused(
        EditError, "at most the 256", toy_model("gpt2"), toy_tokenizers[False], [END, long], schedule="sequential"
    )


def test_an_interrupt_leaves_the_model_as_it_was(toy_tokenizers):
    model = toy_model("gpt2").train()
    before = all_bits(model)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edited(model, toy_tokenizers[False], [END, MIDDLE], schedule="sequential", progress=stop)
    assert changed(model, before) == []
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_contexts_may_be_any_sequence(toy_tokenizers):
    model = toy_model("gpt2")
    for contexts in (list(CONTEXTS), CONTEXTS, iter(CONTEXTS)):
        assert edited(copy.deepcopy(model), toy_tokenizers[False], END, contexts=contexts).contexts == CONTEXTS


def test_a_model_of_no_checkpoint_is_saved_from_memory(tmp_path, monkeypatch):
    """Its empty name resolved to the current directory, which then was the checkpoint that was copied."""
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    save_toy(tmp_path / "here", toy_model("llama", seed=1), tokenizer)
    monkeypatch.chdir(tmp_path / "here")
    assert not model.config._name_or_path
    edited(model, tokenizer, MIDDLE, out=tmp_path / "out")
    assert changed(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), all_bits(model)) == []


def test_an_attention_that_takes_no_mask_is_refused(toy_tokenizers):
    model = toy_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"got attn_implementation .flash_attention_2., wanted .sdpa. or .eager.; "):
        edited(model, toy_tokenizers[False], END)


# Models as they come


def test_modes_of_torch_around_a_call_change_nothing(toy_tokenizers):
    """Gradients were missing in some of them, products in another dtype in others."""
    tokenizer = toy_tokenizers[False]

    def figures(model):
        result = edited(model, tokenizer, MIDDLE, measure=True)
        bits_after = all_bits(model)
        metrics = evaluate(model, tokenizer, [MIDDLE], CONTEXTS)
        result.revert()
        moment = collect_statistics(model, tokenizer, SENTENCES[:2], [1], 40).layers[1].moment
        return delta_w(result), result.records, metrics, bits_after, moment

    wanted = figures(toy_model("llama"))
    modes = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "no gradients at all": torch.set_grad_enabled(False),
    }
    for name, mode in modes.items():
        torch.set_grad_enabled(True)
        model = toy_model("llama")
        before = all_bits(model)
        with mode:
            found = figures(model)
        assert torch.equal(found[0], wanted[0]), name
        assert found[1:3] == wanted[1:3], name
        assert all(torch.equal(found[3][key], wanted[3][key]) for key in wanted[3]), name
        assert torch.equal(found[4], wanted[4]), name
        assert changed(model, before) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing_and_is_kept(dtype, toy_tokenizers):
    wanted = delta_w(edited(toy_model("llama"), toy_tokenizers[False], MIDDLE))
    model = toy_model("llama")
    torch.set_default_dtype(dtype)
    try:
        found = delta_w(edited(model, toy_tokenizers[False], MIDDLE))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


# Earlier releases of transformers know no other name.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_a_model_that_is_being_trained_is_edited_as_if_it_were_not(toy_tokenizers):
    """Dropout has no part in the edit, checkpointing none in its cost; flags are as they were."""
    tokenizer = toy_tokenizers[False]
    wanted = delta_w(edited(toy_model("gpt2"), tokenizer, MIDDLE))
    model = toy_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    model.gradient_checkpointing_enable()
    model.requires_grad_(False)
    model.transformer.ln_f.weight.requires_grad_(True)
    model.transformer.h[0].eval()
    assert torch.equal(delta_w(edited(model, tokenizer, MIDDLE)), wanted)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["transformer.ln_f.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert model.is_gradient_checkpointing
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].training


class _Int8(torch.nn.Module):
    """As bitsandbytes keeps a linear layer: whole numbers and their scale."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter((linear.weight.detach() * 100).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 100).T


class _Packed(torch.nn.Module):
    """As GPTQ keeps one: buffers alone."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class _Sharded(torch.Tensor):
    """As a DTensor is: a tensor that is more than its numbers."""


def _with(where, made):
    model = toy_model("llama")
    parent = model.get_submodule(f"model.layers.{where}.mlp")
    parent.down_proj = made(parent.down_proj)
    return model


def _pruned(linear):
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


def _subclassed(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(_Sharded))
    return linear


def _of_meta(linear):
    return linear.to("meta")


def _inferred():
    with torch.inference_mode():
        return toy_model("llama")


def _adapted():
    return get_peft_model(toy_model("llama"), LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))


def _dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(toy_model("llama"), {torch.nn.Linear}, dtype=torch.qint8)


def _encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=600, **sizes))


class FullyShardedDataParallel(torch.nn.Module):
    """Of its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


NO_MODELS = {
    "int8": (
        lambda: _with(1, _Int8),
        r"layers\.1\.mlp\.down_proj\.weight has dtype torch\.int8, wanted .*without quant",
    ),
    "int8 elsewhere": (lambda: _with(3, _Int8), r"layers\.3\.mlp\.down_proj\.weight has dtype torch\.int8, wanted"),
    "gptq": (lambda: _with(0, _Packed), r"layers\.0\.mlp\.down_proj has the quantised weights .*without quantisation"),
    "dynamic": (_dynamic, r"q_proj has the quantised weights of a torch\.ao.*Linear, wanted .*without quantisation"),
    "pruned": (lambda: _with(1, _pruned), r"down_proj\.weight is no parameter .* but computed .*prune\.remove"),
    "weight norm": (lambda: _with(2, weight_norm), r"down_proj\.weight is no parameter .*remove_parametrizations"),
    "subclass": (lambda: _with(1, _subclassed), r"down_proj\.weight is a _Sharded, wanted a plain tensor; load the"),
    "meta": (lambda: _with(2, _of_meta), r"1 of its weights are not in memory \(model\.layers\.2.*memory='8GiB'"),
    "inference": (_inferred, r"embed_tokens\.weight was made inside torch\.inference_mode\(\).*load the model outside"),
    "peft": (_adapted, r"got PeftModelForCausalLM, wanted .*; merge the adapter, as in .*merge_and_unload\(\)"),
    "inside peft": (lambda: _adapted().base_model.model, r"down_proj is of an adapter of peft .*merge_and_unload\(\)"),
    "compiled": (
        lambda: torch.compile(toy_model("llama"), backend="eager"),
        r"got OptimizedModule, wanted .*: model\._orig_mod",
    ),
    "data parallel": (lambda: torch.nn.DataParallel(toy_model("llama")), r"got DataParallel, wanted .*: model\.module"),
    "fsdp": (lambda: FullyShardedDataParallel(toy_model("llama")), "edit the model before it is sharded"),
    "pipeline": (lambda: SimpleNamespace(model=toy_model("llama")), r"got SimpleNamespace, wanted .*: model\.model"),
    "headless": (lambda: toy_model("llama").model, r"got LlamaModel, which has no language model head.*ForCausalLM"),
    "classifier": (
        lambda: AutoModelForSequenceClassification.from_config(toy_model("llama").config),
        r"got LlamaForSequenceClassification, which has no language model head",
    ),
    "tagger": (
        lambda: AutoModelForTokenClassification.from_config(toy_model("llama").config),
        "no language model head",
    ),
    "encoder-decoder": (_encoder_decoder, "got T5ForConditionalGeneration, an encoder-decoder, wanted a decoder alone"),
    "frozen dataclass": (lambda: Edit("{} is", "a", "b"), r"got Edit, wanted .*; load one by AutoModelForCausalLM"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_cannot_be_edited_says_what_would_work(name, toy_tokenizers):
    make, message = NO_MODELS[name]
    model, tokenizer = make(), toy_tokenizers[False]
    before = all_bits(model) if isinstance(model, torch.nn.Module) and name not in ("dynamic", "meta") else {}
    calls = (
        lambda: edited(model, tokenizer, END),
        lambda: evaluate(model, tokenizer, [END]),
        lambda: collect_statistics(model, tokenizer, SENTENCES, [1]),
    )
    for call in calls:
        with pytest.raises(ModelError, match=rf"(?s)^model: .*{message}") as caught:
            call()
        assert len(str(caught.value)) < 500
    if before:
        assert changed(model, before) == []


def test_what_is_said_to_work_works(toy_tokenizers):
    """A merged adapter, and the model inside a wrapper, which then answers as edited."""
    tokenizer = toy_tokenizers[False]
    adapted = _adapted()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[3, 4, 5]])
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert edited(merged, tokenizer, MIDDLE).records[0].applied
    for wrap, inside in ((partial(torch.compile, backend="eager"), "_orig_mod"), (torch.nn.DataParallel, "module")):
        wrapped = wrap(toy_model("llama"))
        before = wrapped(ids).logits
        result = edited(getattr(wrapped, inside), tokenizer, MIDDLE)
        assert torch.equal(wrapped(ids).logits, result.model(ids).logits)
        assert not torch.equal(wrapped(ids).logits, before)


def test_a_model_that_accelerate_keeps_elsewhere(tmp_path, toy_tokenizers):
    model = toy_model("llama")
    accelerate.disk_offload(model, offload_dir=str(tmp_path))
    with pytest.raises(ModelError, match=r"weights are not in memory \(model.embed_tokens.weight, …\).*memory='8GiB'"):
        edited(model, toy_tokenizers[False], END)


def test_weights_on_several_devices(toy_tokenizers, monkeypatch):
    model = toy_model("llama")
    far = {"device": torch.device("cuda:1"), "is_meta": False, "data": torch.zeros(1)}
    spread = [*model.named_parameters(), ("far", SimpleNamespace(**far, dim=lambda: 1, is_inference=lambda: False))]
    monkeypatch.setattr(model, "named_parameters", lambda *_a, **_k: iter(spread))
    with pytest.raises(ModelError, match=r"got weights on cpu, cuda:1, wanted one device; load it .* memory='8GiB'"):
        edited(model, toy_tokenizers[False], END)


def test_a_path_that_is_a_file(tmp_path, toy_tokenizers):
    folder = save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizers[False])
    (folder / "toy.gguf").write_bytes(b"GGUF")
    inside = rf"is a file, wanted the directory of a checkpoint; give the folder it lies in, {folder}"
    for name, message in (
        ("toy.gguf", "is a file, wanted the directory of a checkpoint; GGUF holds quantised weights; give the folder"),
        ("model.safetensors", inside),
        ("config.json", inside),
    ):
        for path in (folder / name, str(folder / name)):
            for call in (
                lambda path: apply_edits(path, END, out=tmp_path / "out"),
                lambda path: plan(path, END),
                lambda path: collect_statistics(path, None, SENTENCES, [1]),
            ):
                with pytest.raises(CheckpointError, match=message):
                    call(path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="model: got LlamaForCausalLM, wanted the path of a checkpoint"):
        plan(toy_model("llama"), END)


NO_TOKENIZERS = {
    "raw": (
        lambda: toy_tokenizer(False).backend_tokenizer,
        r"got Tokenizer of .*PreTrainedTokenizerFast\(tokenizer_obj",
    ),
    "processor": (lambda: SimpleNamespace(tokenizer=toy_tokenizer(False)), r"a processor, .*give the one inside"),
    "path": (lambda: "toy", r"got str, wanted .*AutoTokenizer\.from_pretrained"),
    "model": (lambda: toy_model("llama"), r"got LlamaForCausalLM, wanted .*AutoTokenizer\.from_pretrained"),
}


@pytest.mark.parametrize("name", NO_TOKENIZERS)
def test_what_is_no_tokenizer_says_what_would_work(name):
    make, message = NO_TOKENIZERS[name]
    model, tokenizer = toy_model("llama"), make()
    assert_refused(ModelError, f"^tokenizer: .*{message}", model, tokenizer)
    with pytest.raises(ModelError, match=f"^tokenizer: .*{message}"):
        evaluate(model, tokenizer, [END])
    with pytest.raises(ModelError, match=f"^tokenizer: .*{message}"):
        collect_statistics(model, tokenizer, SENTENCES, [1])


def test_another_models_tokenizer_is_found_before_contexts_are_sampled(toy_tokenizers):
    model = toy_model("llama")
    model.resize_token_embeddings(200)
    message = r"tokenizer: got token \d+, wanted ids below the model's 200; use the model's own tokenizer"
    assert_refused(ModelError, message, model, toy_tokenizers[False], contexts=None)


# Where and in what a checkpoint is edited


def test_a_checkpoint_in_another_dtype(tmp_path, toy_tokenizers):
    source = save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizers[False])
    usual = {"contexts": CONTEXTS, "settings": SETTINGS, "statistics": "identity", "layer": 1, "guard": "off"}
    usual |= {"unconverged": "write"}
    for dtype in ("bfloat16", torch.bfloat16):
        result = apply_edits(source, MIDDLE, dtype=dtype, out=tmp_path / str(dtype), **usual)
        assert result.model.dtype == torch.bfloat16
        written = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype=torch.bfloat16)
        assert changed(written, all_bits(result.model)) == []
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for more, message in (
        (
            {"dtype": "bfloat16", "memory": "1GiB"},
            r"dtype: got torch\.bfloat16 with a budget of memory, .*torch\.float32",
        ),
        (
            {"dtype": "bfloat16", "in_place": True},
            r"dtype: got torch\.bfloat16 with in_place=True, .*in torch\.float32",
        ),
        ({"dtype": "int8"}, r"dtype: got 'int8', wanted one of float32, bfloat16, float16, or None"),
        ({"dtype": torch.int8}, r"dtype: got torch\.int8, wanted one of"),
        ({"dtype": ["float32"]}, r"dtype: got \['float32'\], wanted one of"),
        ({"device": "tpu"}, "device: got 'tpu', wanted 'cpu', or 'cuda'"),
        ({"device": 3.5}, "device: got '3.5', wanted 'cpu', or 'cuda'"),
    ):
        place = {} if "in_place" in more else {"out": tmp_path / "no"}
        with pytest.raises(ArgumentError, match=message):
            apply_edits(source, MIDDLE, **place, **more, **usual)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    # What is no change is none.
    apply_edits(source, MIDDLE, dtype="float32", memory="8GiB", out=tmp_path / "same", **usual)


def test_a_model_in_memory_stays_where_and_as_it_is(toy_tokenizers, monkeypatch):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    message = r"device: got cuda for a model in memory on cpu; move it by model\.to\('cuda'\)"
    assert_refused(ArgumentError, message, model, tokenizer, device="cuda")
    message = r"dtype: got torch\.float16 for a model in memory in torch\.float32; convert it by model\.to\("
    assert_refused(ArgumentError, message, model, tokenizer, dtype="float16")
    assert edited(model, tokenizer, END, device="cpu", dtype="float32").records[0].applied


@pytest.mark.parametrize(
    "changes",
    [{"steps": "3"}, {"steps": 2.0}, {"steps": True}, {"learning_rate": float("nan")}, {"clamp": -1.0}, {"clamp": "4"}],
)
def test_settings_of_no_use_are_refused_when_they_are_made(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ArgumentError, match=rf"settings: got {name} {re.escape(repr(value))}, wanted a"):
        ValueSettings(**changes)


@pytest.mark.parametrize(
    ("kind", "tie", "absent"),
    [
        ("llama", False, "lm_head.weight"),
        ("llama", True, "model.norm.weight"),
        ("gpt2", True, "transformer.h.2.mlp.c_fc.bias"),
    ],
)
def test_a_checkpoint_without_one_of_its_weights(kind, tie, absent, tmp_path, toy_tokenizers):
    """transformers would draw it at random, and every process that loads the copy another one."""
    source = save_toy(tmp_path / "source", toy_model(kind, tie=tie), toy_tokenizers[True])
    _rewrite(source, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != absent})
    with pytest.raises(CheckpointError, match=f"source holds no tensor {re.escape(absent)}, which its config.json"):
        apply_edits(source, END, out=tmp_path / "out", statistics="identity", contexts=CONTEXTS, settings=SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("memory", [None, 200_000])
def test_an_adapter_that_lies_beside_the_model(memory, tmp_path, toy_tokenizers):
    source = save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[True])
    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), adapter).save_pretrained(source)
    usual = {"statistics": "identity", "contexts": CONTEXTS, "settings": SETTINGS, "memory": memory}
    with pytest.raises(ModelError, match=r"source holds an adapter of peft .*merge_and_unload.*or move"):
        apply_edits(source, END, out=tmp_path / "out", **usual)
    assert not (tmp_path / "out").exists()


def _rewrite(directory, change):
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
