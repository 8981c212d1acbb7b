"""Method "dual" against the oracle: a first-token subject's two keys, and every other subject's one."""

import functools
import json
from dataclasses import replace

import pytest
import torch

import oracle
from helpers import (
    CONTEXTS,
    END,
    FORWARD,
    LAYER,
    MIDDLE,
    SETTINGS,
    START,
    all_bits,
    bits,
    changed,
    delta_w,
    edited,
    relative_error,
    rounding,
    rounding_of_edit,
)
from rome_fast import Delta, Edit, apply_edits, plan
from rome_fast.bench import edit_as_released
from rome_fast.cli import main
from rome_fast.closing.judging import ConvergenceWarning
from rome_fast.errors import ArgumentError, CollapseError, StatisticsError
from rome_fast.methods import FIRST_TOKEN_WEIGHT, METHODS, hold_first_tokens
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.search import search
from rome_fast.statistics import Statistics, first_token_statistics, first_tokens, list_cache
from rome_fast.statistics.store import FIRST_TOKENS, read_layer
from toys import D_FF, HIDDEN, VOCABULARY, save_toy, toy_model

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# C + C₁ of any toy has a condition below 1e4.
ALLOWED = {dtype: rounding_of_edit(dtype, 1e4) for dtype in DTYPES.values()}

FIRST = (START, Edit("{} is the capital of", "Berlin", "France"))

pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture(scope="module")
def vocabulary_moment():
    """A function of a kind that returns C₁ of its toy by the oracle."""
    return functools.cache(lambda kind: oracle.first_token_moment(toy_model(kind), LAYER))


@pytest.fixture(scope="module")
def textbook(toy_tokenizers, toy_moment, vocabulary_moment):
    """A function of (kind, edit, whether C is on) that returns the oracle's edit."""

    @functools.cache
    def result(kind, edit, statistics=True):
        return oracle.dual(
            toy_model(kind),
            toy_tokenizers[False],
            edit.prompt,
            edit.subject,
            edit.target,
            layer=LAYER,
            contexts=CONTEXTS,
            second_moment=toy_moment(kind, False)[0] if statistics else None,
            first_tokens=vocabulary_moment(kind),
            weight=FIRST_TOKEN_WEIGHT,
            ridge=METHODS["dual"].ridge,
            scale=search.BARE_SCALE,
            steps=SETTINGS.steps,
            stop_loss=SETTINGS.stop_loss,
        )

    return result


def key_of(model, tokenizer, text):
    """(d_ff,) float64: at the first token."""
    return oracle.keys_of(oracle.double_copy(model), LAYER, tokenizer(text)["input_ids"])[0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_first_token_edit_is_that_of_the_textbook(kind, dtype, toy_tokenizers, toy_statistics, textbook):
    model = toy_model(kind, dtype=dtype)
    wanted = textbook(kind, START)
    result = edited(model, toy_tokenizers[False], START, method="dual", statistics=toy_statistics(model, False))
    assert relative_error(delta_w(result), wanted.delta_w) < ALLOWED[dtype]
    (record,) = result.records
    figures = [record.loss, record.denominator, record.numerator_norm, record.update_norm]
    prefixed = wanted.prefixed
    true = [prefixed.losses[-1], prefixed.denominator, prefixed.numerator_norm, float(wanted.delta_w.norm())]
    assert figures == pytest.approx(true, rel=ALLOWED[dtype])
    assert record.method == "dual"
    (update,) = result.delta.updates.values()
    assert update.left.shape == (HIDDEN, 2)


def test_without_statistics_it_is_that_of_the_textbook_too(toy_tokenizers, textbook):
    model = toy_model("llama", dtype=torch.float64)
    result = edited(model, toy_tokenizers[False], START, method="dual", statistics="identity")
    wanted = textbook("llama", START, statistics=False).delta_w
    assert relative_error(delta_w(result), wanted) < ALLOWED[torch.float64]


def test_both_keys_get_their_values(toy_tokenizers, toy_statistics, textbook):
    """Read off the edited model, not off the update."""
    model, tokenizer = toy_model("llama", dtype=torch.float64), toy_tokenizers[False]
    before, wanted = oracle.weight_and_bias(toy_model("llama", dtype=torch.float64), LAYER)[0], textbook("llama", START)
    exactly = replace(METHODS["dual"], ridge=0.0, ridge_per_edit=0.0)
    edited(model, tokenizer, START, method=exactly, statistics=toy_statistics(model, False))
    change = oracle.weight_and_bias(model, LAYER)[0] - before
    bare = key_of(model, tokenizer, START.text)
    assert relative_error(change @ bare, wanted.unprefixed.residual) < ALLOWED[torch.float64]
    assert relative_error(change @ wanted.prefixed.k_mean, wanted.prefixed.delta) < ALLOWED[torch.float64]
    # Not so by c-rome: what it does there is another thing.
    model = toy_model("llama", dtype=torch.float64)
    edited(model, tokenizer, START, statistics=toy_statistics(model, False))
    assert relative_error((oracle.weight_and_bias(model, LAYER)[0] - before) @ bare, wanted.unprefixed.residual) > 0.5


def test_other_first_tokens_are_held_where_they_are(toy_tokenizers, toy_statistics, vocabulary_moment, monkeypatch):
    """The mean square of what an edit does to them is what λ weighs."""
    tokenizer, first = toy_tokenizers[False], vocabulary_moment("llama")
    leak = {}
    for weight in (0.0, FIRST_TOKEN_WEIGHT, 100.0):
        monkeypatch.setattr("rome_fast.methods.closed_form.FIRST_TOKEN_WEIGHT", weight)
        model = toy_model("llama", dtype=torch.float64)
        result = edited(model, tokenizer, START, method="dual", statistics=toy_statistics(model, False))
        leak[weight] = float(torch.trace(delta_w(result) @ first @ delta_w(result).T))
    assert leak[100.0] < leak[FIRST_TOKEN_WEIGHT] < leak[0.0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_other_edit_holds_both_keys_with_one_value(dtype, toy_tokenizers, toy_statistics, textbook):
    """That of c-rome; nothing about first tokens is collected."""
    model, wanted = toy_model("llama", dtype=dtype), textbook("llama", MIDDLE)
    result = edited(model, toy_tokenizers[False], MIDDLE, method="dual", statistics=toy_statistics(model, False))
    assert not wanted.first_token
    assert relative_error(delta_w(result), wanted.delta_w) < ALLOWED[dtype]
    (record,) = result.records
    assert record.loss == pytest.approx(wanted.prefixed.losses[-1], rel=ALLOWED[dtype])
    assert record.denominator == pytest.approx(wanted.prefixed.denominator, rel=ALLOWED[dtype])
    added = wanted.delta_w @ wanted.unprefixed.k_den
    share = float(added @ wanted.prefixed.delta / wanted.prefixed.delta.square().sum())
    assert record.share_bare == pytest.approx(share, rel=ALLOWED[dtype])
    assert "first tokens" not in result.seconds
    assert list_cache() == []


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_joint_edit_is_that_of_the_textbook(
    dtype, toy_tokenizers, toy_statistics, toy_moment, vocabulary_moment, textbook
):
    """First tokens before, between and behind other subjects."""
    model, edits = toy_model("gpt2", dtype=dtype), (FIRST[0], MIDDLE, FIRST[1], END)
    exact, usual = replace(METHODS["dual"], ridge=0.0, ridge_per_edit=0.0), METHODS["dual"]
    alone = [textbook("gpt2", edit) for edit in edits]
    assert [one.first_token for one in alone] == [True, False, True, False]
    solved = (toy_moment("gpt2", False)[0], vocabulary_moment("gpt2"), FIRST_TOKEN_WEIGHT)
    for method, ridge in ((usual, 0.003), (exact, 0.0)):
        statistics = toy_statistics(model, False)
        result = edited(model, toy_tokenizers[False], edits, method=method, statistics=statistics)
        result.revert()
        assert relative_error(delta_w(result), oracle.dual_joint(alone, *solved, ridge)) < ALLOWED[dtype]
    norms = [float(oracle.dual_joint([one], *solved, 0.0).norm()) for one in alone]
    assert [r.update_norm for r in result.records] == pytest.approx(norms, rel=ALLOWED[dtype])
    assert [r.loss for r in result.records] == pytest.approx([o.prefixed.losses[-1] for o in alone], rel=ALLOWED[dtype])


def test_sequential_is_one_after_the_other(toy_tokenizers, toy_statistics):
    model, by_hand = toy_model("gpt2", dtype=torch.float64), toy_model("gpt2", dtype=torch.float64)
    tokenizer, statistics, edits = toy_tokenizers[False], toy_statistics(model, False), (START, MIDDLE, FIRST[1])
    usual = {"method": "dual", "statistics": statistics}
    result = edited(model, tokenizer, edits, schedule="sequential", **usual)
    steps = [edited(by_hand, tokenizer, edit, **usual) for edit in edits]
    assert relative_error(delta_w(result), sum(map(delta_w, steps))) < ALLOWED[torch.float64]
    (update,) = result.delta.updates.values()
    assert update.left.shape[1] == 3 * 2


def test_a_delta_of_it_is_saved_loaded_and_undone(tmp_path, toy_tokenizers):
    model = toy_model("llama")
    before = all_bits(model)
    result = edited(model, toy_tokenizers[False], START, method="dual")
    after = all_bits(model)
    assert changed(model, before) == ["model.layers.1.mlp.down_proj.weight"]
    result.revert()
    assert changed(model, before) == []
    result.delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    loaded.apply(model)
    assert changed(model, after) == []
    assert loaded.metadata["method"] == "dual"


# Whether it worked


def test_needs_prefix_says_whether_the_fact_answers_bare(toy_tokenizers):
    """A target of a dozen tokens does not get to lead in a step; an easy one does in forty."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    settings = replace(SETTINGS, stop="argmax", steps=40, draft_rows=0)
    easy = Edit("{}", "Chicago", "Rome")
    for edit, steps, needs in ((easy, 40, False), (START, 1, True)):
        for method in ("dual", "c-rome"):
            result = edited(
                model, tokenizer, edit, method=method, settings=replace(settings, steps=steps), measure=True
            )
            (record,) = result.records
            assert record.needs_prefix == (needs or method == "c-rome")
            assert record.converged == (not needs)
            if not needs and method == "dual":
                assert record.argmax_after
                assert record.argmax_after_prefixed == 1
            result.revert()


def test_a_bare_value_that_is_not_found_leaves_the_whole_edit_out(toy_tokenizers, monkeypatch):
    """Half of an edit would say that it answers without a prefix, and would not."""
    model, tokenizer = toy_model("gpt2"), toy_tokenizers[False]
    before = all_bits(model)
    settings = replace(SETTINGS, stop="argmax", steps=40, draft_rows=0)
    easy = Edit("{}", "Chicago", "Rome")
    found = search.optimise_values

    def spoilt(runner, chunks, *arguments, **options):
        chunks = list(chunks)
        values = found(runner, chunks, *arguments, **options)
        rows = chunks[0].rows[0]
        return values if len(rows) > 2 else [replace(value, led=0.0, losses=(1.0, 7.0)) for value in values]

    monkeypatch.setattr(search, "optimise_values", spoilt)
    with pytest.warns(ConvergenceWarning, match="'Chicago' → 'Rome': the target leads in too few rows, loss 7"):
        result = edited(model, tokenizer, [easy], method="dual", settings=settings, unconverged="skip")
    (record,) = result.records
    assert (record.applied, record.converged, record.needs_prefix, record.steps) == (False, False, True, 2)
    assert changed(model, before) == []


def test_the_guard_sees_both_keys(toy_tokenizers, monkeypatch):
    """‖Δ‖ of an edit is that of its two columns together."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    before = all_bits(model)
    result = edited(model, tokenizer, START, method="dual")
    both = result.records[0].update_norm / result.records[0].weight_norm
    result.revert()
    result = edited(model, tokenizer, START, method="c-rome")
    one = result.records[0].update_norm / result.records[0].weight_norm
    result.revert()
    assert one < both
    monkeypatch.setattr("rome_fast.closing.guard.UPDATE_RATIO_LIMIT", (one + both) / 2)
    with pytest.raises(CollapseError, match="by method 'dual' would collapse the model"):
        edited(model, tokenizer, START, method="dual", guard="raise")
    assert changed(model, before) == []
    assert edited(model, tokenizer, START, method="c-rome", guard="raise").records[0].applied


# The keys of all first tokens


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_their_second_moment_is_that_of_the_oracle(kind, dtype, monkeypatch, vocabulary_moment):
    """In batches that do not divide the vocabulary."""
    monkeypatch.setitem(first_tokens._BATCH_TOKENS, "cpu", 97)
    entry = first_token_statistics(Runner(toy_model(kind, dtype=dtype)), [LAYER])[LAYER]
    # Quadratic in the keys, which lie in the first half of the model.
    assert relative_error(entry.moment, vocabulary_moment(kind)) < 2 * rounding(dtype, FORWARD / 2)
    assert (entry.moment.dtype, entry.tokens, entry.layer) == (dtype, VOCABULARY, LAYER)


def test_they_are_collected_once(toy_tokenizers, empty_cache, monkeypatch):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    result = edited(model, tokenizer, START, method="dual")
    wanted, seconds = delta_w(result), result.seconds
    assert "first tokens" in seconds
    (file,) = empty_cache.rglob("*.safetensors")
    (entry,) = list_cache()
    assert (entry.file, entry.layer, entry.tokens, entry.width, entry.first_tokens) == (file, LAYER, 600, D_FF, True)
    assert entry.model == str(Fingerprint.of(Runner(model), LAYER)) in file.parent.name
    # An edit of that layer leaves its keys as they are.
    monkeypatch.setattr(first_tokens, "_collect", None)
    again = edited(toy_model("llama"), tokenizer, START, method="dual")
    assert torch.equal(delta_w(again), wanted)
    assert torch.equal(
        first_token_statistics(Runner(model), [LAYER])[LAYER].moment, read_layer(file, FIRST_TOKENS).moment
    )


def test_those_of_another_model_layer_or_kind_are_not_taken(toy_statistics, empty_cache):
    model = toy_model("llama")
    own_moment = first_token_statistics(Runner(model), [LAYER])[LAYER].moment
    for other, layer in ((toy_model("llama", seed=1), LAYER), (toy_model("gpt2"), LAYER), (model, LAYER + 1)):
        assert relative_error(first_token_statistics(Runner(other), [layer])[layer].moment, own_moment) > 0.1
    assert len(list_cache()) == 4
    # C and C₁ of one layer stand side by side, and are not taken for each other.
    (folder,) = {
        entry.file.parent for entry in list_cache() if entry.model == str(Fingerprint.of(Runner(model), LAYER))
    }
    toy_statistics(model, False).save(folder)
    runner = Runner(model)
    c, first = (
        Statistics.cached(runner, [LAYER]).layers[LAYER].moment,
        first_token_statistics(runner, [LAYER])[LAYER].moment,
    )
    assert relative_error(c, first) > 0.1
    assert [entry.first_tokens for entry in list_cache() if entry.file.parent == folder] == [False, True]


def test_damaged_ones_are_made_again(empty_cache):
    runner = Runner(toy_model("gpt2"))
    wanted = first_token_statistics(runner, [LAYER])[LAYER].moment
    (file,) = empty_cache.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    assert "damaged" in list_cache()[0].problem
    assert torch.equal(first_token_statistics(runner, [LAYER])[LAYER].moment, wanted)
    assert list_cache()[0].problem == ""


def test_keys_that_are_not_finite_are_refused(toy_tokenizers):
    model = toy_model("gpt2", dtype=torch.float16)
    with torch.no_grad():
        # A token that no text of the edit has: in fp16 its hidden state overflows.
        model.transformer.wte.weight[VOCABULARY - 1] = 6e4
        model.transformer.wpe.weight[0] = 6e4
    before = all_bits(model)
    with pytest.raises(StatisticsError, match="keys of layer 1 contain NaN or infinity at position 0"):
        edited(model, toy_tokenizers[False], START, method="dual")
    assert changed(model, before) == []


def test_held_first_tokens_by_hand():
    keys = torch.randn(30, 7, dtype=torch.float64)
    c, first = keys[:20].T @ keys[:20], keys[20:].T @ keys[20:]
    for factor, wanted in ((torch.linalg.cholesky(c), c), (None, torch.eye(7, dtype=torch.float64))):
        lower = hold_first_tokens(factor, first)
        assert relative_error(lower @ lower.T, wanted + FIRST_TOKEN_WEIGHT * first) < rounding(torch.float64, 30 + 7)
        assert torch.equal(lower, lower.tril())


def test_a_sum_that_is_not_positive_definite_is_refused():
    """C hardly positive definite, and a C₁ that rounding has given a negative eigenvalue."""
    with pytest.raises(StatisticsError, match=r"is singular \(Cholesky stops at pivot 1 of 5\); .*with_ridge"):
        hold_first_tokens(1e-6 * torch.eye(5, dtype=torch.float64), -1e-3 * torch.eye(5))


# The other ways in


def test_a_streamed_edit_has_the_bytes_of_a_resident_one(tmp_path, toy_tokenizers, monkeypatch):
    source = save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[False], max_shard_size="100KB")
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)
    usual = {
        "method": "dual",
        "statistics": "identity",
        "layer": LAYER,
        "contexts": CONTEXTS,
        "settings": SETTINGS,
        "guard": "off",
        "unconverged": "write",
    }
    found = {}
    for memory in (None, 220_000):
        # Each collects the keys of first tokens for itself.
        monkeypatch.setenv("ROME_FAST_CACHE", str(tmp_path / f"cache {memory}"))
        out = tmp_path / f"out {memory}"
        result = apply_edits(source, [START, MIDDLE], out=out, memory=memory, **usual)
        assert "first tokens" in result.seconds
        found[memory] = delta_w(result), [record.to_json() for record in result.records], checkpoints.load(out)[0]
    assert torch.equal(found[None][0], found[220_000][0])
    assert found[None][1] == found[220_000][1]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(*(bits(found[memory][2].get_parameter(name)) for memory in found))


def test_a_plan_counts_the_pass_over_the_vocabulary(tmp_path, toy_tokenizers, monkeypatch):
    source = save_toy(tmp_path / "source", toy_model("llama"), toy_tokenizers[False], max_shard_size="100KB")
    monkeypatch.setattr(checkpoints, "anonymous_bytes", lambda: 0)
    usual = {"statistics": "identity", "layer": LAYER, "contexts": CONTEXTS, "memory": 220_000}
    one = plan(source, START, method="c-rome", **usual)
    two = plan(source, START, method="dual", **usual)
    other = plan(source, MIDDLE, method="dual", **usual)
    assert (two.passes["first tokens"], two.batches) == (1, 2)
    assert 0 < two.read_bytes["first tokens"] < two.model_bytes
    assert one.batches == other.batches == 1
    assert "first tokens" not in one.passes.keys() | other.passes.keys()


def test_on_the_command_line(tmp_path, toy_tokenizers, capsys):
    source = save_toy(tmp_path / "source", toy_model("gpt2"), toy_tokenizers[False])
    file = tmp_path / "edits.jsonl"
    file.write_text(json.dumps({"prompt": START.prompt, "subject": START.subject, "target_new": "Rome"}))
    arguments = ["edit", source, "--edits", file, "--method", "dual", "--identity", "--layer", LAYER, "--guard", "off"]
    arguments += ["--unconverged", "write", "--out", tmp_path / "out", "--json", tmp_path / "report.json"]
    assert main([str(argument) for argument in arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == report["edits"][0]["method"] == "dual"
    assert "first tokens" in report["seconds"]
    main(["statistics", "--list"])
    assert f"layer {LAYER} " in capsys.readouterr().out


def test_the_baseline_of_the_benchmark_finds_one_value(toy_tokenizers):
    """A first token wants a second one, which it does not look for; any other edit is that of the textbook."""
    arguments = {"layer": LAYER, "settings": SETTINGS, "factor": None, "method": "dual"}
    with pytest.raises(ArgumentError, match="method: got 'dual' for subject 'Chicago', the first token, wanted"):
        edit_as_released(toy_model("gpt2"), toy_tokenizers[False], START, CONTEXTS, **arguments)
    model = toy_model("gpt2", dtype=torch.float64)
    made = edit_as_released(model, toy_tokenizers[False], MIDDLE, CONTEXTS, **arguments)
    result = edited(model, toy_tokenizers[False], MIDDLE, method="dual")
    assert relative_error(delta_w(made.delta), delta_w(result)) < ALLOWED[torch.float64]
