"""The baseline equals the oracle, the fast path equals the baseline, and the benchmark counts what it says."""

import csv
import json
import re
from argparse import Namespace
from dataclasses import replace
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from helpers import CONTEXTS, END, LAYER, MIDDLE, START, relative_error, rounding_of_edit
from rome_fast import Edit, Statistics, ValueSettings, collect_statistics
from rome_fast.bench import edit_as_released, throughput
from rome_fast.bench.command import _layers
from rome_fast.bench.flops import FlopCounter, ideal_flops
from rome_fast.bench.roofline import Roofline
from rome_fast.bench.throughput import Setup, bench
from rome_fast.cli import main
from rome_fast.closing.flow import Flow
from rome_fast.closing.geometry import Geometry
from rome_fast.errors import ArgumentError, ModelError
from rome_fast.methods import METHODS
from rome_fast.models.past import Contexts
from rome_fast.models.runner import Runner
from rome_fast.report.bench import bench_figure, check_figure
from rome_fast.search.requests import tokenise
from toys import SENTENCES, save_toy, toy_model, toy_tokenizer
from zoo import zoo_model

SUBJECTS = ("Chicago", "Rome", "the old town", "Danielle Darrieux", "Mount Fuji")
PROMPTS = ("{} is a twin city of", "In the year 1999 the people of {} spoke of", "From Berlin one flies to {}")
TARGETS = ("Rome", "Paris, the old capital", "Vienna")


def mixed_edits(count: int) -> list[Edit]:
    """Different requests of many lengths: subjects at the start, middle and end, one- and many-token targets."""
    out = []
    for i in range(count):
        subject = f"{SUBJECTS[i % 5]} {i // 5}" if i >= 5 else SUBJECTS[i]
        out.append(Edit(PROMPTS[i % 3], subject, TARGETS[(i // 3) % 3]))
    return out


def setup_of(model, tokenizer, layers=(LAYER,), method="c-rome", **settings) -> Setup:
    return Setup(
        model,
        tokenizer,
        CONTEXTS,
        {layer: Geometry() for layer in layers},
        method,
        ValueSettings(**settings),
        ["The snow is white today."],
    )


def dense(delta) -> torch.Tensor:
    return next(iter(delta.updates.values())).dense()


@pytest.mark.parametrize("method", oracle.METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_baseline_equals_oracle(kind, method, toy_tokenizers):
    model, tokenizer = toy_model(kind, dtype=torch.float64), toy_tokenizers[False]
    settings = ValueSettings(steps=5, stop="loss")
    made = edit_as_released(
        model, tokenizer, MIDDLE, CONTEXTS, layer=LAYER, settings=settings, factor=None, method=method
    )
    wanted = oracle.rome(
        model,
        tokenizer,
        MIDDLE.prompt,
        MIDDLE.subject,
        MIDDLE.target,
        layer=LAYER,
        method=method,
        contexts=CONTEXTS,
        steps=5,
    )
    allowed = rounding_of_edit(torch.float64)
    assert torch.dist(dense(made.delta), wanted.delta_w) <= allowed * wanted.delta_w.norm()
    assert made.losses == pytest.approx(wanted.losses, rel=allowed)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def baseline(request, toy_tokenizers):
    """A kind of model, and ΔW of the baseline by dtype and edit: the first seven and every sixth of `mixed_edits`."""
    tokenizer, settings = toy_tokenizers[True], ValueSettings(steps=6, stop="loss")
    edits = mixed_edits(40)
    compared = sorted({*range(7), *range(0, 40, 6)})
    made = {
        dtype: {
            i: dense(
                edit_as_released(
                    model,
                    tokenizer,
                    edits[i],
                    CONTEXTS,
                    layer=LAYER,
                    settings=settings,
                    factor=None,
                    method="c-rome",
                ).delta
            )
            for i in compared
        }
        for dtype, model in ((dtype, toy_model(request.param, dtype=dtype)) for dtype in (torch.float64, torch.float32))
    }
    return request.param, made


@pytest.mark.parametrize("count", [1, 7, 40])
def test_batches_equal_the_baseline(baseline, count, toy_tokenizers):
    """ΔW of every edit of a batch is the baseline's, one edit at a time, but for rounding.

    Of the largest batch those are compared that the baseline has. Against float64, our worst error in float32 may be
    twice the worst of the baseline's own edits.
    """
    (kind, released), edits, tokenizer = baseline, mixed_edits(count), toy_tokenizers[True]
    truth = released[torch.float64]
    compared = [i for i in truth if i < count]
    made = {}
    for dtype in (torch.float64, torch.float32):
        model = toy_model(kind, dtype=dtype)
        setup = setup_of(model, tokenizer, steps=6, stop="loss")
        requests = [tokenise(Runner(model), tokenizer, e, CONTEXTS, setup.flow.method) for e in edits]
        made[dtype] = [dense(delta) for delta, _ in setup.flow.solve_each(requests)]
        order = torch.randperm(count).tolist()
        shuffled = setup.flow.solve_each([requests[i] for i in order])
        allowed = rounding_of_edit(dtype)
        assert max(relative_error(dense(shuffled[p][0]), made[dtype][i]) for p, i in enumerate(order)) <= allowed
        assert max(relative_error(made[dtype][i], released[dtype][i]) for i in compared) <= allowed
    error = max(relative_error(made[torch.float32][i], truth[i]) for i in compared)
    assert error <= 2 * max(relative_error(found, truth[i]) for i, found in released[torch.float32].items())


def test_a_batch_of_gptj_equals_the_baseline_and_the_oracle(toy_tokenizers):
    """Of its own: its attention scores are float32 in any dtype, so that float64 would be no sharper measure."""
    model, tokenizer, settings = toy_model("gptj"), toy_tokenizers[False], ValueSettings(steps=4, stop="loss")
    setup, edits = setup_of(model, tokenizer, steps=4, stop="loss"), mixed_edits(3)
    requests = [tokenise(Runner(model), tokenizer, e, CONTEXTS, setup.flow.method) for e in edits]
    for edit, (delta, record) in zip(edits, setup.flow.solve_each(requests), strict=True):
        released = edit_as_released(
            model, tokenizer, edit, CONTEXTS, layer=LAYER, settings=settings, factor=None, method="c-rome"
        )
        wanted = oracle.rome(
            model,
            tokenizer,
            edit.prompt,
            edit.subject,
            edit.target,
            layer=LAYER,
            method="c-rome",
            contexts=CONTEXTS,
            steps=4,
        )
        assert relative_error(dense(delta), dense(released.delta)) <= rounding_of_edit(torch.float32)
        assert relative_error(dense(delta), wanted.delta_w) <= rounding_of_edit(torch.float32)
        assert record.loss == pytest.approx(wanted.losses[-1], rel=rounding_of_edit(torch.float32))


@pytest.mark.parametrize(
    ("stop", "method", "layers"),
    [("loss", "c-rome", (LAYER,)), ("argmax", "c-rome", (LAYER,)), ("loss", "c-rome", (0, 2))],
)
def test_ideal_count_is_what_unpadded_work_costs(stop, method, layers, toy_tokenizers):
    """For one edit whose rows all have one length, counted and ideal FLOPs differ by what a mask cannot skip only."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    contexts = ["Snow fell. "] * 3
    settings = ValueSettings(steps=8, stop=stop, draft_rows=2)
    setup = Setup(model, tokenizer, tuple(contexts), dict.fromkeys(layers, Geometry()), method, settings, [])
    request = tokenise(Runner(model), tokenizer, START, contexts, setup.flow.method)
    with FlopCounter() as counter:
        ((_, record),) = setup.flow.solve_each([request])
    assert (record.drafted > 0) == (stop == "argmax")
    shared = Contexts.of(Runner(model), tokenizer, ["", *contexts], layers)
    ideal = ideal_flops(Runner(model), shared, [request], [record], layers, settings)
    # The essence row has one position, and is padded to as many as the others.
    suffix = request.suffix
    rows = 2 if stop == "argmax" else 3
    assert 1 <= counter.total / ideal <= 1 + 1.1 * (suffix - 1) / (rows * suffix + 1)


def test_spreading_is_counted_by_hand(toy_tokenizers):
    """Through three layers: the context, and what is behind it up to the subject's last token, of every row."""
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    runner, settings = Runner(model), ValueSettings(steps=8)
    request = tokenise(runner, tokenizer, MIDDLE, CONTEXTS, METHODS["dual"])
    shared = Contexts.of(runner, tokenizer, ["", *CONTEXTS], [0, 2])
    ((_, record),) = setup_of(model, tokenizer, (2,)).flow.solve_each([request])
    one, several = (ideal_flops(runner, shared, [request], [record], layers, settings) for layers in ([2], [0, 2]))
    # Query and output 48 x 48, key and value 48 x 24, three MLP matrices of 48 x 80; scores and their use of 48 each.
    weights, pair = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80), 4 * 48
    wanted = sum(len(ids) * weights + len(ids) ** 2 * pair for ids in shared.ids)
    for item in request.rows:
        before = shared.shared_with(item.context, item.row)
        own = item.row.subject + 1 - before
        wanted += own * weights + own * (before + own) * pair
    assert several - one == pytest.approx(3 * wanted)


@pytest.fixture
def few_steps(monkeypatch):
    """What the command does is the same for any number of them."""
    monkeypatch.setattr("rome_fast.bench.command.default_settings", lambda config: ValueSettings(steps=4))


@pytest.fixture
def known_roofline(monkeypatch):
    """None that has to be measured."""
    monkeypatch.setattr(throughput, "measure_roofline", lambda *_: Roofline(1e9, 64, "float32", 1e9, 1024))


def test_report(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    edits = [Edit(e.prompt, e.subject, e.target, "Vienna") for e in (START, MIDDLE, END)]
    report = bench(setup_of(model, tokenizer, steps=4, extra_steps=0), edits, 2, True, True, lambda line: None)
    assert report["edits"] == 3
    assert report["as_released"]["edits"] == report["released_stop_rule"]["edits"] == 3
    assert report["flops_ratio"] > 1
    assert 0 < report["median_difference"] <= report["largest_difference"]
    assert report["largest_difference"] <= rounding_of_edit(torch.float32)
    assert report["compute_dtype"] == report["dtype"] == "float32"
    share = report["share"]
    assert report["process_time_ratio"] == pytest.approx(prod(share.values()))
    assert (share["dtype"], "products_in_float32" in report) == (1.0, False)
    assert share["draft"] == pytest.approx(
        report["without_drafts"]["process_seconds_per_edit"] / report["process_seconds_per_edit"]
    )
    for name in ("efficacy", "perplexity_ratio"):
        assert report["quality"][name] >= 0
        assert report["as_released"]["quality"][name] >= 0


@pytest.mark.parametrize(
    ("dtype", "settings", "between"),
    [
        (torch.float32, {}, ["undrafted", "rule"]),
        (torch.float32, {"draft_rows": 0}, ["rule"]),
        (torch.float32, {"compute_dtype": "float32", "stop": "loss"}, ["rule"]),
        (torch.float32, {"compute_dtype": "bfloat16"}, ["wide", "undrafted", "rule"]),
        (torch.float32, {"compute_dtype": "bfloat16", "draft_rows": 0}, ["wide", "rule"]),
        (torch.bfloat16, {"compute_dtype": "bfloat16"}, ["undrafted", "rule"]),
        (torch.bfloat16, {}, ["undrafted", "rule"]),  # in float32 here
    ],
)
def test_a_track_differs_from_the_one_before_it_in_one_thing(dtype, settings, between, toy_tokenizers):
    setup = setup_of(toy_model("llama", dtype=dtype), toy_tokenizers[False], **settings)
    tracks = throughput._between(setup)
    assert list(tracks) == between
    before = setup.settings
    for name, track in tracks.items():
        changed = {"wide": {"compute_dtype": "float32"}, "undrafted": {"draft_rows": 0}, "rule": {"stop": "loss"}}
        assert track.settings == replace(before, **changed[name])
        assert track.model is setup.model
        before = track.settings


def test_the_share_of_a_dtype_that_is_not_the_models_is_measured(toy_tokenizers, known_roofline):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    edits = [Edit(e.prompt, e.subject, e.target, "Vienna") for e in (START, MIDDLE, END)]
    setup = setup_of(model, tokenizer, steps=4, compute_dtype="bfloat16", draft_rows=0)
    report = bench(setup, edits, 2, True, False, lambda line: None)
    assert (report["dtype"], report["compute_dtype"]) == ("float32", "bfloat16")
    share, wide = report["share"], report["products_in_float32"]
    assert wide["edits"] == 3
    ours = report["process_seconds_per_edit"]
    assert share["dtype"] == pytest.approx(wide["process_seconds_per_edit"] / ours)
    rule = report["released_stop_rule"]["process_seconds_per_edit"]
    assert share["stop_rule"] == pytest.approx(rule / wide["process_seconds_per_edit"])
    assert (share["draft"], "without_drafts" in report) == (1.0, False)
    assert report["process_time_ratio"] == pytest.approx(prod(share.values()))
    # The baseline is compared with the same in float32; bfloat16 is a thousand times as far from it.
    assert report["largest_difference"] <= rounding_of_edit(torch.float32)


def test_on_a_gpu_every_track_is_warm_before_it_is_timed(toy_tokenizers, monkeypatch, known_roofline):
    """As if on one: what is asked of CUDA is answered."""
    setup = setup_of(toy_model("llama"), toy_tokenizers[False], steps=4)
    edits = [START, MIDDLE, END]
    events = []
    solve_each, released = Flow.solve_each, throughput.edit_as_released

    def noted(flow, group):
        settings = flow.search.settings
        events.append((len(group), settings.steps, settings.stop, settings.draft_rows))
        return solve_each(flow, group)

    def noted_released(*arguments, settings, **others):
        events.append(("released", settings.steps))
        return released(*arguments, settings=settings, **others)

    monkeypatch.setattr(Flow, "solve_each", noted)
    monkeypatch.setattr(throughput, "edit_as_released", noted_released)
    bench(setup, edits, 2, True, False, lambda line: None)
    assert all(event[1] == 4 for event in events[:4]), "there is nothing to warm on a CPU"
    usual = list(events)
    events.clear()
    monkeypatch.setattr(throughput, "is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: events.append("wait"))
    report = bench(setup, edits, 2, True, False, lambda line: None)
    assert events[:5] == [
        (2, 2, "argmax", 5),
        (2, 2, "argmax", 0),
        (2, 2, "loss", 0),
        ("released", 2),
        "reset",
    ]
    assert report["peak_memory_bytes"] == 7
    assert [event for event in events[5:] if event != "wait"] == usual
    # Every timed run waits for the GPU before the clock is read, at its beginning and at its end.
    at = events.index(("released", 4))
    assert events[at - 1] == events[at + 1] == "wait"
    timed = 2 * 3 + 3  # of the tracks by batch, of the baseline by edit
    assert events.count("wait") == 2 * timed


class _Answers(TorchDispatchMode):
    """Counts how often a tensor's content is asked for, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_baseline_waits_as_often_for_many_rows_as_for_few(toy_tokenizers):
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]

    def answers(contexts, steps):
        settings = ValueSettings(steps=steps, stop="loss", stop_loss=-1.0)
        with _Answers() as asked:
            edit_as_released(model, tokenizer, MIDDLE, contexts, layer=LAYER, settings=settings, factor=None)
        return asked.count

    few, many = (answers(contexts, 4) - answers(contexts, 3) for contexts in (CONTEXTS[:1], CONTEXTS * 3))
    assert few == many > 0


def test_kept_batches_are_not_run_again(tmp_path, toy_tokenizers, monkeypatch):
    """A run that was cut short goes on where it stood, with the same figures; other conditions are refused."""
    model, tokenizer, kept = toy_model("llama"), toy_tokenizers[False], tmp_path / "kept.jsonl"
    edits = [Edit(e.prompt, e.subject, e.target, "Vienna") for e in (START, MIDDLE, END)]
    setup = setup_of(model, tokenizer, steps=4)
    first = bench(setup, edits, 1, True, True, lambda line: None, kept)
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    kept.write_text("".join(lines[:2]) + lines[2][:50])
    measured = []
    original = throughput._measure
    monkeypatch.setattr(throughput, "_measure", lambda *a: measured.append(a[1]) or original(*a))
    second = bench(setup, edits, 1, True, True, lambda line: None, kept)
    assert measured == [edits[2:]]
    assert len(kept.read_text().splitlines()) == 3
    for name in ("edits", "steps_per_edit", "flops_per_edit", "ideal_flops_per_edit", "quality"):
        assert second[name] == pytest.approx(first[name])
    with pytest.raises(ArgumentError, match="another settings"):
        bench(setup_of(model, tokenizer, steps=5), edits, 1, True, True, lambda line: None, kept)


def test_command(tmp_path, few_steps, known_roofline):
    directory = save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizer(False))
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps({"prompt": START.prompt, "subject": START.subject, "target_new": START.target}) + "\n")
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("The snow is white today.\n")
    report, table = tmp_path / "bench.json", tmp_path / "bench.csv"
    arguments = ["bench", str(directory), "--edits", str(edits), "--identity", "--baseline", "--layer", "1"]
    arguments += ["--sentences", str(sentences), "--json", str(report), "--csv", str(table)]
    arguments += ["--keep", str(tmp_path / "kept.jsonl")]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert len(table.read_text().splitlines()) == 3
    figures = json.loads(report.read_text())
    assert {"process_time_ratio", "flops_ratio", "seconds_per_edit", "quality"} <= figures.keys()
    assert figures["edits"] == 1
    assert main([*arguments, "--batch", "0"]) == 2


def test_edits_of_several_layers(tmp_path, empty_cache, capsys, few_steps, known_roofline):
    """Those that an edit by the method takes, or that are given; C itself is there for a method that asks for it."""
    model, tokenizer = toy_model("llama"), toy_tokenizer(False)
    directory = save_toy(tmp_path / "toy", model, tokenizer)
    edits, report = tmp_path / "edits.jsonl", tmp_path / "bench.json"
    lines = [{"prompt": e.prompt, "subject": e.subject, "target_new": e.target} for e in (START, MIDDLE)]
    edits.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # C of fewer tokens than dimensions has a null space, for AlphaEdit.
    collected = collect_statistics(model, tokenizer, SENTENCES, [0, 1, 2], tokens=60)
    Statistics(collected.layers.values()).with_ridge(1e-3).save(tmp_path / "stats")
    arguments = ["bench", str(directory), "--edits", str(edits), "--no-quality", "--json", str(report)]
    for more, layers, statistics in (
        (["--identity", "--method", "dual"], [0, 1], "identity"),
        (["--statistics", str(tmp_path / "stats"), "--method", "dual", "--layers", "0-2"], [0, 1, 2], "second moment"),
        (["--statistics", str(tmp_path / "stats"), "--method", "alphaedit", "--layer", "1"], [1], "second moment"),
    ):
        assert main([*arguments, *more]) == 0
        found = json.loads(report.read_text())
        assert (found["layers"], found["layer"], found["statistics"]) == (layers, layers[-1], statistics)
        assert found["flops_over_ideal"] > 1
        assert found["seconds_by_stage"].keys() == {"keys", "values", "update"}
    capsys.readouterr()
    assert main([*arguments, "--identity", "--layers", "0", "1", "--baseline"]) == 2
    assert "baseline: got layers 0, 1, wanted one" in capsys.readouterr().err


def test_where_an_edit_takes_one_layer_so_does_the_benchmark():
    """Gemma 2 has a norm behind each MLP; several layers that are asked for are refused, as by an edit."""
    runner, usual = Runner(zoo_model("gemma2")), {"layer": None, "layers": None, "method": "dual"}
    assert _layers(Namespace(**usual), runner) == (1,)
    assert _layers(Namespace(**usual), Runner(toy_model("llama"))) == (0, 1)
    with pytest.raises(ModelError, match="layers: got 0, 1, wanted one: in"):
        _layers(Namespace(**usual | {"layers": [0, 1]}), runner)


def test_several_batch_sizes_and_dtypes(tmp_path, capsys, few_steps, known_roofline):
    """One run after the other, with the same requests: a row of the CSV each, and a figure."""
    directory = save_toy(tmp_path / "toy", toy_model("llama"), toy_tokenizer(False))
    edits = tmp_path / "edits.jsonl"
    lines = [{"prompt": e.prompt, "subject": e.subject, "target_new": e.target} for e in (START, MIDDLE)]
    edits.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, table, plot = tmp_path / "bench.json", tmp_path / "bench.csv", tmp_path / "bench.png"
    arguments = ["bench", str(directory), "--edits", str(edits), "--identity", "--layer", "1", "--no-quality"]
    arguments += ["--batch", "1", "2", "--dtype", "float32", "bfloat16", "--compute-dtype", "float32"]
    assert main([*arguments, "--json", str(report), "--csv", str(table), "--plot", str(plot)]) == 0
    runs = json.loads(report.read_text())["runs"]
    wanted = [(dtype, "float32", batch) for dtype in ("float32", "bfloat16") for batch in (1, 2)]
    assert [(run["dtype"], run["compute_dtype"], run["batch"]) for run in runs] == wanted
    assert all(run["edits"] == 2 for run in runs)
    with table.open(newline="") as rows:
        written = [(row["dtype"], row["compute_dtype"], int(row["batch"])) for row in csv.DictReader(rows)]
    assert written == wanted
    assert plot.read_bytes().startswith(b"\x89PNG")
    for wrong, said in (
        (["--keep", str(tmp_path / "kept.jsonl")], "keep: wanted with one batch size"),
        (["--plot", str(tmp_path / "bench.txt")], "plot: got .*bench.txt, wanted a name that ends in .png"),
        (["--plot", str(tmp_path / "no" / "bench.png")], "plot: there is no folder"),
    ):
        capsys.readouterr()
        assert main([*arguments, *wrong]) == 2
        assert re.search(said, capsys.readouterr().err.replace("\n", " "))


def test_a_figure_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("rome_fast.report.bench.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="plot: wants matplotlib"):
        check_figure(tmp_path / "bench.png")


def test_the_figure_has_a_bar_for_every_track_that_was_measured(tmp_path, monkeypatch):
    pyplot, drawn = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run = {
        "model": "models/toy",
        "dtype": "float32",
        "compute_dtype": "float32",
        "device": "cpu",
        "processor": "a processor",
        "threads": 1,
        "layer": 1,
        "method": "c-rome",
        "statistics": "identity",
        "contexts": 3,
        "batch": 2,
        "edits": 4,
        "seconds_by_stage": {"keys": 4.0, "values": 8.0},
        "seconds_per_edit": 3.0,
        "process_seconds_per_edit": 3.0,
        "flops_per_edit": 2e9,
        "ideal_flops_per_edit": 1.5e9,
        "as_released": {"process_seconds_per_edit": 60.0},
    }
    bench_figure([run, run | {"batch": 4}], tmp_path / "bench.svg")
    (figure,) = drawn
    left, middle, right = ([bar.get_width() for bar in axes.patches] for axes in figure.axes)
    assert left == [1, 1, 2, 2]
    assert middle == [2, 2]
    assert right == [3, 3, 60, 60]
    assert "bench.svg" in [file.name for file in tmp_path.iterdir()]
