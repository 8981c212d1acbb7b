"""Methods of one layer and of several against textbooks that write every update into a copy of the model.

Values are those that the package has found, whose search has tests of its own: what is compared here is keys and their
averages, what is still missing at each layer, the closed form, and what the edited model's own forward makes of it.
"""

import functools
import math
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
    START,
    all_bits,
    changed,
    delta_w,
    edited,
    relative_error,
    rounding,
    rounding_of_edit,
)
from rome_fast import Edit, apply_edits, verify
from rome_fast.closing import walk
from rome_fast.closing.judging import SharedKeyWarning
from rome_fast.errors import ArgumentError, ModelError, StatisticsError
from rome_fast.methods import FIRST_TOKEN_WEIGHT, METHODS, Column, Method
from rome_fast.models.runner import Runner
from rome_fast.statistics import Statistics, first_token_statistics
from toys import D_FF, LAYERS, toy_model, toy_tokenizer
from zoo import zoo_model

FP64 = torch.float64
KINDS = ("llama", "gpt2")
SPREAD = (0, 1, 2)
GAP = (0, 2)  # with a layer between them that is not edited
EDITS = (START, MIDDLE, Edit("{} is the capital of", "Berlin", "France"), END)

# So that they matter as much on a toy as the published ones do on a model: kᵀC⁻¹k of a key is about D_FF, and half of
# the eigenvalues of C are below the threshold.
# With a ridge that shows in few edits.
DUAL = replace(METHODS["dual"], ridge=0.03)
MEMIT = replace(METHODS["memit"], penalty=D_FF / 4)
HISTORY = replace(METHODS["memit-history"], penalty=D_FF / 4)
ENCORE = replace(METHODS["encore"], penalty=D_FF / 4)
ALPHAEDIT = {
    "llama": replace(METHODS["alphaedit"], penalty=3.0, null_space=0.7),
    "gpt2": replace(METHODS["alphaedit"], penalty=0.5, null_space=0.11),
}

# Relative, of what is added by an update that is solved for with C = I, or is read off the edited model: a forward for
# each of two layers, and keys whose Gram matrix has a condition of less than 100.
EDITED = rounding(FP64, 2 * FORWARD, 100)

pytestmark = [
    pytest.mark.usefixtures("empty_cache"),
    # The ridge of "dual" leaves each of a few edits of a toy off by up to a tenth.
    pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning"),
]


@pytest.fixture(scope="module")
def moments(toy_moment):
    """A function of a kind that returns C of its toy by layer."""
    return functools.cache(lambda kind: {layer: toy_moment(kind, False, layer)[0] for layer in range(LAYERS)})


@pytest.fixture
def edit_toy(toy_tokenizers, toy_statistics):
    """A function that edits a toy in float64 without BOS, with C, and returns the model and the result."""

    def made(kind, edits, method, layers=SPREAD, **changes):
        model = toy_model(kind, dtype=FP64)
        entries = [toy_statistics(model, False, layer).layers[layer] for layer in layers]
        usual = {"statistics": Statistics(entries), "layer": None, "layers": layers, "method": method}
        return model, edited(model, toy_tokenizers[False], edits, **(usual | changes))

    return made


def placed(tokenizer, edit, solved):
    """The edit with the values found for it, as the textbook takes it."""
    prompt = edit.prompt.removeprefix(edit.head or "")
    bare, *behind = (
        oracle.make_row(tokenizer, context, prompt, edit.subject, None, head=edit.head) for context in ("", *CONTEXTS)
    )
    own = None if solved.bare is None else solved.bare.value.delta
    return oracle.Placed(bare, behind, solved.value.delta, own)


def all_placed(tokenizer, edits, group):
    return [placed(tokenizer, edit, solved) for edit, solved in zip(edits, group, strict=True)]


def updates_of(model, result):
    """(d, d_ff) by layer."""
    runner = Runner(model)
    names = {runner.weight_name(layer): layer for layer in range(len(runner.layers))}
    return {names[name]: update.dense() for name, update in result.delta.updates.items()}


def worst_error(got, wanted):
    assert list(got) == list(wanted)
    return max(relative_error(got[layer], wanted[layer]) for layer in wanted)


def allowed(matrices):
    """Of an update: a forward for each layer, whose rounding what is solved with magnifies by its condition at most."""
    return rounding(FP64, len(SPREAD) * FORWARD, max(float(torch.linalg.cond(m)) for m in matrices))


def first_tokens(model, layers):
    """C₁ by layer, whose own test is another file's."""
    return {layer: entry.moment for layer, entry in first_token_statistics(Runner(model), layers).items()}


def written(model, updates):
    """A copy of the model with these updates in its weights."""
    copy = oracle.double_copy(model)
    for layer, update in updates.items():
        oracle.add_to_weight(copy, layer, update)
    return copy


def added(one, other):
    return {layer: one[layer] + other[layer] for layer in one}


# Closed forms


@pytest.mark.parametrize("layers", [SPREAD, (LAYER,)], ids=["spread", "one layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_memit_is_that_of_the_textbook(kind, layers, edit_toy, found, toy_tokenizers, moments):
    model, result = edit_toy(kind, EDITS, MEMIT, layers)
    group = all_placed(toy_tokenizers[False], EDITS, found[0])
    wanted, _ = oracle.memit(toy_model(kind), group, layers, moments(kind), MEMIT.penalty)
    assert worst_error(updates_of(model, result), wanted) < allowed(moments(kind).values())
    other, _ = oracle.memit(toy_model(kind), group, layers, moments(kind), MEMIT.penalty / 2)
    assert worst_error(other, wanted) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_memit_holds_what_earlier_batches_asked_for(kind, edit_toy, found, toy_tokenizers, moments):
    """Only where it is told to: the keys of the first batch are in the second one's matrix."""
    for method in (MEMIT, HISTORY):
        found.clear()
        model, result = edit_toy(kind, EDITS, method, schedule="sequential", batch_size=2)
        batches = [all_placed(toy_tokenizers[False], EDITS[2 * i : 2 * i + 2], group) for i, group in enumerate(found)]
        first, keys = oracle.memit(toy_model(kind), batches[0], SPREAD, moments(kind), method.penalty)
        then = written(toy_model(kind), first)
        usual = (then, batches[1], SPREAD, moments(kind), method.penalty)
        with_keys, without = oracle.memit(*usual, keys)[0], oracle.memit(*usual)[0]
        right, wrong = (with_keys, without) if method.remembers else (without, with_keys)
        got = updates_of(model, result)
        assert worst_error(got, added(first, right)) < allowed(moments(kind).values())
        assert worst_error(got, added(first, wrong)) > 1e-3


@pytest.mark.parametrize("statistics", ["C", "identity"])
def test_encore_is_that_of_the_textbook(statistics, edit_toy, found, toy_tokenizers, moments):
    """Two batches; the update's own norm counts in both."""
    kind, given = "llama", {"statistics": "identity"} if statistics == "identity" else {}
    moment = None if given else moments(kind)
    model, result = edit_toy(kind, EDITS, ENCORE, schedule="sequential", batch_size=2, **given)
    batches = [all_placed(toy_tokenizers[False], EDITS[2 * i : 2 * i + 2], group) for i, group in enumerate(found)]

    def wanted(norm_penalty):
        first, keys = oracle.memit(
            toy_model(kind), batches[0], SPREAD, moment, ENCORE.penalty, norm_penalty=norm_penalty
        )
        then = written(toy_model(kind), first)
        return added(first, oracle.memit(then, batches[1], SPREAD, moment, ENCORE.penalty, keys, norm_penalty)[0])

    got = updates_of(model, result)
    assert worst_error(got, wanted(20.0)) < allowed(moments(kind).values())
    assert worst_error(got, wanted(0.0)) > 1e-2


def test_a_norm_penalty_is_beside_a_penalty():
    for wrong in ({"penalty": 0.0}, {"norm_penalty": -1.0}, {"norm_penalty": float("nan")}, {"null_space": 0.1}):
        with pytest.raises(ArgumentError, match="norm_penalty"):
            replace(ENCORE, **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_alphaedit_is_that_of_the_textbook(kind, edit_toy, found, toy_tokenizers, moments):
    """Two batches, the keys of the first one cached."""
    method = ALPHAEDIT[kind]
    model, result = edit_toy(kind, EDITS, method, schedule="sequential", batch_size=2)
    batches = [all_placed(toy_tokenizers[False], EDITS[2 * i : 2 * i + 2], group) for i, group in enumerate(found)]
    usual = (SPREAD, moments(kind), method.null_space, method.penalty)
    first, keys = oracle.alphaedit(toy_model(kind), batches[0], *usual)
    then = written(toy_model(kind), first)
    second, more_keys = oracle.alphaedit(then, batches[1], *usual, keys)
    # Of K_p K_pᵀ P + K Kᵀ P + L₂ I, and of P: an eigenvector turns by the rounding of C over the gap at the threshold.
    seen = [torch.cat([keys[layer], more_keys[layer]], dim=1) for layer in SPREAD]
    matrices = [k @ k.T + method.penalty * torch.eye(D_FF, dtype=FP64) for k in seen]
    bound = allowed(matrices)
    for layer in SPREAD:
        values = torch.linalg.eigvalsh(moments(kind)[layer])
        below, above = values[values < method.null_space], values[values >= method.null_space]
        assert min(len(below), len(above)) > D_FF / 4
        bound += rounding(FP64, D_FF, float(values[-1] / (above[0] - below[-1])))
    assert worst_error(updates_of(model, result), added(first, second)) < bound
    without, _ = oracle.alphaedit(then, batches[1], *usual)
    assert worst_error(without, second) > 1e-2


@pytest.mark.parametrize("layers", [SPREAD, (LAYER,)], ids=["spread", "one layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_emmet_is_that_of_the_textbook(kind, layers, edit_toy, found, toy_tokenizers, moments):
    model, result = edit_toy(kind, EDITS, "emmet", layers)
    group = all_placed(toy_tokenizers[False], EDITS, found[0])
    wanted, keys = oracle.emmet(toy_model(kind), group, layers, moments(kind))
    bound = allowed([*moments(kind).values(), *(k.T @ k for k in keys.values())])
    assert worst_error(updates_of(model, result), wanted) < bound


@pytest.mark.parametrize("layers", [SPREAD, (LAYER,)], ids=["spread", "one layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_dual_is_that_of_the_textbook(kind, layers, edit_toy, found, toy_tokenizers, moments):
    """Two of the subjects are the first token, with a value of their own for the bare prompt."""
    model, result = edit_toy(kind, EDITS, DUAL, layers)
    group = all_placed(toy_tokenizers[False], EDITS, found[0])
    assert [edit.bare_delta is None for edit in group] == [False, True, False, True]
    first = first_tokens(toy_model(kind, dtype=FP64), layers)
    usual = (toy_model(kind), group, layers, moments(kind), first, FIRST_TOKEN_WEIGHT)
    reach = DUAL.reach if len(layers) > 1 else 1.0
    wanted, _ = oracle.spread_dual(*usual, DUAL.ridge, DUAL.sharing, reach)
    matrices = [moments(kind)[layer] + FIRST_TOKEN_WEIGHT * first[layer] for layer in layers]
    assert worst_error(updates_of(model, result), wanted) < allowed([*moments(kind).values(), *matrices])
    assert worst_error(oracle.spread_dual(*usual, 0.0, DUAL.sharing, reach)[0], wanted) > 0.01
    once = oracle.spread_dual(*usual, DUAL.ridge, DUAL.sharing)[0]
    assert (worst_error(once, wanted) > 0.01) == (len(layers) > 1)
    even = oracle.spread_dual(*usual, DUAL.ridge, 1.0, reach)[0]
    assert (worst_error(even, wanted) > 0.01) == (len(layers) > 1)


def test_a_ridge_grows_with_the_edits_up_to_its_largest_and_the_reach_shrinks_with_it():
    dual = METHODS["dual"]
    assert [dual.ridge_of(n) for n in (1, 100, 300, 1000)] == pytest.approx([0.003, 0.1161786, 0.6036814, 0.75])
    assert METHODS["rome"].ridge_of(1000) == 0.0
    assert [dual.reach_of(n) for n in (1, 8, 30, 1000)] == pytest.approx([1.15, 1.15, 1.0235722, 1.0006])
    assert replace(dual, ridge=0.0, ridge_per_edit=0.0).reach_of(1000) == dual.reach
    assert {method.reach_of(n) for name, method in METHODS.items() if name != "dual" for n in (1, 1000)} == {1.0}


# What the edited model makes of it


@pytest.mark.parametrize("name", ["dual", "dual without ridge", "memit"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_is_what_the_record_says(name, kind, edit_toy, found, toy_tokenizers):
    """By forwards of both models: in the last edit layer's output at the subject, behind each context and without."""
    exact = replace(DUAL, ridge=0.0, ridge_per_edit=0.0)
    method = {"dual": DUAL, "dual without ridge": exact, "memit": MEMIT}[name]
    model, result = edit_toy(kind, EDITS, method, GAP)
    before = toy_model(kind, dtype=FP64)
    assert result.records[0].layers == list(GAP)
    assert result.condition < 100
    for edit, record in zip(all_placed(toy_tokenizers[False], EDITS, found[0]), result.records, strict=True):
        behind = oracle.arrived(before, model, GAP[-1], edit.behind)
        bare = oracle.arrived(before, model, GAP[-1], [edit.bare])
        delta = method.reach * edit.delta
        own = delta if edit.bare_delta is None else edit.bare_delta
        if method is MEMIT:
            got, wanted = (behind + bare) / 2, delta
        else:
            got, wanted = torch.cat([behind, bare]), torch.cat([delta, own])
        assert record.missed == pytest.approx(relative_error(got, wanted), abs=EDITED)
        assert record.share_bare == pytest.approx(float(bare @ own / (own @ own)), abs=EDITED)
        # Each subject's own: the ridge is 0.03, and MEMIT's λ as large as the Gram matrix of the keys.
        assert (record.missed < EDITED) == (method is exact)
        assert record.missed < (0.1 if method is DUAL else 1.0)


def test_a_delta_changes_one_weight_of_each_layer_and_is_undone_to_the_bit(edit_toy):
    before = all_bits(toy_model("llama", dtype=FP64))
    model, result = edit_toy("llama", EDITS, "dual")
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in SPREAD]
    assert list(result.delta.updates) == changed(model, before) == names
    # Two columns for every edit.
    assert {update.left.shape[1] for update in result.delta.updates.values()} == {2 * len(EDITS)}
    result.revert()
    assert changed(model, before) == []


def test_an_edit_without_a_value_of_its_own_misses_nothing(edit_toy):
    """At the last layer, a subject in the middle reaches no token of the target: its δ is zero.

    To rounding, which CPUs differ in: what is said of it is of nothing, or of a δ that is nothing but rounding.
    """
    result = edit_toy("llama", EDITS, "dual", (LAYERS - 2, LAYERS - 1), statistics="identity")[1]
    inside, at_the_end = result.records[2:]
    assert inside.subject == "Berlin"
    assert 0 <= inside.missed < 0.2
    assert (inside.share_bare is None) == (inside.missed == 0)
    assert 0 < at_the_end.missed < 0.2
    assert at_the_end.share_bare == pytest.approx(1, abs=at_the_end.missed * 2**0.5)


def test_no_keys_are_said_to_be_shared_that_are_not(edit_toy, recwarn):
    """By an edit alone, which the ridge leaves off, and by edits that are measured behind the prompt alone."""
    for edits, method, least in ((START, replace(DUAL, ridge=0.3), 0.1), (EDITS, "emmet", 0.05)):
        result = edit_toy("gpt2", edits, method)[1]
        assert max(record.missed for record in result.records) > least
    assert not [warning for warning in recwarn if issubclass(warning.category, SharedKeyWarning)]
    edit_toy("gpt2", EDITS, replace(DUAL, ridge=3.0))
    said = str(recwarn.pop(SharedKeyWarning).message)
    assert f"or as {len(EDITS)} edits at once want a ridge:" in said
    # Without the guard the ridge is the same.
    assert "guard" not in said


def test_sequential_is_one_after_another(edit_toy, toy_tokenizers):
    # Not EDITS: with a first token behind another edit, C₁ of the upper layers would be of two models.
    edits = (START, MIDDLE, END)
    model, result = edit_toy("gpt2", edits, "dual", schedule="sequential", statistics="identity")
    by_hand = toy_model("gpt2", dtype=FP64)
    usual = {"layer": None, "layers": SPREAD, "method": "dual"}
    steps = [updates_of(by_hand, edited(by_hand, toy_tokenizers[False], edit, **usual)) for edit in edits]
    # Values are searched for in models whose weights are rounded at other times, in four steps of Adam.
    assert worst_error(updates_of(model, result), functools.reduce(added, steps)) < rounding_of_edit(FP64, 1e4)


@pytest.mark.parametrize("name", ["dual", "memit"])
def test_rows_that_cannot_share_a_past_are_run_whole(name, found, toy_tokenizers):
    model, before = (oracle.exact_norms(zoo_model("lfm2", dtype=FP64)) for _ in range(2))
    tokenizer = toy_tokenizers[False]
    method = DUAL if name == "dual" else MEMIT
    assert not verify(model, GAP[0]).shares_past
    result = edited(model, tokenizer, EDITS, layer=None, layers=GAP, method=method)
    check_without_statistics(before, model, result, all_placed(tokenizer, EDITS, found[0]))


@pytest.mark.parametrize("name", ["dual", "memit"])
def test_chats_and_plain_prompts_go_the_same_way_behind_what_they_stand_behind(name, found, monkeypatch):
    """More heads than have their contexts kept from the search, and more rows than go through a layer at a time."""
    monkeypatch.setitem(walk._POSITIONS, "cpu", 60)
    tokenizer = toy_tokenizer(False)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role + '\n' + m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    question = {"role": "user", "content": "Where is {}?"}
    systems = ("Be short.", "Answer as a sailor would, in some words.")
    edits = [START, Edit.chat([question], "Vienna", "Rome", tokenizer), END]
    for system, subject in zip(systems, ("Toronto", "Madrid"), strict=True):
        edits.append(Edit.chat([{"role": "system", "content": system}, question], subject, "Rome", tokenizer))
    assert len({edit.head for edit in edits}) == 4
    model = toy_model("llama", dtype=FP64)
    method = DUAL if name == "dual" else MEMIT
    result = edited(model, tokenizer, edits, layer=None, layers=GAP, method=method)
    check_without_statistics(toy_model("llama", dtype=FP64), model, result, all_placed(tokenizer, edits, found[0]))


def check_without_statistics(before, after, result, group):
    """C = I, by the textbook."""
    assert result.condition < 100
    if result.records[0].method == "memit":
        wanted, _ = oracle.memit(before, group, GAP, None, MEMIT.penalty)
        assert worst_error(updates_of(after, result), wanted) < EDITED
        return
    first = first_tokens(before, GAP)
    usual = (before, group, GAP, None, first, FIRST_TOKEN_WEIGHT)
    wanted, _ = oracle.spread_dual(*usual, DUAL.ridge, DUAL.sharing, DUAL.reach)
    held = [torch.eye(len(c), dtype=FP64) + FIRST_TOKEN_WEIGHT * c for c in first.values()]
    assert worst_error(updates_of(after, result), wanted) < allowed(held)


# Which layers


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_where_what_is_added_does_not_arrive_unchanged_one_layer_is_edited(kind, toy_tokenizers):
    """By default; several that were asked for are refused."""
    model, tokenizer = zoo_model(kind), toy_tokenizers[False]
    before = all_bits(model)
    with pytest.raises(ModelError, match=r"layers: got 0, 1, wanted one: in .* is normalised or scaled"):
        edited(model, tokenizer, MIDDLE, layer=None, layers=[0, 1], method="dual")
    assert changed(model, before) == []
    result = edited(model, tokenizer, MIDDLE, layer=None, method="dual")
    assert result.records[0].layers == [1]
    assert changed(model, before) == list(result.delta.updates) == [verify(model, 1).weight]


def test_by_default_methods_that_spread_do_so(toy_tokenizers):
    """Over the layers from a third of the depth of the one on; the others edit that alone."""
    model = toy_model("llama")
    for name, method in METHODS.items():
        if method.null_space is None:  # C = I has none
            result = edited(model, toy_tokenizers[False], MIDDLE, layer=None, method=name)
            assert result.records[0].layers == ([0, 1] if method.spread else [1]), name
            assert result.layer_source == "depth rule"
            result.revert()
    with pytest.raises(StatisticsError, match="no null space"):
        edited(model, toy_tokenizers[False], MIDDLE, method="alphaedit")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"layers: got \[\], wanted at least one"),
        ([1, 1], r"layers: got \[1, 1\], wanted at least one, none of them twice"),
        ([0, LAYERS], f"layer: got {LAYERS}, wanted one of 0 .. {LAYERS - 1}"),
        ([-1, 0], "layer: got -1, wanted one of"),
        ([0, True], "layer: got True, wanted one of"),
        ([0.0], r"layer: got 0\.0, wanted one of"),
        ("12", "layers: got '12', wanted at least one"),
    ],
)
def test_bad_layers_are_refused_before_anything(layers, message, toy_tokenizers, monkeypatch):
    model = toy_model("llama")
    before = all_bits(model)
    monkeypatch.setattr(Runner, "run", None)
    with pytest.raises(ArgumentError, match=message):
        apply_edits(model, MIDDLE, tokenizer=toy_tokenizers[False], statistics="identity", layers=layers)
    assert changed(model, before) == []


def test_layers_are_named_once(toy_tokenizers, monkeypatch):
    monkeypatch.setattr(Runner, "run", None)
    with pytest.raises(ArgumentError, match=r"layers: got \[0, 1\] and layer=1, wanted one of the two"):
        edited(toy_model("llama"), toy_tokenizers[False], MIDDLE, layers=[0, 1])


def test_their_order_does_not_matter(toy_tokenizers):
    one, other = (toy_model("llama", dtype=FP64) for _ in range(2))
    usual = {"layer": None, "method": "dual"}
    result = edited(one, toy_tokenizers[False], MIDDLE, layers=range(3), **usual)
    same = edited(other, toy_tokenizers[False], MIDDLE, layers=[2, 0, 1], **usual)
    assert result.records[0].layers == same.records[0].layers == [0, 1, 2]
    assert changed(other, all_bits(one)) == []


# Methods of one's own


def test_a_method_of_ones_own(toy_tokenizers, found):
    """What is asked: the mean key of all rows, met in the sense of least squares, Δ = δ kᵀ / (λ + k·k) for C = I."""
    method = Method("ridge-rome", rows="all", columns=(Column(left="mean", at="mean"),), penalty=5.0)
    model, tokenizer = toy_model("gpt2", dtype=FP64), toy_tokenizers[False]
    result = edited(model, tokenizer, MIDDLE, method=method)
    edit = placed(tokenizer, MIDDLE, found[0][0])
    key = oracle.mean_key(oracle.double_copy(toy_model("gpt2")), LAYER, [edit.bare, *edit.behind])
    wanted = torch.outer(edit.delta, key) / (method.penalty + key @ key)
    assert relative_error(delta_w(result), wanted) < EDITED
    assert result.records[0].method == result.delta.metadata["method"] == "ridge-rome"
    assert result.records[0].missed == pytest.approx(5 / (5 + float(key @ key)), rel=EDITED)


def test_one_that_no_edit_could_be_made_by_is_refused():
    with pytest.raises(ArgumentError, match="columns: got none"):
        Method("none", rows="all", columns=())
    with pytest.raises(ArgumentError, match="wanted rows='all' or bare=True, as first tokens have no unprefixed row"):
        Method(
            "two keys", rows="prefixed", columns=(Column("contexts", "contexts"), Column("unprefixed", "unprefixed"))
        )
    with pytest.raises(ArgumentError, match="method: got 'memmit', wanted one of rome, "):
        edited(toy_model("llama"), None, MIDDLE, method="memmit")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: -1} for name in ("ridge", "ridge_per_edit", "penalty", "sharing", "reach")),
        *({name: value} for name in ("ridge", "ridge_per_edit", "penalty", "sharing") for value in ("1", math.nan)),
        *({name: math.inf} for name in ("ridge", "penalty", "null_space", "sharing")),
        {"largest_ridge": -1.0},
        {"penalty": True},
        {"reach": 0},
        {"rows": "prefixd"},
        {"arrival": "ahed"},
        {"columns": ("mean",)},
        {"columns": [Column()]},
    ],
    ids=str,
)
def test_a_description_that_says_nothing_is_refused_when_it_is_made(changes):
    """A word that is misspelt would be taken for one of the others, and a number below 0 for what it is."""
    (name,) = changes
    with pytest.raises(ArgumentError, match=f"^{name}: got "):
        replace(METHODS["memit"], **changes)


def test_a_column_of_no_known_keys_is_refused():
    for name in ("left", "at", "residual"):
        with pytest.raises(ArgumentError, match=f"^{name}: got 'means', wanted one of "):
            Column(**{name: "means"})
    assert replace(METHODS["memit"], largest_ridge=math.inf, penalty=0) != METHODS["memit"]
