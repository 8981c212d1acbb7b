"""`rome-fast profile` on a toy, and that it counts what it says."""

import csv
import gzip
import json

import pytest
import torch

from helpers import LAYER
from rome_fast.bench import profile
from rome_fast.bench.flops import FlopCounter
from rome_fast.bench.profile import Counter, Work, kernel_seconds, operator_seconds, write_memory
from rome_fast.bench.roofline import Roofline
from rome_fast.bench.throughput import Setup
from rome_fast.cli import main
from rome_fast.closing.geometry import Geometry
from rome_fast.edits import load_edits
from rome_fast.models.runner import Runner
from rome_fast.search.contexts import sample_contexts
from rome_fast.search.objective import Objective
from rome_fast.search.requests import tokenise
from rome_fast.search.values import ValueSettings
from toys import save_toy, toy_model

EDITS = [
    {"prompt": "{} is a twin city of", "subject": "Chicago", "target_new": "Melbourne"},
    {"prompt": "From Berlin one flies to {}", "subject": "Paris", "target_new": "Rome, the old capital"},
]


@pytest.fixture
def toy(tmp_path, toy_tokenizers, monkeypatch, empty_cache):
    monkeypatch.chdir(tmp_path)
    save_toy("model", toy_model("llama"), toy_tokenizers[False])
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS))
    return tmp_path


def test_a_profile_of_a_toy(toy, toy_tokenizers, capsys, monkeypatch):
    settings = ValueSettings(steps=6)
    monkeypatch.setattr("rome_fast.bench.command.default_settings", lambda config: settings)
    arguments = ["profile", "model", "--edits", "edits.jsonl", "--identity", "--layer", str(LAYER), "--out", "found"]
    assert main([*arguments, "--json", "report.json"]) == 0
    report = json.loads((toy / "report.json").read_text())
    assert report == json.loads((toy / "found" / "profile.json").read_text())
    assert (report["edits"], report["layer"], report["device"]) == (2, LAYER, "cpu")
    assert list(report["stages"]) == ["keys", "values", "update"]
    # The two do not fit into one batch without padding.
    assert report["part"] == {"edits": report["largest_batch"], "steps": 3} == {"edits": 1, "steps": 3}
    for row in report["stages"].values():
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["part_seconds"])

    # Counted by stage, by operator and by another counter: the same work.
    model, tokenizer = toy_model("llama"), toy_tokenizers[False]
    contexts = sample_contexts(model, tokenizer)
    setup = Setup(model, tokenizer, contexts, {LAYER: Geometry()}, "c-rome", ValueSettings(steps=3, extra_steps=0), [])
    requests = [
        tokenise(Runner(model), tokenizer, edit, contexts, setup.flow.method) for edit in load_edits("edits.jsonl")[:1]
    ]
    with FlopCounter() as counter:
        setup.flow.solve_each(requests)
    assert sum(row["flops"] for row in report["stages"].values()) == counter.total
    assert sum(row["flops"] for row in report["operators"]) == counter.total

    operators = {row["name"]: row for row in report["operators"]}
    product = operators["aten::mm"]
    assert product["flops_per_second"] == pytest.approx(product["flops"] / product["seconds"])
    assert operators["rome_fast::prefixed_solve"]["calls"] == 1
    assert operators["aten::view"]["bytes"] == 0
    assert [row["seconds"] for row in report["operators"]] == sorted(
        (row["seconds"] for row in report["operators"]), reverse=True
    )

    with gzip.open(toy / "found" / "trace.json.gz", "rt") as text:
        names = {event.get("name") for event in json.load(text)["traceEvents"]}
    assert {"rome_fast.keys", "rome_fast.values", "rome_fast.update", "rome_fast::prefixed_solve"} <= names

    with (toy / "found" / "memory.csv").open(newline="") as lines:
        memory = list(csv.DictReader(lines))
    times = [float(row["ms"]) for row in memory]
    assert times == sorted(times)
    assert max(int(row["allocated_bytes"]) for row in memory) == report["peak_bytes"]["cpu"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "aten::mm" in shown
    assert "roofline:" in shown


def test_what_is_profiled_is_bounded_and_what_is_timed_is_not(toy, monkeypatch):
    """Evaluations of the loss, with and without the profiler, of few edits with few steps and of many with many."""
    monkeypatch.setattr(profile, "_PART_EDITS", 2)
    (toy / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in EDITS[:1] * 8))
    evaluations, counts = [], {}
    record, evaluate = profile._record, Objective.evaluate

    def recorded(*arguments):
        before = len(evaluations)
        record(*arguments)
        counts["profiled"] = len(evaluations) - before

    monkeypatch.setattr(profile, "_record", recorded)
    monkeypatch.setattr(Objective, "evaluate", lambda *a, **options: evaluations.append(1) or evaluate(*a, **options))
    arguments = ["profile", "model", "--edits", "edits.jsonl", "--identity", "--layer", str(LAYER), "--out", "found"]
    found = []
    for count, steps in ((2, 4), (8, 12)):
        evaluations.clear()
        settings = ValueSettings(steps=steps, stop="loss", stop_loss=-1.0)
        monkeypatch.setattr("rome_fast.bench.command.default_settings", lambda config, settings=settings: settings)
        assert main([*arguments, "--count", str(count)]) == 0
        report = json.loads((toy / "found" / "profile.json").read_text())
        assert report["edits"] == count
        assert report["part"] == {"edits": 2, "steps": 3}
        # Of the part two to warm up, and three to be timed, counted and profiled; of all edits two to warm up and then
        # all their steps, in as many batches as it takes.
        of_all = len(evaluations) - (2 + 3 + 3 + 3)
        assert of_all > 0
        assert of_all % (2 + steps) == 0
        found.append((counts["profiled"], sum(row["calls"] for row in report["operators"])))
    assert found[0] == found[1]
    assert found[0][0] == 3


@pytest.mark.parametrize("interrupted", ["_record", "gzip.open"])
def test_tables_are_there_when_the_trace_is_interrupted(interrupted, toy, capsys, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    settings = ValueSettings(steps=4)
    monkeypatch.setattr("rome_fast.bench.command.default_settings", lambda config: settings)
    monkeypatch.setattr(f"rome_fast.bench.profile.{interrupted}", interrupt)
    (toy / "found").mkdir()
    (toy / "found" / "trace.json.gz").write_text("of an earlier run")
    arguments = ["profile", "model", "--edits", "edits.jsonl", "--identity", "--layer", str(LAYER), "--out", "found"]
    assert main(arguments) == 130
    report = json.loads((toy / "found" / "profile.json").read_text())
    assert all(report["stages"][stage]["seconds"] > 0 for stage in ("keys", "values", "update"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "values" in shown
    assert "roofline:" in shown
    complete = interrupted == "gzip.open"
    assert ("operators" in report) == ("aten::mm" in shown) == complete
    names = {"profile.json", "memory.csv"} if complete else {"profile.json"}
    assert {file.name for file in (toy / "found").iterdir()} == names


def test_the_counter_knows_what_an_operator_moves():
    a, b = torch.ones(8, 4), torch.ones(4, 6)
    with Counter() as counter:
        counter.stage = "one"
        product = a @ b
        counter.stage = ""
        product.view(6, 8).t()
        product.add_(1.0)
        product + torch.ones(1).expand(8, 6)
    found = {name: (work.calls, work.flops, work.moved_bytes) for name, work in counter.operators.items()}
    assert found["aten::mm"] == (1, 2 * 8 * 4 * 6, 4 * (32 + 24 + 48))
    assert found["aten::view"] == found["aten::t"] == found["aten::expand"] == (1, 0, 0)
    assert found["aten::add_"] == (1, 0, 4 * (48 + 48))
    assert found["aten::add"] == (1, 0, 4 * (48 + 1 + 48))
    assert list(counter.stages) == ["one"]
    assert counter.stages["one"] == counter.operators["aten::mm"]


def test_work_is_set_against_the_nearer_bound():
    roofline = Roofline(100.0, 1, "float32", 10.0, 1)
    assert Work(1, 200.0, 10.0).against(4.0, roofline) == {
        "seconds": 4.0,
        "flops": 200.0,
        "bytes": 10.0,
        "flops_per_second": 50.0,
        "bytes_per_second": 2.5,
        "share_of_roofline": 0.5,
    }
    assert Work(1, 100.0, 30.0).against(4.0, roofline)["share_of_roofline"] == 0.75
    assert Work().against(0.0, roofline)["share_of_roofline"] == 0.0


def test_a_memory_timeline_is_in_the_order_of_time_and_parted_by_device(tmp_path):
    def event(ts, device, total):
        return {"name": "[memory]", "ts": ts, "args": {"Device Type": device, "Total Allocated": total}}

    events = [event(3000, 0, 7), event(1000, 1, 50), event(2000, 1, 20), {"name": "aten::mm", "ts": 1}]
    assert write_memory(events, tmp_path / "memory.csv") == {"cuda": 50, "cpu": 7}
    assert (tmp_path / "memory.csv").read_text().split() == [
        "ms,device,allocated_bytes",
        "0.0,cuda,50",
        "1.0,cuda,20",
        "2.0,cpu,7",
    ]


def test_seconds_are_read_off_a_trace():
    """Own time on a CPU: without that of the operators inside. On a GPU: of the kernels that an operator launched."""

    def operator(name, ts, dur, number, tid=1):
        return {"cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": tid, "args": {"External id": number}}

    def kernel(name, dur, number, cat="kernel"):
        return {"cat": cat, "name": name, "ts": 0, "dur": dur, "tid": 7, "args": {"External id": number}}

    trace = [
        operator("aten::mm", 10, 30, 2),
        operator("aten::linear", 0, 100, 1),
        operator("aten::mm", 50, 20, 3),
        operator("aten::copy_", 55, 5, 4),
        operator("aten::add", 60, 40, 5, tid=2),
        operator("aten::mm", 100, 10, 6),
        kernel("gemm", 500, 2),
        kernel("gemm", 300, 3),
        kernel("Memcpy", 200, 4, "gpu_memcpy"),
        kernel("other", 50, 99),
        {"cat": "user_annotation", "name": "rome_fast.keys", "ts": 0, "dur": 999, "tid": 1},
    ]
    on_cpu = operator_seconds(trace, on_gpu=False)
    assert {name: (calls, round(1e6 * s)) for name, (calls, s) in on_cpu.items()} == {
        "aten::linear": (1, 50),
        "aten::mm": (3, 30 + 15 + 10),
        "aten::copy_": (1, 5),
        "aten::add": (1, 40),
    }
    on_gpu = operator_seconds(trace, on_gpu=True)
    assert {name: (calls, round(1e6 * s)) for name, (calls, s) in on_gpu.items()} == {
        "aten::linear": (1, 0),
        "aten::mm": (3, 800),
        "aten::copy_": (1, 200),
        "aten::add": (1, 0),
        "launched by no operator": (0, 50),
    }
    kernels = kernel_seconds(trace)
    assert {name: (calls, round(1e6 * s)) for name, (calls, s) in kernels.items()} == {
        "gemm": (2, 800),
        "Memcpy": (1, 200),
        "other": (1, 50),
    }


def test_faults(toy, capsys):
    (toy / "file").write_text("")
    assert main(["profile", "model", "--edits", "edits.jsonl", "--identity", "--out", "file"]) == 2
    assert "out: file is a file; wanted a folder" in capsys.readouterr().err
    assert main(["profile", "model", "--edits", "edits.jsonl", "--count", "0", "--out", "new"]) == 2
    assert "count: got 0, wanted at least 1" in capsys.readouterr().err
    assert not (toy / "new").exists()
