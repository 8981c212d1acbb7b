"""Every wrong input to apply_edits ends in one RomeFastError that says what to do, before anything is written.

What the parts refuse on their own is tested with them: edits files in test_edits, statistics in test_statistics,
checkpoints in test_checkpoints and test_cli.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import CONTEXTS, END, MIDDLE, all_bits, changed, edited
from rome_fast import Edit, RomeFastError, apply_edits, collect_statistics
from rome_fast.errors import ArgumentError, EditError, ModelError, StatisticsError
from rome_fast.models import known_model_types
from toys import LAYERS, SENTENCES, toy_model, toy_tokenizer

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
            {"method": "memit"},
            ArgumentError,
            "method: got 'memit', wanted one of rome, c-rome-released, c-rome, p-rome",
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
        ({"contexts": "It rained. "}, ArgumentError, r"contexts: got .*wanted texts"),
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
        ({"settings": {"steps": 3}}, ArgumentError, "settings: got dict, wanted .*ValueSettings"),
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


def test_an_unknown_architecture_lists_the_known_ones(toy_tokenizers):
    config = AutoConfig.for_model(
        "gpt_neo",
        vocab_size=600,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )
    model = AutoModelForCausalLM.from_config(config)
    assert {"llama", "qwen2", "gpt2"} <= set(known_model_types())
    known = ", ".join(known_model_types())
    assert_refused(
        ModelError, f"model: got architecture 'gpt_neo', wanted one of {known}", model, toy_tokenizers[False]
    )
    with pytest.raises(ModelError, match="gpt_neo"):
        collect_statistics(model, toy_tokenizers[False], SENTENCES, [1])


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
        (Edit("{} is in", "Paris", "~"), "target '~': got no token from the tokenizer, wanted at least one"),
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


def test_a_model_of_no_checkpoint_cannot_be_saved(tmp_path):
    """Its empty name resolved to the current directory, which then was the checkpoint that was copied."""
    model = toy_model("llama")
    before = all_bits(model)
    assert not model.config._name_or_path
    with pytest.raises(ArgumentError, match="does not say which checkpoint it was loaded from"):
        edited(model, toy_tokenizer(False), MIDDLE, out=tmp_path / "out")
    assert changed(model, before) == []
    assert not (tmp_path / "out").exists()


def test_an_attention_that_takes_no_mask_is_refused(toy_tokenizers):
    model = toy_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"got attn_implementation .flash_attention_2., wanted .sdpa. or .eager.; "):
        edited(model, toy_tokenizers[False], END)
