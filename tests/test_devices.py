"""No tensor is made on the CPU beside a model on a GPU; shown without a GPU.

In these tests a tensor that is made without a device of its own lands on "meta", as it would on the CPU with a model on
a GPU, and meets the model's tensors with an error. What is made on the host on purpose says so.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers import CONTEXTS, END, LAYER, MIDDLE, START, all_bits, changed, delta_w
from rome_fast import Edit, ValueSettings, apply_edits, collect_statistics, plan
from rome_fast.bench import edit_as_released
from rome_fast.bench.shapes import random_factor
from rome_fast.closing.flow import Flow
from rome_fast.closing.geometry import Geometry
from rome_fast.errors import ArgumentError
from rome_fast.evaluation import evaluate, sentence_perplexity
from rome_fast.methods import METHODS
from rome_fast.models.runner import Runner
from rome_fast.runs.processes import own_device
from rome_fast.search.contexts import sample_contexts
from rome_fast.search.requests import tokenise
from rome_fast.study.cases import cases_of
from rome_fast.study.measure import Study
from rome_fast.study.parts import Folder
from toys import D_FF, SENTENCES, save_toy, toy_model

EDITS = (START, MIDDLE, END)


def make(model, tokenizer, method, geometry, layers=(LAYER,)):
    """Every edit alone and all of them together, as Deltas."""
    settings = ValueSettings(steps=6, margin=0, draft_rows=1)
    runner, how = Runner(model), METHODS[method]
    flow = Flow.measuring(runner, tokenizer, how, {layer: replace(geometry) for layer in layers}, CONTEXTS, settings)
    requests = [tokenise(runner, tokenizer, edit, CONTEXTS, how) for edit in EDITS]
    return [delta for delta, _ in flow.solve_each(requests)], flow.solve(requests)[0]


# The keys of toys have much in common, so that a method with a ridge meets them in part.
@pytest.mark.filterwarnings("ignore::rome_fast.closing.judging.SharedKeyWarning")
@pytest.mark.parametrize(
    ("kind", "method", "layers"),
    [
        *(("llama", name, (LAYER,)) for name in METHODS),
        *(("llama", name, (0, 1, 3)) for name, how in METHODS.items() if how.spread),
        # Weights that are stored the other way round, and layers without operators of our own.
        *(("gpt2", "dual", layers) for layers in ((LAYER,), (0, 1, 3))),
    ],
)
def test_an_edit_makes_its_tensors_where_the_model_is(kind, method, layers, toy_tokenizers):
    model, tokenizer = toy_model(kind), toy_tokenizers[False]
    factor = random_factor(D_FF, torch.device("cpu")).float()
    # A fifth of the eigenvalues are below what AlphaEdit takes for zero.
    geometry = Geometry(factor, factor, torch.linspace(0, 0.1, D_FF).diag())
    wanted, wanted_joint = make(model, tokenizer, method, geometry, layers)
    with torch.device("meta"):
        found, joint = make(model, tokenizer, method, geometry, layers)
    for one, two in zip([*found, joint], [*wanted, wanted_joint], strict=True):
        assert len(one.updates) == len(layers)
        for name, update in two.updates.items():
            assert torch.equal(one.updates[name].dense(), update.dense())


def test_the_baseline_makes_its_tensors_where_the_model_is(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    settings = ValueSettings(steps=3, stop="loss")

    def run():
        return edit_as_released(model, tokenizer, MIDDLE, CONTEXTS, layer=LAYER, settings=settings, factor=None)

    wanted = run()
    with torch.device("meta"):
        found = run()
    assert torch.equal(delta_w(found.delta), delta_w(wanted.delta))


def test_contexts_and_statistics_do_so_too(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]

    def run():
        statistics = collect_statistics(model, tokenizer, SENTENCES[:4], [LAYER], tokens=60)
        return sample_contexts(model, tokenizer, count=4), statistics.layers[LAYER].moment

    wanted, wanted_moment = run()
    with torch.device("meta"):
        found, moment = run()
    assert found == wanted
    assert torch.equal(moment, wanted_moment)


def test_applying_and_measuring_do_so_as_well(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    runner, before = Runner(model), all_bits(model)
    (delta, *_), _ = make(model, tokenizer, "c-rome", Geometry())
    delta.apply(model)
    wanted = evaluate(model, tokenizer, EDITS, CONTEXTS), sentence_perplexity(runner, tokenizer, SENTENCES[:3])
    delta.revert(model)
    with torch.device("meta"):
        delta.apply(model)
        found = evaluate(model, tokenizer, EDITS, CONTEXTS), sentence_perplexity(runner, tokenizer, SENTENCES[:3])
        delta.revert(model)
    assert found == wanted
    assert changed(model, before) == []


def test_a_study_does_so_as_well(toy_tokenizers, tmp_path):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    geometry = Geometry(random_factor(D_FF, torch.device("cpu")))
    settings = ValueSettings(steps=3, stop="loss")
    first = Edit("{} is a twin city of", "Rome", "Vienna", "Paris")

    def run(folder):
        methods = ("rome", "c-rome")
        study = Study(
            model,
            tokenizer,
            LAYER,
            (LAYER,),
            {LAYER: geometry},
            settings,
            methods,
            CONTEXTS,
            CONTEXTS[:1],
            SENTENCES[:2],
            500.0,
        )
        cases = cases_of(Runner(model), tokenizer, [first, MIDDLE], None)
        part = study.measure(cases)
        place = Folder(folder, {"a": 1})
        place.add(0, part)
        return place.write(study.key_norms(), {}), part.factors, part.prefix, load_file(folder / "keys.safetensors")

    *wanted, wanted_keys = run(tmp_path / "wanted")
    with torch.device("meta"):
        *found, keys = run(tmp_path / "found")
    assert found == wanted
    assert all(torch.equal(keys[name], wanted_keys[name]) for name in wanted_keys)
    assert len(wanted[0]) == 4


def test_the_default_device(monkeypatch):
    assert own_device(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert own_device() == "cuda"
    assert own_device("cpu") == "cpu"
    assert own_device(torch.device("cuda:3")) == "cuda:3"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert own_device() == "cpu"


def test_processes_of_a_machine_have_a_gpu_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [own_device(device) for device in (None, "cuda", "cuda:0", "cpu")] == ["cuda:2", "cuda:2", "cuda:0", "cpu"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert own_device() == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_device("cuda") == "cuda"


@pytest.mark.parametrize("distributed", [False, True])
def test_a_checkpoint_runs_on_a_gpu_where_there_is_one(distributed, tmp_path, toy_tokenizers, monkeypatch):
    """Shown by the error where torch first finds one, and then not."""
    source = save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizers[False])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    if distributed:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
    wanted = f"device: got 'cuda{':1' * distributed}', wanted 'cpu', or 'cuda' where"
    for call in (
        lambda: apply_edits(source, MIDDLE, out=tmp_path / "out"),
        lambda: plan(source, MIDDLE),
        lambda: collect_statistics(source, None, SENTENCES, [LAYER]),
    ):
        with pytest.raises(ArgumentError, match=wanted):
            call()
