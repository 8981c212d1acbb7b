"""Second moments against a sum over plain forwards, and statistics that must be refused."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from helpers import END, FORWARD, LAYER, MIDDLE, START, all_bits, changed, delta_w, edited, relative_error, rounding
from rome_fast import RomeFastError, Statistics, ValueSettings, collect_statistics
from rome_fast.errors import ArgumentError, CheckpointError, StatisticsError
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.statistics import Choice, LayerStatistics, StatisticsWarning, cache_folder, collect, statistics_cache
from toys import D_FF, HIDDEN, KINDS, LAYERS, SENTENCES, save_toy, toy_model

# C is quadratic in the keys, which lie in the first half of the model.
ALLOWED = 2 * rounding(torch.float32, FORWARD / 2)
TEXTS = SENTENCES[:6]


def moment(statistics, layer=LAYER):
    return statistics.layers[layer].moment


@pytest.mark.parametrize(("kind", "bos"), [*((kind, kind in ("llama", "mistral")) for kind in KINDS), ("gpt2", True)])
def test_the_mean_over_all_tokens(kind, bos, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    statistics = collect_statistics(model, tokenizer, TEXTS, [0, LAYER])
    for layer in (0, LAYER):
        wanted, count = oracle.second_moment(model, tokenizer, TEXTS, layer, 64)
        entry = statistics.layers[layer]
        assert entry.tokens == count
        assert relative_error(entry.moment, wanted) < ALLOWED
        assert torch.equal(entry.moment, entry.moment.T)


def test_float64_models_are_summed_in_float64(toy_tokenizers):
    model, tokenizer = toy_model("gpt2", dtype=torch.float64), toy_tokenizers[False]
    wanted, _ = oracle.second_moment(model, tokenizer, TEXTS, LAYER, 64)
    got = moment(collect_statistics(model, tokenizer, TEXTS, [LAYER]))
    # What is left is the rounding of the result to the fp32 that it is kept in.
    assert relative_error(got, wanted) < torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_long_texts_are_cut_into_rows(bos, toy_tokenizers):
    """Every token counts, and every row begins with BOS where texts do."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[bos]
    statistics = collect_statistics(model, tokenizer, TEXTS[:3], [LAYER], max_length=7)
    rows = []
    for text in TEXTS[:3]:
        ids = tokenizer(text)["input_ids"]
        rows += [ids[:bos] + ids[start : start + 7 - bos] for start in range(bos, len(ids), 7 - bos)]
    double = oracle.double_copy(model)
    keys = torch.cat([oracle.keys_of(double, LAYER, row) for row in rows])
    assert statistics.layers[LAYER].tokens == len(keys)
    assert relative_error(moment(statistics), keys.T @ keys / len(keys)) < ALLOWED


def test_the_model_sets_the_length_of_a_row(toy_tokenizers):
    """Positions beyond the last would be an index error in the embedding."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    text = " ".join(SENTENCES)
    count = len(tokenizer(text)["input_ids"])
    assert count > model.config.n_positions
    entry = collect_statistics(model, tokenizer, [text], [LAYER], 10_000, max_length=10_000).layers[LAYER]
    assert entry.tokens == count
    assert entry.provenance["max_length"] == str(model.config.n_positions)


def test_the_budget_is_kept_to_the_token(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    budget = len(ids[0]) + 5
    seen = []
    statistics = collect_statistics(
        model, tokenizer, TEXTS, [LAYER], tokens=budget, progress=lambda *now: seen.append(now)
    )
    double = oracle.double_copy(model)
    keys = torch.cat([oracle.keys_of(double, LAYER, row) for row in (ids[0], ids[1][:5])])
    assert statistics.layers[LAYER].tokens == budget
    assert seen[-1] == (budget, budget)
    assert relative_error(moment(statistics), keys.T @ keys / budget) < ALLOWED


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_batching_matters(side, toy_tokenizers, monkeypatch):
    model, tokenizer = toy_model("llama"), copy.deepcopy(toy_tokenizers[True])
    together = moment(collect_statistics(model, tokenizer, TEXTS, [LAYER]))
    monkeypatch.setitem(collect._BATCH_TOKENS, "cpu", 1)
    tokenizer.padding_side = side
    one_by_one = moment(collect_statistics(model, tokenizer, reversed(TEXTS), [LAYER]))
    assert relative_error(one_by_one, together) < ALLOWED


def test_a_generator_of_texts_is_read_no_further_than_needed(toy_tokenizers):
    read = []

    def texts():
        for text in SENTENCES:
            read.append(text)
            yield text

    collect_statistics(toy_model("gpt2"), toy_tokenizers[False], texts(), [LAYER], tokens=30)
    assert len(read) == 1


def test_the_model_is_left_as_it_was(toy_tokenizers):
    """In training mode dropout would have a part in the keys."""
    model = toy_model("gpt2")
    wanted = moment(collect_statistics(model, toy_tokenizers[False], TEXTS, [LAYER]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = all_bits(model.train())
    got = moment(collect_statistics(model, toy_tokenizers[False], TEXTS, [LAYER]))
    assert torch.equal(got, wanted)
    assert model.training
    assert changed(model, before) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_the_cholesky_factor(toy_tokenizers):
    statistics = collect_statistics(toy_model("llama"), toy_tokenizers[True], SENTENCES, [LAYER])
    factor = statistics.layers[LAYER].factor(torch.device("cpu"))
    assert factor.dtype == torch.float64
    assert torch.equal(factor, factor.tril())
    # The factor is of the matrix as it is kept, without a ridge.
    assert relative_error(factor @ factor.T, moment(statistics)) < rounding(torch.float64, 2 * D_FF)


def test_saved_and_loaded(tmp_path, toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    statistics = collect_statistics(model, tokenizer, SENTENCES, [0, 2])
    statistics.save(tmp_path / "new" / "folder")
    loaded = Statistics.load(tmp_path / "new" / "folder")
    assert sorted(loaded.layers) == [0, 2]
    for layer, entry in loaded.layers.items():
        wanted = statistics.layers[layer]
        assert torch.equal(entry.moment, wanted.moment)
        assert (entry.tokens, entry.provenance) == (wanted.tokens, wanted.provenance)
        assert str(entry.fingerprint) == str(wanted.fingerprint)
        assert loaded.for_layer(Runner(model), layer) is entry
    assert re.fullmatch("[0-9a-f]{64}", loaded.layers[0].provenance["corpus_sha256"])

    updates = [
        delta_w(edited(copy.deepcopy(model), tokenizer, END, layer=2, statistics=s)) for s in (statistics, loaded)
    ]
    assert torch.equal(*updates)


def test_statistics_matter(toy_tokenizers, toy_statistics):
    model = toy_model("gpt2")
    with_c = edited(copy.deepcopy(model), toy_tokenizers[False], END, statistics=toy_statistics(model, False))
    without = edited(copy.deepcopy(model), toy_tokenizers[False], END, statistics="identity")
    assert relative_error(delta_w(with_c), delta_w(without)) > 0.1


# Whose statistics are they?


def fingerprint(model, layer=LAYER):
    return str(Fingerprint.of(Runner(model), layer))


def test_a_fingerprint_names_the_shape():
    assert re.fullmatch(rf"gpt2-{LAYERS}x{HIDDEN}x{D_FF}-[0-9a-f]{{12}}", fingerprint(toy_model("gpt2")))
    kept = Fingerprint.of(Runner(toy_model("gpt2")), LAYER)
    assert str(Fingerprint.from_json(kept.to_json())) == str(kept)


def test_statistics_of_another_model_are_refused_with_both_fingerprints(toy_tokenizers, toy_statistics):
    statistics, other = toy_statistics(toy_model("llama"), True), toy_model("llama", seed=1)
    before = all_bits(other)
    with pytest.raises(StatisticsError) as caught:
        edited(other, toy_tokenizers[True], END, statistics=statistics)
    assert fingerprint(toy_model("llama")) in str(caught.value)
    assert fingerprint(other) in str(caught.value)
    assert changed(other, before) == []


def test_statistics_of_another_family_are_refused(toy_tokenizers, toy_statistics):
    statistics = toy_statistics(toy_model("llama"), True)
    with pytest.raises(StatisticsError, match=r"llama-4x48x80-\w+, wanted qwen2-4x48x80"):
        edited(toy_model("qwen2"), toy_tokenizers[True], END, statistics=statistics)


def test_statistics_of_another_layer_are_refused(toy_tokenizers, toy_statistics):
    model = toy_model("llama")
    with pytest.raises(StatisticsError, match=r"got layer\(s\) 1, wanted layer 2 as well; .* with: .* --layers 2 "):
        edited(model, toy_tokenizers[True], END, layer=2, statistics=toy_statistics(model, True))
    # A file renamed to the wanted layer says what it is, too.
    entry = toy_statistics(model, True).layers[1]
    renamed = Statistics([LayerStatistics(2, entry.moment, entry.tokens, entry.fingerprint)])
    with pytest.raises(StatisticsError, match=r"wanted llama"):
        edited(model, toy_tokenizers[True], END, layer=2, statistics=renamed)


def test_statistics_of_another_width_are_refused_with_both_fingerprints(toy_tokenizers, toy_statistics):
    model = toy_model("llama")
    entry = toy_statistics(model, True).layers[LAYER]
    narrow = Statistics([LayerStatistics(LAYER, entry.moment[:-1, :-1], entry.tokens, entry.fingerprint)])
    with pytest.raises(
        StatisticsError, match=rf"got C of shape \(79, 79\).*wanted \(80, 80\) for layer {LAYER}"
    ) as caught:
        edited(model, toy_tokenizers[True], END, statistics=narrow)
    assert str(caught.value).count(fingerprint(model)) == 2


def test_statistics_are_taken_after_an_edit_below_them(toy_tokenizers, toy_statistics):
    """As they were before it, without a word: edits in memory are known. Call follows call, spread or not."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    statistics = Statistics([toy_statistics(model, True, layer).layers[layer] for layer in (0, 1, 2)])
    spread = {"statistics": statistics, "layer": None, "layers": [0, 1, 2], "method": "dual"}
    for edit in (END, MIDDLE, START):
        result = edited(model, tokenizer, edit, **spread)
    assert result.records[0].applied
    edited(model, tokenizer, END, layer=1)
    edited(model, tokenizer, END, layer=2, statistics=statistics)


def test_statistics_of_what_was_edited_before_it_was_loaded_are_taken_with_a_warning(toy_tokenizers, toy_statistics):
    """And of a model that was trained otherwise they are not."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    statistics = toy_statistics(model, True, 2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.warns(StatisticsWarning, match="of layer 2 are of .* differs in down-projections below"):
        edited(model, tokenizer, END, layer=2, statistics=statistics)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(StatisticsError, match="the weights below layer 2 differ"):
        edited(model, tokenizer, END, layer=2, statistics=statistics)


@pytest.mark.parametrize(("kind", "memory"), [("gpt2", None), ("llama", "1MiB")])
def test_an_edited_checkpoint_takes_those_of_what_it_was(
    kind, memory, toy_tokenizers, toy_statistics, empty_cache, tmp_path, monkeypatch
):
    """Its records say so, without a word; those of another edited copy were as near, and came first by their name."""
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)
    model, tokenizer = toy_model(kind), toy_tokenizers[False]
    source = save_toy(tmp_path / "source", model, tokenizer, max_shard_size="100KB")
    entry = toy_statistics(model, False, 2).layers[2]
    edited(source, tokenizer, END, layer=1, out=tmp_path / "first")
    edited(tmp_path / "first", tokenizer, MIDDLE, layer=1, out=tmp_path / "edited")
    Statistics([entry]).save(cache_folder(Runner(model), "z", [2]))
    edited(model, tokenizer, START, layer=1)
    other = LayerStatistics(2, 2 * torch.eye(D_FF), entry.tokens, Fingerprint.of(Runner(model), 2))
    Statistics([other]).save(cache_folder(Runner(model), "a", [2]))

    usual = {"layer": 2, "memory": memory}
    found = edited(tmp_path / "edited", tokenizer, END, statistics=None, out=tmp_path / "one", **usual)
    given = edited(tmp_path / "edited", tokenizer, END, statistics=Statistics([entry]), out=tmp_path / "two", **usual)
    assert torch.equal(delta_w(found), delta_w(given))
    shutil.rmtree(tmp_path / "edited" / "rome_fast")
    with pytest.warns(StatisticsWarning, match="of layer 2 are of .* differs in down-projections below"):
        edited(tmp_path / "edited", tokenizer, END, statistics=Statistics([entry]), out=tmp_path / "three", **usual)


def test_the_cache_has_those_of_before_an_edit(toy_tokenizers, toy_statistics, empty_cache):
    """But those of the edited model itself come first, and a choice of tune holds for both."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    entry = toy_statistics(model, True, 2).layers[2]
    Statistics([entry]).save(cache_folder(Runner(model), "model", [2]))
    other = toy_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    toy_statistics(other, True, 2).save(cache_folder(Runner(other), "other", [2]))
    before = Fingerprint.of(Runner(model), 2)
    choice = Choice(2, ValueSettings(), before, "2026-11-01T00:00:00+00:00")
    edited(model, tokenizer, END, layer=1)
    assert not Fingerprint.of(Runner(model), 2).matches(before)
    assert torch.equal(Statistics.cached(Runner(model), [2]).layers[2].moment, entry.moment)
    assert edited(model, tokenizer, MIDDLE, layer=2, statistics=None).records[0].applied
    assert choice.is_of(Runner(model))
    assert not choice.is_of(Runner(other))
    loaded = toy_model("llama")
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(Statistics.cached(Runner(loaded), [2]).layers[2].moment, entry.moment)
    own = LayerStatistics(2, 2 * entry.moment, 1, Fingerprint.of(Runner(model), 2))
    Statistics([own]).save(cache_folder(Runner(model), "edited", [2]))
    assert torch.equal(Statistics.cached(Runner(model), [2]).layers[2].moment, own.moment)


@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_statistics_are_taken_after_an_edit_of_their_own_layer_or_above(kind, bos, toy_tokenizers, toy_statistics):
    model, tokenizer = toy_model(kind), toy_tokenizers[bos]
    statistics = toy_statistics(model, bos)
    edited(model, tokenizer, END, layer=LAYER)
    edited(model, tokenizer, END, layer=LAYER + 1)
    assert edited(model, tokenizer, END, statistics=statistics).records[0].applied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "bos"), [("llama", True), ("gpt2", False)])
def test_statistics_are_taken_for_a_copy_in_another_dtype(kind, bos, dtype, toy_tokenizers, toy_statistics):
    statistics = toy_statistics(toy_model(kind), bos)
    copied = toy_model(kind, dtype=dtype)
    assert edited(copied, toy_tokenizers[bos], END, statistics=statistics).records[0].applied
    # And the other way round.
    statistics = toy_statistics(copied, bos)
    assert edited(toy_model(kind), toy_tokenizers[bos], END, statistics=statistics).records[0].applied


# The cache


def test_without_statistics_those_in_the_cache_are_used(empty_cache, toy_tokenizers, toy_statistics):
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    assert statistics_cache() == empty_cache / "statistics"
    toy_statistics(toy_model("llama", seed=1), True).save(empty_cache / "statistics" / "a")
    toy_statistics(model, True).save(empty_cache / "statistics" / "b")
    toy_statistics(model, True, 2).save(empty_cache / "statistics" / "b")
    found = edited(copy.deepcopy(model), tokenizer, END, statistics=None)
    given = edited(copy.deepcopy(model), tokenizer, END, statistics=toy_statistics(model, True))
    assert torch.equal(delta_w(found), delta_w(given))


def test_an_empty_cache_says_what_to_run(empty_cache, toy_tokenizers):
    model = toy_model("llama")
    model.config._name_or_path = "some/model"
    before = all_bits(model)
    with pytest.raises(
        StatisticsError, match=r"(?s)rome-fast statistics some/model --corpus FILE --layers 1\n.*statistics='identity'"
    ):
        edited(model, toy_tokenizers[True], END, statistics=None)
    assert changed(model, before) == []
    assert not empty_cache.exists()


def test_a_damaged_file_of_another_model_in_the_cache_is_no_obstacle(empty_cache, toy_tokenizers, toy_statistics):
    """Every edit without statistics failed as long as one file of the cache, of whatever model, was damaged."""
    model = toy_model("llama")
    toy_statistics(toy_model("gpt2"), True).save(empty_cache / "statistics" / "a")
    damaged = empty_cache / "statistics" / "a" / f"layer-{LAYER}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    toy_statistics(model, True).save(empty_cache / "statistics" / "b")
    assert edited(model, toy_tokenizers[True], END, statistics=None).records[0].applied
    with pytest.raises(StatisticsError, match=r"(?s)rome-fast statistics.*unreadable there: .*layer-1.*truncated"):
        edited(toy_model("gpt2"), toy_tokenizers[True], END, statistics=None)


# Unusable statistics


def test_a_singular_c_says_how_many_tokens_it_saw(toy_tokenizers):
    """One short text cannot fill 80 dimensions."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[True]
    statistics = collect_statistics(model, tokenizer, ["Rome was not built in a day."], [LAYER])
    seen = statistics.layers[LAYER].tokens
    assert seen < D_FF
    before = all_bits(model)
    with pytest.raises(
        StatisticsError,
        match=rf"C of layer {LAYER} is singular: it saw {seen} tokens for {D_FF} dimensions.*'identity'",
    ):
        edited(model, tokenizer, END, statistics=statistics)
    assert changed(model, before) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite(value, toy_tokenizers):
    model = toy_model("gpt2")
    with torch.no_grad():
        model.get_parameter("transformer.h.0.mlp.c_fc.weight")[0, 0] = value
    with pytest.raises(StatisticsError, match=rf"keys of layer {LAYER} contain NaN or infinity"):
        collect_statistics(model, toy_tokenizers[False], TEXTS, [LAYER])


def test_a_c_that_is_not_finite_is_never_used(toy_tokenizers, toy_statistics):
    """cholesky_ex reports success for some matrices with NaN in them."""
    model = toy_model("llama")
    for place in ((0, 0), (5, 3), (79, 0), (79, 79)):
        statistics = toy_statistics(model, True)
        bad = statistics.layers[LAYER].moment.clone()
        bad[place] = bad[place[::-1]] = float("nan")
        entry = LayerStatistics(LAYER, bad, 1000, statistics.layers[LAYER].fingerprint)
        before = all_bits(model)
        with pytest.raises(RomeFastError):
            edited(model, toy_tokenizers[True], END, statistics=Statistics([entry]))
        assert changed(model, before) == []


@pytest.mark.parametrize("layers", [[], [-1], [4], [0, 4], [0, 17]])
def test_layers_out_of_range(layers, toy_tokenizers):
    with pytest.raises(ArgumentError, match=rf"layers: got {re.escape(str(layers))}, wanted some of 0 \.\. 3"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], TEXTS, layers)


@pytest.mark.parametrize("budget", [{"tokens": 0}, {"tokens": -5}, {"max_length": 0}])
def test_a_budget_below_one_token(budget, toy_tokenizers):
    with pytest.raises(ArgumentError, match=r"tokens, max_length: got .*wanted whole numbers of at least 1"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], TEXTS, [LAYER], **budget)


@pytest.mark.parametrize(
    "texts", [[], [""], ["", ""], iter([])], ids=["none", "empty", "all empty", "a spent iterator"]
)
@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_a_corpus_without_a_token(texts, bos, toy_tokenizers):
    with pytest.raises(StatisticsError, match="texts: got no tokens at all; give at least one text"):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[bos], texts, [LAYER])


def test_empty_texts_among_others_are_passed_over(toy_tokenizers):
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    with_empty = collect_statistics(model, tokenizer, ["", TEXTS[0], "", TEXTS[1], ""], [LAYER])
    assert relative_error(moment(with_empty), moment(collect_statistics(model, tokenizer, TEXTS[:2], [LAYER]))) == 0


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text instead of a list of them", "texts: got str"),
        ([b"bytes"], "texts: .*bytes"),
        ([None], "texts: .*None"),
    ],
)
def test_texts_that_are_none(texts, message, toy_tokenizers):
    """A string is an iterable of strings: its single letters would be taken for the corpus."""
    with pytest.raises(ArgumentError, match=message):
        collect_statistics(toy_model("gpt2"), toy_tokenizers[False], texts, [LAYER])


# Damaged files


@pytest.fixture
def file(tmp_path, toy_statistics):
    toy_statistics(toy_model("llama"), True).save(tmp_path)
    return tmp_path / f"layer-{LAYER}.safetensors"


@pytest.mark.parametrize("cut", [0, 7, 500, -1])
def test_a_truncated_file(cut, file):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises((StatisticsError, CheckpointError), match=r"layer-1\.safetensors"):
        Statistics.load(file.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("format"), "not one of second moments"),
        (lambda t, m: t.update(more=torch.ones(1)), "not one of second moments"),
        (lambda t, m: t.update(second_moment=torch.ones(80, 79)), r"C of shape \(80, 79\), wanted a square"),
        (lambda t, m: t.update(second_moment=torch.ones(80)), r"C of shape \(80,\), wanted a square"),
        (lambda t, m: t["second_moment"].view(-1)[7].fill_(float("nan")), "contains NaN or infinity"),
        (lambda t, m: t["second_moment"].view(-1)[0].fill_(float("inf")), "contains NaN or infinity"),
        (lambda t, m: m.pop("tokens"), "unreadable metadata"),
        (lambda t, m: m.update(layer="two"), "unreadable metadata"),
        (lambda t, m: m.update(fingerprint="{}"), "unreadable metadata"),
        (lambda t, m: m.update(fingerprint='{"shape": 3, "samples": []}'), "unreadable metadata"),
        (lambda t, m: m.update(provenance="not JSON"), "unreadable metadata"),
    ],
)
def test_a_file_that_is_not_statistics(change, message, file):
    tensors, metadata = load_file(file), read_metadata(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(StatisticsError, match=rf"layer-1\.safetensors.*{message}|{message}.*layer-1\.safetensors"):
        Statistics.load(file.parent)


def read_metadata(file):
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_a_folder_without_statistics(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StatisticsError, match=r"no layer-\*\.safetensors in .*--out"):
            Statistics.load(folder)
