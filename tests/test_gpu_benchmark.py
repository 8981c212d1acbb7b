"""The GPU benchmark on a machine without a GPU, from a checkout that is not installed; and its parts on a CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu
import measure
import op_cases
from rome_fast.bench.roofline import Roofline

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
    assert [line.split(":")[0].strip() for line in rest] == ["correctness", "ops", "values", "sanitizer"]
    assert list(tmp_path.iterdir()) == []


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
from rome_fast.delta import rank_update_
assert kernels.rank_update_ is rank_update_, "the kernels were imported twice"
print(rome_fast.kernels.__file__)
"""
    done = run("-S", "-P", "-c", code, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


@pytest.mark.parametrize("number", range(8))
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


def test_the_values_part_writes_a_row_per_batch(as_if_on_a_gpu, empty_cache):
    assert gpu.values(CPU, "tiny", [1, 2]) == 0
    rows = measure.read_rows(as_if_on_a_gpu / "gpu_values.csv")
    assert [row["batch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert float(row["steps_per_edit"]) == 25
        assert float(row["peak_gib"]) == 3
        rate = float(row["ideal_tflop_per_edit"]) / float(row["seconds_per_edit"])
        assert float(row["share_of_matrix_rate"]) == pytest.approx(rate * 1e12 / 1e9, rel=1e-3)
        assert 1 <= float(row["counted_tflop_per_edit"]) / float(row["ideal_tflop_per_edit"]) < 1.3
    gpu.plot()
    assert (as_if_on_a_gpu / "gpu_values.png").stat().st_size > 5_000


def test_times_are_taken_in_turns_and_sorted():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.side_by_side(runs, CPU, budget=0.0, least=3)
    assert "".join(order) == "ab" + "ab" * 3
    assert {t.runs for t in times.values()} == {3}
    spread = measure.Times.of([0.005, 0.001, 0.002, 0.003, 0.004, 0.006])
    assert (spread.median, spread.low, spread.high) == (3.5, 2.0, 5.0)


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
