"""What is found out about models by running them: faults that must not pass, in every dtype, and what it costs."""

import time

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers import CONTEXTS, END, SETTINGS, edited
from rome_fast import Edit, ValueSettings, apply_edits, collect_statistics, verify
from rome_fast.errors import ArgumentError, CheckpointError, ModelError
from rome_fast.evaluation import evaluate
from rome_fast.models import Decoder
from rome_fast.models.runner import Runner
from rome_fast.models.verification import check_model, verified, verified_each
from rome_fast.statistics import usual_layers
from toys import SENTENCES, save_toy, toy_model
from zoo import HIDDEN, LAYERS, zoo_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_scale(decoder, hidden):
    model = decoder.model
    return model.lm_head(model.model.norm(hidden))


def without_norm(decoder, hidden):
    return decoder.model.lm_head(hidden)


def without_distances(arguments):
    return [call | {"alibi": torch.zeros_like(call["alibi"])} for call in arguments]


def without_rotation(arguments):
    plain = [
        (torch.ones_like(cos), torch.zeros_like(sin))
        for cos, sin in (call["position_embeddings"] for call in arguments)
    ]
    return [call | {"position_embeddings": pair} for call, pair in zip(arguments, plain, strict=True)]


# Weights of this size give logits of which a cap of 30 changes 5e-3: fewer than bfloat16 has digits for.
SLIGHTLY_CAPPED = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None}

BROKEN = {
    "no logit scale": ("cohere", {}, "head", without_scale),
    "no logit multiplier": ("granite", {}, "head", without_scale),
    "soft cap forgotten": ("gemma2", SLIGHTLY_CAPPED, "head", without_scale),
    "norm skipped": ("llama", {}, "head", without_norm),
    "ALiBi ignored": ("bloom", {}, "calls", without_distances),
    "positions ignored": ("llama", {}, "calls", without_rotation),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", BROKEN)
def test_a_decoder_that_is_not_the_model_is_refused(fault, dtype, monkeypatch):
    kind, changes, method, broken = BROKEN[fault]
    model = zoo_model(kind, dtype=dtype, **changes)
    if fault == "soft cap forgotten":
        with torch.no_grad():
            model.model.norm.weight.copy_(slight_gain(model))
    right = getattr(Decoder, method)
    wrong = broken if method == "head" else lambda decoder, *args: broken(right(decoder, *args))
    assert verify(model).logits_error == 0
    monkeypatch.setattr(Decoder, method, wrong)
    with pytest.raises(ModelError, match=r"the layers of .*, run one by one, miss its own logits by \d") as caught:
        verify(fresh(model))
    if fault == "soft cap forgotten":
        assert 3e-3 < float(str(caught.value).rpartition(" ")[2]) < 2e-2


def slight_gain(model):
    """A gain of the last norm at which the cap changes about 5e-3 of the logits."""
    for gain in torch.logspace(1, -3, 60):
        model.model.norm.weight.data.fill_(float(gain) - 1)
        capped = model(input_ids=torch.arange(100, 108).unsqueeze(0)).logits.double()
        inner = 30 * torch.atanh(capped / 30)
        if float((inner - capped).norm() / capped.norm()) < 6e-3:
            return model.model.norm.weight.data.clone()
    raise AssertionError("the cap acts at any gain")


def fresh(model):
    """The same model as another object, of which nothing is known."""
    other = type(model)(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swapped_layers_are_refused(dtype, monkeypatch):
    find = Decoder.__init__

    def swapped(decoder, model):
        find(decoder, model)
        first, second, *others = decoder.layers
        decoder.layers = nn.ModuleList([second, first, *others])

    monkeypatch.setattr(Decoder, "__init__", swapped)
    with pytest.raises(ModelError, match="run one by one, miss its own logits by"):
        verify(zoo_model("qwen3", dtype=dtype))


def test_nothing_is_done_with_a_model_that_is_refused(toy_tokenizers, monkeypatch, tmp_path):
    """Whoever runs layers asks first: edits, statistics and evaluations, in memory and under a budget."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    source = save_toy(tmp_path / "source", model, tokenizer)
    monkeypatch.setattr(Decoder, "head", without_norm)
    usual = {"statistics": "identity", "layer": 1, "contexts": CONTEXTS, "settings": SETTINGS}
    for attempt in (
        lambda: edited(model, tokenizer, END),
        lambda: apply_edits(source, END, out=tmp_path / "out", memory="700KB", **usual),
        lambda: collect_statistics(model, tokenizer, SENTENCES, [1]),
        lambda: evaluate(model, tokenizer, [END]),
    ):
        with pytest.raises(ModelError, match="run one by one, miss its own logits by"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "shares_past", "adds_unchanged"),
    [
        ("llama", True, True),
        ("gemma3_text", True, False),  # a norm behind the MLP
        ("granite", True, False),  # a multiplier
        ("qwen2_moe", True, False),  # a gate
        ("bloom", False, True),  # distances
        ("recurrent_gemma", False, True),  # a recurrence that takes keys and values, and makes nothing of them
        ("openai-gpt", False, False),
    ],
)
def test_what_is_found_is_the_same_in_every_dtype(kind, shares_past, adds_unchanged, dtype):
    found = verify(zoo_model(kind, dtype=dtype), 1)
    assert (found.shares_past, found.adds_unchanged, found.logits_error) == (shares_past, adds_unchanged, 0)
    # Far from where one turns into the other: that is 0.05 in 16 bit, where a few roundings of what a layer adds come
    # to 4 u, and 1e-4 in fp32, where a tenth of it is more than forty.
    near = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert found.past_error is None or not near < found.past_error < 0.1
    assert not 0.02 < found.value_error < 0.1
    assert f"layer 1, {found.weight}" in str(found)


@pytest.mark.parametrize("step", ["_one_by_one", "_past_error"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_running_out_of_memory_says_nothing_of_the_model(step, error, monkeypatch):
    """It is a RuntimeError, and was taken for a layer that cannot be run so, or for a past that cannot be shared."""
    model = toy_model("llama")

    def fail(*_arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"rome_fast.models.verification.{step}", fail)
        with pytest.raises(type(error), match=str(error)):
            verify(model)
    assert verify(model).shares_past


def test_several_layers_are_looked_at_in_one_pass():
    model, layers = toy_model("llama"), [0, 1, 3]
    alone = [verify(fresh(model), layer) for layer in layers]
    runner = Runner(model)
    verified(runner, 2)
    passes = []
    for layer in (0, 2):
        model.model.layers[layer].register_forward_hook(lambda *_, layer=layer: passes.append(layer))
    assert verified_each(runner, layers) == alone
    # On the way to layer 3; and layer 0 as it is and with something added.
    assert passes == [0, 2, 0, 0]
    passes.clear()
    assert verified_each(runner, [2, *layers])[1:] == alone
    assert passes == []


def test_statistics_are_of_the_layers_that_edits_take(toy_tokenizers):
    """Of several where δ can be shared out, and of the last alone where a norm behind the MLP forbids it."""
    for model, several in ((toy_model("llama"), True), (zoo_model("gemma2"), False)):
        layers = usual_layers(Runner(model))
        assert (len(layers) > 1) == several
        result = apply_edits(
            model,
            Edit("The city of {}", "Chicago", "Rome"),
            tokenizer=toy_tokenizers[False],
            statistics="identity",
            contexts=("The weather is nice. ",),
            settings=ValueSettings(steps=2, extra_steps=0),
            guard="off",
            unconverged="write",
            measure=False,
        )
        assert result.records[0].layers == list(layers)


def test_a_model_is_run_once_until_something_changes(toy_tokenizers):
    model = toy_model("llama")
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))

    def runs(layer=1):
        passes.clear()
        found = verify(model, layer)
        assert found.layer == layer
        return len(passes)

    first = runs()
    assert first == 2  # the model's own, and that of its layers
    assert runs() == 0
    assert runs(2) == 0
    edited(model, toy_tokenizers[False], END).revert()
    assert runs() == 0
    model.to(torch.bfloat16)
    assert runs() == first
    model.set_attn_implementation("eager")
    assert runs() == first
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    assert runs() == first


def test_weights_and_modes_are_as_before(toy_tokenizers):
    model = toy_model("llama").train()
    model.model.norm.weight.requires_grad_(False)
    verify(model)
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_later_tokens_that_change_earlier_logits():
    config = AutoConfig.for_model(
        "bert",
        vocab_size=600,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=96,
    )
    with pytest.raises(ModelError, match=r"BertLMHeadModel .* no causal language model: later tokens change"):
        verify(AutoModelForCausalLM.from_config(config).eval())


def test_an_encoder_with_a_decoder():
    config = AutoConfig.for_model("t5", vocab_size=600, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16)
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration .*wanted a model that is a decoder only"):
        verify(AutoModelForSeq2SeqLM.from_config(config))


def test_a_model_without_its_head(tmp_path, toy_tokenizers):
    model = AutoModel.from_config(zoo_model("llama").config)
    with pytest.raises(
        ModelError, match=r"LlamaModel .* has no language-model head; load it with AutoModelForCausalLM"
    ):
        check_model(Runner(model))
    model.config.tie_word_embeddings = False
    source = save_toy(tmp_path / "source", model, toy_tokenizers[False])
    with pytest.raises(
        CheckpointError, match=r"holds no tensor lm_head\.weight, which its config\.json asks for; .*tie_word"
    ):
        apply_edits(source, END, out=tmp_path / "out", statistics="identity")


@pytest.mark.parametrize(
    ("kind", "changes", "editable"),
    [("jamba", {}, "0, 2"), ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, r"0 \.\. 2")],
    ids=["every other", "the last"],
)
def test_layers_without_a_weight_of_all_tokens(kind, changes, editable, toy_tokenizers):
    """The default layer is one that can be edited; for another one it is said which can."""
    model = zoo_model(kind, **changes)
    assert verify(model).layer == (0 if kind == "jamba" else 1)
    reason = f"layer 3 of .* has routed experts only, .*; wanted one of the layers {editable}"
    with pytest.raises(ModelError, match=reason):
        edited(model, toy_tokenizers[False], END, layer=3)
    with pytest.raises(ArgumentError, match=r"layer: got 4, wanted one of 0 \.\. 3"):
        verify(model, 4)


def test_logits_that_are_no_numbers():
    model = zoo_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight *= 6e4
    with pytest.raises(ModelError, match=r"the logits of .* are not finite in torch\.float16; load it in float32"):
        verify(model)


@pytest.mark.slow
def test_the_cost_beside_an_edit_of_the_real_model():
    """At most 1 % of a call of 16 edits; processor time."""
    from transformers import AutoTokenizer

    from rome_fast import Edit, Statistics
    from rome_fast.demo import model_dir, statistics_dir

    model = AutoModelForCausalLM.from_pretrained(model_dir())
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    names = ["Alice Munro", "Danielle Darrieux", "Miles Davis", "Ada Lovelace", "Thomas Mann", "Pablo Neruda",
             "Marie Curie", "Franz Liszt", "Simone Weil", "Hannah Arendt", "Paul Klee", "Clara Schumann",
             "Ernst Mach", "Edith Piaf", "Max Born", "Anna Seghers"]  # fmt: skip
    edits = [Edit("The mother tongue of {} is", name, "English") for name in names]
    runner = Runner(model)
    runner.run(runner.embed(torch.arange(16).reshape(2, 8)), 0, 30)  # what a first pass takes on top
    start = time.process_time()
    found = verified(runner, 9)
    checking = time.process_time() - start
    start = time.process_time()
    apply_edits(model, edits, tokenizer=tokenizer, statistics=Statistics.load(statistics_dir()), guard="off")
    editing = time.process_time() - start
    print(f"verification {checking:.3f} s, 16 edits {editing:.1f} s: {checking / editing:.2%}\n{found}")
    assert checking <= 0.01 * editing
