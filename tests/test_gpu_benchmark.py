"""The GPU benchmark on a machine without a GPU, from a checkout that is not installed; and its parts on a CPU."""

import csv
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import gpu
import measure
import op_cases
from rome_fast import ValueSettings
from rome_fast.bench import throughput
from rome_fast.bench.roofline import Roofline
from rome_fast.bench.shapes import tokenizer_for
from rome_fast.closing.flow import Flow
from rome_fast.models.rows import encode
from rome_fast.statistics import collect

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_it_says_what_it_leaves_out(tmp_path):
    done = run(str(ROOT / "benchmarks" / "gpu.py"), OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "no CUDA GPU here; left out:"
    assert [line.split(":")[0].strip() for line in rest] == list(gpu.PARTS)
    assert list(tmp_path.iterdir()) == []


# Stands for the benchmark: its last argument is the part.
PARTS = """
import pathlib, signal, sys, time
part, out = sys.argv[-1], pathlib.Path(sys.argv[1])
if part == "fails":
    sys.exit(7)
if part == "obeys":
    signal.signal(signal.SIGTERM, lambda *_: ((out / part).write_text("ended what it started"), sys.exit(0)))
if part == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(out / "order").open("a").write(part + " ")
time.sleep(60 * (part != "works"))
"""


@pytest.mark.parametrize(("parts", "status"), [(["works"], 0), (["fails", "works"], 1), (["obeys", "ignores"], 1)])
def test_a_part_that_takes_too_long_may_end_what_it_started_and_the_next_one_runs(parts, status, tmp_path, monkeypatch):
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(parts))
    monkeypatch.setattr(gpu, "_SHARES", dict.fromkeys(parts, 0.5))
    monkeypatch.setattr(gpu, "_GRACE_SECONDS", 2.0)
    monkeypatch.setattr(gpu, "plot", lambda: None)
    start = time.monotonic()
    assert gpu.run_all(0.08, [str(tmp_path)]) == status
    assert time.monotonic() - start < 30
    assert (tmp_path / "order").read_text().split() == [part for part in parts if part != "fails"]
    assert (tmp_path / "obeys").exists() == ("obeys" in parts)


def test_the_shares_of_nine_minutes_leave_time_for_every_part(monkeypatch):
    assert list(gpu._SHARES) == list(gpu.PARTS)
    left = 540.0
    for part, usual in {"correctness": 200, "ops": 90, "values": 100, "statistics": 50}.items():
        assert gpu._SHARES[part] * left > usual
        left -= usual
    assert left >= gpu._TOOL_SECONDS
    assert gpu._SHARES["sanitizer"] == 1


REFERENCE = """
import pytest

def test_b_imported(): ...
def test_y_imported(): assert False
"""
OWN = """
import pytest
from test_reference_like import test_b_imported, test_y_imported

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("size", [2, 1])
def test_c_own(size): ...
def test_a_own(): ...
"""


@pytest.mark.slow
def test_tests_that_only_a_gpu_can_run_come_before_those_of_the_reference(tmp_path):
    (tmp_path / "test_reference_like.py").write_text(REFERENCE)
    (tmp_path / "test_own.py").write_text(OWN)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, torch
from pathlib import Path
sys.exit(gpu.correctness(torch.device("cpu"), Path({str(tmp_path / "test_own.py")!r})))
"""
    done = run("-c", code, OUT=str(tmp_path))
    rows = measure.read_rows(tmp_path / "gpu_correctness.csv")
    assert [row["check"] for row in rows] == [
        "test_c_own[2]",
        "test_c_own[1]",
        "test_a_own",
        "test_b_imported",
        "test_y_imported",
    ], done.stdout + done.stderr
    assert [row["outcome"] for row in rows] == ["passed"] * 4 + ["failed"]
    assert done.returncode == 1


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path):
    assert gpu.run_group(["sh", "-c", "echo $WORD; echo error >&2; exit 9"], 60, WORD="said") == (9, "said\nerror\n")
    number = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 300 & echo $! > {number}; wait"]
    code, text = gpu.run_group(command, 2)
    assert (code, text) == (124, "stopped after 2 s")
    pid = int(number.read_text())
    try:
        end = time.monotonic() + 10
        while running(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not running(pid)
    finally:
        if running(pid):
            os.kill(pid, signal.SIGKILL)


def running(pid):
    """Whether a process runs; one that has ended may not have been collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_can_be_imported(tmp_path):
    """`-S` leaves out the editable installation's hook; torch and the like are put back by hand."""
    packages = Path(torch.__file__).parents[1]
    code = f"""
import sys
sys.path += [{str(packages)!r}]
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import uninstalled
import rome_fast, rome_fast.kernels, rome_fast.kernels.reference
from rome_fast import kernels
from rome_fast.updates.delta import rank_update_
assert kernels.rank_update_ is rank_update_, "the kernels were imported twice"
print(rome_fast.kernels.__file__)
"""
    done = run("-S", "-P", "-c", code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


@pytest.mark.parametrize("number", range(9))
def test_every_case_is_right_and_notices_what_is_wrong(number):
    for index, case in enumerate(op_cases.cases(70, CPU, tokens=130, rows=64)):
        if index != number:
            continue
        assert all(case.check().values()), case.errors
        assert case.flops > 0
        assert case.moved_bytes > 0
        ours = case.runs[op_cases.OURS]
        for wrong in (1.01, float("nan")):
            case.runs[op_cases.OURS] = lambda wrong=wrong, ours=ours: ours() * wrong
            assert not case.check()[op_cases.OURS]
        return
    pytest.fail(f"there is no case {number}")


@pytest.fixture
def as_if_on_a_gpu(monkeypatch, tmp_path):
    """The parts of the benchmark on the CPU: what they ask CUDA for is answered; results go to the returned folder."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "measure_roofline", lambda device, dtype: Roofline(1e9, 64, "bfloat16", 1e9, 1024))
    monkeypatch.setattr(gpu, "_OP_SECONDS", 0.0)
    for name, answer in (("reset_peak_memory_stats", None), ("max_memory_allocated", 3 << 30), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return tmp_path / "out"


def test_the_ops_part_writes_a_row_per_provider_and_times_no_wrong_one(as_if_on_a_gpu, monkeypatch, capsys):
    small = list(op_cases.cases(70, CPU, tokens=130, rows=64))
    spoiled = small[-1]
    ours = spoiled.runs[op_cases.OURS]
    spoiled.runs[op_cases.OURS] = lambda: ours() * 2
    monkeypatch.setattr(gpu, "cases", lambda d_ff, device: iter(small))
    assert gpu.ops(CPU, [70]) == 1
    rows = measure.read_rows(as_if_on_a_gpu / "gpu_ops.csv")
    assert len(rows) == sum(len(case.runs) for case in small)
    for row in rows:
        wrong = (row["op"], row["provider"]) == (spoiled.op, op_cases.OURS)
        assert row["right"] == str(not wrong)
        assert (row["ms"] == "") == wrong
        if row["ms"]:
            assert float(row["share_of_bound"]) == pytest.approx(float(row["bound_ms"]) / float(row["ms"]), rel=1e-3)
            assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
    assert "WRONG, not timed" in capsys.readouterr().out
    gpu.plot()
    assert (as_if_on_a_gpu / "gpu_ops.png").stat().st_size > 10_000


def test_the_values_part_writes_a_row_per_batch(as_if_on_a_gpu, empty_cache, monkeypatch):
    events, seconds = [], iter([3.0, 1.0, 2.0, 8.0])
    original, solve_each = throughput.run_timed, Flow.solve_each

    def noted(flow, group):
        events.append((len(group), flow.search.settings.steps))
        return solve_each(flow, group)

    def at_given_speed(track, flow, group):
        made = original(track, flow, group)
        track.wall_seconds = next(seconds)
        return made

    monkeypatch.setattr(Flow, "solve_each", noted)
    monkeypatch.setattr(throughput, "run_timed", at_given_speed)
    monkeypatch.setattr(throughput, "default_settings", lambda config: ValueSettings(steps=7))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: events.append("reset"))
    monkeypatch.setattr(gpu, "_SHORT_BATCH", 1)
    assert gpu.values(CPU, "tiny", [1, 2]) == 0
    # Each group is warm before the peak is reset; a short one runs three times, and once more to count FLOPs.
    assert events == [(1, 2), "reset", *[(1, 7)] * 4, (2, 2), "reset", (2, 7)]
    rows = measure.read_rows(as_if_on_a_gpu / "gpu_values.csv")
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert [(row["repeats"], float(row["seconds_per_edit"])) for row in rows] == [("3", 2.0), ("1", 4.0)]
    for row in rows:
        assert float(row["steps_per_edit"]) == 7
        assert float(row["peak_gib"]) == 3
        rate = float(row["ideal_tflop_per_edit"]) / float(row["seconds_per_edit"])
        assert float(row["share_of_matrix_rate"]) == pytest.approx(rate * 1e12 / 1e9, rel=1e-3)
    counted, ideal = (float(rows[0][f"{name}_tflop_per_edit"]) for name in ("counted", "ideal"))
    assert 1 <= counted / ideal < 1.3
    assert rows[1]["counted_tflop_per_edit"] == ""
    gpu.plot()
    assert (as_if_on_a_gpu / "gpu_values.png").stat().st_size > 5_000


def test_the_statistics_part_says_what_a_collection_and_its_sum_took(as_if_on_a_gpu, empty_cache, monkeypatch):
    events, own = [], collect.second_moment_

    def slow(total, x, mask=None):
        time.sleep(0.02)
        return own(total, x, mask)

    original = gpu.timing_second_moments

    def noted(device):
        events.append("timed")
        return original(device)

    monkeypatch.setattr("rome_fast.kernels.second_moment_", slow)
    monkeypatch.setattr(gpu, "timing_second_moments", noted)
    monkeypatch.setattr(gpu, "_SHORT_TOKENS", 500)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: events.append("reset"))
    monkeypatch.setattr(collect, "second_moment_", lambda *arguments: events.append("untimed") or own(*arguments))
    assert gpu.statistics(CPU, "tiny", [300, 9000]) == 0
    assert collect.second_moment_(torch.zeros(2, 2), torch.ones(1, 2)) is not None
    assert events.pop() == "untimed", "the wrapper is still there"
    # The same collection once before the clock runs.
    batches = events.index("reset")
    assert 0 < batches < events.index("reset", batches + 1)
    assert [e for e, before in pairwise([*events, ""]) if e != before] == (
        ["untimed", "reset", "timed", "untimed", "reset", "timed"]
    )
    rows = measure.read_rows(as_if_on_a_gpu / "gpu_statistics.csv")
    assert [(row["tokens"], row["repeats"]) for row in rows] == [("300", "3"), ("9000", "1")]
    assert events.count("timed") == 4
    # Two layers of 2 · 64² + 2 · 64 · 32 weights for attention and 3 · 64 · 160 below it, and 160² for the sum.
    flops = 2 * 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 160) + 160**2
    for row in rows:
        figures = {name: float(row[name]) for name in row if name.endswith(("seconds", "_s", "share", "token", "rate"))}
        assert row["layer"] == "1"
        assert row["layers_made"] == "2 of 4, random weights"
        assert figures["gflop_per_token"] == pytest.approx(flops / 1e9, rel=1e-4)
        assert figures["tokens_per_s"] == pytest.approx(int(row["tokens"]) / figures["seconds"], rel=1e-3)
        assert figures["share_of_matrix_rate"] == pytest.approx(figures["tokens_per_s"] * flops / 1e9, rel=1e-3)
        assert 0.02 <= figures["second_moment_seconds"] < figures["seconds"]
        share = figures["second_moment_seconds"] / figures["seconds"]
        assert figures["second_moment_share"] == pytest.approx(share, rel=1e-3)
        assert figures["reading_seconds"] > 0
        assert float(row["peak_gib"]) == 3
        assert "requests and contexts" in row["texts"]
        assert "trained on the requests" in row["tokenizer"]
        assert row["device"] == "cpu"


SANITIZER = """#!/bin/sh
echo "$*, caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"
echo "========= ERROR SUMMARY: 1 error"
[ "$2" = memcheck ] && exit 9
sleep 60
"""


def test_the_sanitizer_part_writes_a_row_per_tool_and_stops_one_that_hangs(as_if_on_a_gpu, tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "_TOOL_SECONDS", 2.0)
    assert gpu.sanitizer(CPU) == 1
    rows = measure.read_rows(as_if_on_a_gpu / "gpu_sanitizer.csv")
    assert [(row["tool"], row["status"], row["summary"]) for row in rows] == [
        ("memcheck", "9", "========= ERROR SUMMARY: 1 error"),
        ("racecheck", "124", "stopped after 2 s"),
    ]
    assert all(float(row["seconds"]) < 30 for row in rows)


def test_texts_are_drawn_of_the_built_in_ones_and_long_enough(empty_cache):
    texts = gpu.drawn_texts(3000)
    assert texts == gpu.drawn_texts(3000) != gpu.drawn_texts(3000, seed=1)
    words = {word for sentence in gpu.sentences() for word in sentence.split()}
    assert {word for text in texts for word in text.split()} <= words
    assert 3000 <= sum(len(text.split()) for text in texts) < 4000
    assert len({len(text) for text in texts}) > len(texts) / 2
    tokenizer, _ = tokenizer_for(1024, gpu.sentences())
    assert sum(len(row.ids) for row in encode(tokenizer, texts)) >= 3000


def test_times_are_taken_in_turns_and_sorted():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.side_by_side(runs, CPU, budget=0.0, least=3)
    assert "".join(order) == "ab" + "ab" * 3
    assert {t.runs for t in times.values()} == {3}
    spread = measure.Times.of([0.005, 0.001, 0.002, 0.003, 0.004, 0.006])
    assert (spread.median, spread.low, spread.high) == (3.5, 2.0, 5.0)


def test_outside_a_repository_the_commit_is_told_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    assert measure.commit() != "0123abc"
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() == "0123abc"
    monkeypatch.delenv("COMMIT")
    assert measure.commit() == ""


def test_a_table_is_complete_after_every_row_and_replaces_an_older_one(tmp_path):
    file = tmp_path / "folder" / "table.csv"
    for attempt in (1, 2):
        table = measure.Table(file, {"device": "cpu"})
        assert file.exists() == (attempt == 2)
        for number in (1, 2):
            table.add({"attempt": attempt, "ms": number / 3})
            with file.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
            assert [row["ms"] for row in rows] == ["0.33333", "0.66667"][:number]
            assert {(row["attempt"], row["device"]) for row in rows} == {(str(attempt), "cpu")}
    assert measure.read_rows(file) == rows
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        table.add({"other": 1})
