"""The GPU benchmark on a machine without a GPU, from a checkout that is not installed; and its parts on a CPU."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpu
import gpu_commands
import gpu_statistics
import gpu_streaming
import gpu_values
import measure
import op_cases
import random_checkpoint
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


def test_without_a_gpu_it_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
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
    monkeypatch.setattr(gpu, "share_of", lambda part: 0.5)
    monkeypatch.setattr(gpu, "_GRACE_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "plot", lambda: None)
    start = time.monotonic()
    assert gpu.run_all(0.05, [str(tmp_path)]) == status
    assert time.monotonic() - start < 30
    assert (tmp_path / "order").read_text().split() == [part for part in parts if part != "fails"]
    assert (tmp_path / "obeys").exists() == ("obeys" in parts)


def test_every_part_may_take_the_minutes_that_the_docstring_names():
    """All parts in all that time, and each of them longer where those before it were quick."""
    assert list(gpu._MINUTES) == list(gpu.PARTS)
    said = dict(re.findall(r"^    ([a-z-]+) +(\d\.\d)  ", gpu.__doc__, re.MULTILINE))
    assert {part: float(minutes) for part, minutes in said.items()} == gpu._MINUTES
    assert sum(gpu._MINUTES.values()) <= 8
    left = 8.0
    for part, minutes in gpu._MINUTES.items():
        assert gpu.share_of(part) * left >= minutes
        left -= minutes
    assert gpu.share_of("sanitizer") == 1


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


def test_the_correctness_part_writes_a_row_per_outcome(tmp_path, monkeypatch, capsys):
    """By reports as pytest makes them; `make acceptance` has pytest itself run tests, here and in processes."""
    monkeypatch.setenv("OUT", str(tmp_path))
    code, asked = [0], []

    def run_tests(options, plugins):
        asked.append(options)
        rest = {"duration": 0.5, "longrepr": "E  wrong"}
        for when, outcome, name in (
            ("setup", "passed", "test_a"),
            ("call", "passed", "test_a"),
            ("setup", "skipped", "test_b[1]"),
            ("call", "failed", "test_c"),
        )[: 2 if code[0] == 0 else None]:
            report = SimpleNamespace(when=when, outcome=outcome, nodeid=f"tests/test_x.py::{name}", **rest)
            plugins[0].pytest_runtest_logreport(report)
        return code[0]

    monkeypatch.setattr(pytest, "main", run_tests)
    assert gpu.correctness(CPU, ("-m", "gpu", "tests/test_x.py"), 1) == 0
    assert asked[0][-5:] == ["-n", "1", "-m", "gpu", str(ROOT / "tests/test_x.py")]
    code[0] = 1
    assert gpu.correctness(CPU, ("tests/test_x.py",)) == 1
    assert "-n" not in asked[1]
    rows = measure.read_rows(tmp_path / "gpu_correctness.csv")
    assert [(row["check"], row["outcome"], row["correct"], row["seconds"], row["detail"]) for row in rows] == [
        ("test_a", "passed", "yes", "0.5", ""),
        ("test_b[1]", "skipped", "", "0.5", "E  wrong"),
        ("test_c", "failed", "no", "0.5", "E  wrong"),
    ]
    assert "'passed': 1, 'failed': 1, 'skipped': 1" in capsys.readouterr().out
    monkeypatch.setattr(pytest, "main", lambda options, plugins: 0)
    assert gpu.correctness(CPU, ("tests/test_x.py",)) == 1, "nothing has passed"


@pytest.mark.slow
def test_tests_that_only_a_gpu_can_run_come_before_those_of_the_reference(tmp_path):
    (tmp_path / "test_reference_like.py").write_text(REFERENCE)
    (tmp_path / "test_own.py").write_text(OWN)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, torch
from pathlib import Path
sys.exit(gpu.correctness(torch.device("cpu"), ["-m", "gpu", {str(tmp_path / "test_own.py")!r}]))
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


@pytest.fixture
def tiny(monkeypatch, tmp_path, empty_cache):
    """A function that runs a part at tiny sizes on the CPU, in this process: its exit status and rows."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    for part in (gpu, gpu_values, gpu_statistics):
        monkeypatch.setattr(part, "measure_roofline", lambda device, dtype: Roofline(1e9, 64, "bfloat16", 1e9, 1024))
    tables = {"kernels": "compiled", "end-to-end": "commands"}

    def run_part(part, *options):
        code = gpu.main(["--tiny", "--device", "cpu", "--part", part, *options])
        rows = measure.read_rows(tmp_path / "out" / f"gpu_{tables.get(part, part)}.csv")
        assert rows
        assert {(row["device"], row["torch"]) for row in rows} == {("cpu", torch.__version__)}
        return code, rows

    return run_part


def test_on_a_cpu_nothing_of_full_size_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("without --tiny, left out on a CPU:")
    assert list(tmp_path.iterdir()) == []


def test_the_kernels_part_runs_a_worker_for_every_size(tiny, monkeypatch):
    code, rows = tiny("kernels")
    assert code == 0
    assert [row["worker"] for row in rows] == ["ops 70", "values", "statistics", "sanitized"]
    assert {(row["status"], row["correct"]) for row in rows} == {("0", "yes")}


def test_a_worker_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    script = tmp_path / "workers.py"
    script.write_text("import sys\nprint('said')\nsys.exit(sys.argv[-1] == 'values')\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.kernels(CPU, gpu.TINY, apart=True) == 1
    rows = {row["worker"]: row for row in measure.read_rows(tmp_path / "gpu_compiled.csv")}
    assert set(rows) == {"ops 70", "values", "statistics", "sanitized"}
    assert {name: (row["status"], row["correct"], row["detail"]) for name, row in rows.items()} == {
        name: ("1", "no", "said") if name == "values" else ("0", "yes", "") for name in rows
    }


@pytest.mark.slow
def test_the_correctness_part_runs_tests_in_processes(tmp_path):
    """In a process of its own, as pytest is: the tests of products, none of which needs a GPU."""
    done = run(str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--part", "correctness", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = measure.read_rows(tmp_path / "gpu_correctness.csv")
    assert len(rows) >= 10
    assert {(row["outcome"], row["correct"]) for row in rows} == {("passed", "yes")}
    assert "bringing up nodes" in done.stdout
    assert f"'passed': {len(rows)}" in done.stdout


def test_the_ops_part_writes_a_row_per_provider_and_times_no_wrong_one(tiny, monkeypatch, tmp_path, capsys):
    small = list(op_cases.cases(70, CPU, tokens=130, rows=64))
    spoiled = small[-1]
    ours = spoiled.runs[op_cases.OURS]
    wrong = [False]
    spoiled.runs[op_cases.OURS] = lambda: ours() * (1 + wrong[0])
    monkeypatch.setattr(gpu, "cases", lambda d_ff, device, *, tokens, rows: iter(small))
    code, rows = tiny("ops")
    assert code == 0
    assert len(rows) == sum(len(case.runs) for case in small)
    assert {row["op"] for row in rows} == {
        "second_moment_",
        "prefixed_solve",
        "rank_update_",
        "low_rank_apply_",
        "suffix_attention",
        "add_rms_norm",
        "rotate_heads",
        "gated_activation",
        "target_losses_",
    }
    assert {row["correct"] for row in rows} == {"yes"}
    wrong[0] = True
    code, rows = tiny("ops")
    assert code == 1
    for row in rows:
        spoilt = (row["op"], row["provider"]) == (spoiled.op, op_cases.OURS)
        assert row["correct"] == ("no" if spoilt else "yes")
        assert (row["ms"] == "") == spoilt
        if row["ms"]:
            assert float(row["share_of_bound"]) == pytest.approx(float(row["bound_ms"]) / float(row["ms"]), rel=1e-3)
            assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
    assert "WRONG, not timed" in capsys.readouterr().out
    gpu.plot()
    assert (tmp_path / "out" / "gpu_ops.png").stat().st_size > 10_000


def test_the_values_part_writes_a_row_per_batch_and_rule(tiny, monkeypatch, tmp_path):
    events, seconds = [], iter([3.0, 1.0, 2.0, 6.0, 5.0, 4.0, 8.0, 10.0])
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
    monkeypatch.setattr(throughput, "default_settings", lambda config: ValueSettings(steps=20))
    monkeypatch.setattr(gpu_values, "forget_peak", lambda device: events.append("reset"))
    monkeypatch.setattr(gpu_values, "peak_bytes", lambda device: 3 << 30)
    code, rows = tiny("values")
    assert code == 0
    # Each group is warm, and checked, before the peak is reset; a short one runs three times, and once more to count
    # FLOPs.
    expected = []
    for batch in (1, 2):
        for steps in (16, 20):
            times = 4 if batch == 1 else 1
            expected += [(batch, 2), (batch, 1), "reset", *[(batch, steps)] * times]
    assert events == expected
    assert [(row["batch"], row["rule"]) for row in rows] == [
        (batch, rule) for batch in "12" for rule in ("default", "all steps")
    ]
    assert [(row["repeats"], float(row["seconds_per_edit"])) for row in rows] == [
        ("3", 2.0),
        ("3", 5.0),
        ("1", 4.0),
        ("1", 5.0),
    ]
    for row in rows:
        drafted = row["rule"] == "default"
        assert (float(row["steps_per_edit"]), float(row["drafted_per_edit"])) == ((16, 15) if drafted else (20, 0))
        assert row["correct"] == "yes"
        assert float(row["peak_gib"]) == 3
        rate = float(row["ideal_tflop_per_edit"]) / float(row["seconds_per_edit"])
        assert float(row["share_of_matrix_rate"]) == pytest.approx(rate * 1e12 / 1e9, rel=1e-3)
    for row in rows[:2]:
        counted, ideal = (float(row[f"{name}_tflop_per_edit"]) for name in ("counted", "ideal"))
        assert 1 <= counted / ideal < 1.3
    assert {row["counted_tflop_per_edit"] for row in rows[2:]} == {""}
    gpu.plot()
    assert (tmp_path / "out" / "gpu_values.png").stat().st_size > 5_000


def test_the_values_part_notices_a_loss_that_is_another(tiny, monkeypatch):
    """Off by more than rounding, as it would be if a row saw another context."""
    monkeypatch.setattr(throughput, "default_settings", lambda config: ValueSettings(steps=2))
    plain = gpu_values.plain_loss

    def off(model, request):
        loss, allowed = plain(model, request)
        return loss + 1.5 * allowed, allowed

    monkeypatch.setattr(gpu_values, "plain_loss", off)
    code, rows = tiny("values", "--batches", "1")
    assert code == 1
    assert {row["correct"] for row in rows} == {"no"}


def test_the_statistics_part_says_what_a_collection_and_its_sum_took(tiny, monkeypatch):
    events, own = [], collect.second_moment_

    def slow(total, x, mask=None):
        time.sleep(0.02)
        return own(total, x, mask)

    def noting(name):
        original = getattr(gpu_statistics, name)

        def noted(*arguments):
            events.append(name)
            return original(*arguments)

        monkeypatch.setattr(gpu_statistics, name, noted)

    monkeypatch.setattr("rome_fast.kernels.second_moment_", slow)
    for name in ("summing_exactly", "forget_peak", "timing_second_moments"):
        noting(name)
    monkeypatch.setattr(gpu_statistics, "peak_bytes", lambda device: 3 << 30)
    monkeypatch.setattr(gpu_statistics, "_SHORT_TOKENS", 500)
    code, rows = tiny("statistics", "--tokens", "300", "9000")
    assert code == 0
    assert collect.second_moment_ is own, "the wrapper is still there"
    # The same collection once, and checked, before the clock runs.
    timed = "timing_second_moments"
    assert events == ["summing_exactly", "forget_peak", timed, timed, timed, "summing_exactly", "forget_peak", timed]
    assert [(row["tokens"], row["repeats"]) for row in rows] == [("300", "3"), ("9000", "1")]
    # Two layers of 2 · 64² + 2 · 64 · 32 weights for attention and 3 · 64 · 160 below it, and 160² for the sum.
    flops = 2 * 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 160) + 160**2
    for row in rows:
        figures = {name: float(row[name]) for name in row if name.endswith(("seconds", "_s", "share", "token", "rate"))}
        assert row["layer"] == "1"
        assert row["layers_made"] == "2 of 4, random weights"
        assert row["correct"] == "yes"
        # The promise of the op.
        assert float(row["error"]) <= 1e-6
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


def test_the_statistics_part_notices_a_sum_that_is_wrong(tiny, monkeypatch):
    own = collect.second_moment_
    monkeypatch.setattr("rome_fast.kernels.second_moment_", lambda total, x, mask=None: own(total, 1.01 * x, mask))
    code, rows = tiny("statistics")
    assert code == 1
    assert [row["correct"] for row in rows] == ["no"]


def test_the_streaming_part_sets_an_edit_under_a_budget_against_one_in_memory(tiny):
    code, rows = tiny("streaming")
    assert code == 0
    found = {row["what"]: row for row in rows}
    assert list(found) == ["save", "read, page cache", "copy, pinned", "resident", "streamed"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    resident, streamed = found["resident"], found["streamed"]
    assert (resident["correct"], streamed["correct"]) == ("yes", "yes")
    assert (resident["budget_gib"], float(resident["gb"])) == ("", 0)
    assert float(streamed["difference"]) == 0
    # Two edits of three evaluations, each of which needs more than is kept of it.
    assert float(streamed["gb"]) > 2 * 3 * (float(found["save"]["gb"]) - 300 * 1024 / 1e9)
    for share, other in (("share_of_copy", "copy, pinned"), ("share_of_page_cache", "read, page cache")):
        ratio = float(streamed["gb_per_s"]) / float(found[other]["gb_per_s"])
        assert float(streamed[share]) == pytest.approx(ratio, rel=1e-3)


def test_the_streaming_part_notices_other_bytes(tiny, monkeypatch):
    original = gpu_streaming._Run.edited

    def spoiled(self, memory, out, on_read):
        result = original(self, memory, out, on_read)
        if memory is not None:
            (name,) = result.delta.updates
            for shard in out.glob("*.safetensors"):
                tensors = load_file(shard)
                if name in tensors:
                    tensors[name][3, 5] *= 2
                    save_file(tensors, shard, {"format": "pt"})
        return result

    monkeypatch.setattr(gpu_streaming._Run, "edited", spoiled)
    code, rows = tiny("streaming")
    assert code == 1
    assert [row["correct"] for row in rows[-2:]] == ["yes", "no"]
    assert float(rows[-1]["difference"]) > 0


def test_the_end_to_end_part_runs_every_command(tiny):
    code, rows = tiny("end-to-end")
    assert code == 0, rows[-1]["detail"]
    commands = ["statistics", "edit", "evaluate", "study", "revert", "profile"]
    assert [(row["command"], row["dtype"]) for row in rows] == [
        *((command, "float16") for command in commands),
        ("profile", "bfloat16"),
    ]
    assert {(row["status"], row["correct"]) for row in rows} == {("0", "yes")}
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_the_end_to_end_part_notices_what_fails_and_what_is_left_wrong(tiny, monkeypatch):
    def spoiled(arguments):
        if arguments[0] == "statistics":
            return own(arguments)
        return (0, "said nothing") if arguments[0] == "edit" else (2, "not asked for")

    own = gpu_commands.here
    monkeypatch.setattr(gpu_commands, "here", spoiled)
    code, rows = tiny("end-to-end")
    assert code == 1
    assert [(row["command"], row["status"], row["correct"]) for row in rows] == [
        ("statistics", "0", "yes"),
        ("edit", "0", "no"),
        ("profile", "2", "no"),
    ]
    assert rows[1]["detail"].startswith("what it left is wrong")
    assert rows[2]["detail"] == "status 2: not asked for"


def test_a_command_in_a_process_of_its_own():
    run_command = gpu_commands.in_a_process(60)
    code, text = run_command(["revert"])
    assert code == 2
    assert "the following arguments are required: directory" in text


def test_the_sanitizer_part_runs_the_kernels_on_a_cpu_without_it(tiny, monkeypatch):
    code, rows = tiny("sanitizer")
    assert code == 0
    assert [(row["tool"], row["status"], row["correct"]) for row in rows] == [("none", "0", "yes")]


SANITIZER = """#!/bin/sh
echo "$*, caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"
echo "========= ERROR SUMMARY: 1 error"
[ "$2" = memcheck ] && exit 9
sleep 60
"""
REFUSING = """#!/bin/sh
echo "========= Error: Device not supported. Please refer to the documentation"
exit 1
"""


@pytest.mark.parametrize(
    ("script", "status", "wanted"),
    [
        (
            SANITIZER,
            1,
            [
                ("memcheck", "9", "no", "========= ERROR SUMMARY: 1 error"),
                ("racecheck", "124", "no", "stopped after 1 s"),
            ],
        ),
        (REFUSING, 0, [("memcheck", "1", "", None), ("racecheck", "1", "", None)]),
    ],
)
def test_the_sanitizer_part_writes_a_row_per_tool_and_stops_one_that_hangs(
    script, status, wanted, tmp_path, monkeypatch
):
    monkeypatch.setenv("OUT", str(tmp_path))
    program = tmp_path / "compute-sanitizer"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "_TOOL_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "origin", lambda device: {"device": "none"})
    assert gpu.sanitizer(torch.device("cuda")) == status
    rows = measure.read_rows(tmp_path / "gpu_sanitizer.csv")
    for row, (tool, code, correct, summary) in zip(rows, wanted, strict=True):
        assert (row["tool"], row["status"], row["correct"]) == (tool, code, correct)
        assert summary is None or row["summary"] == summary
        assert float(row["seconds"]) < 30


def test_texts_are_drawn_of_the_built_in_ones_and_long_enough(empty_cache):
    texts = random_checkpoint.drawn_texts(3000)
    assert texts == random_checkpoint.drawn_texts(3000) != random_checkpoint.drawn_texts(3000, seed=1)
    words = {word for sentence in random_checkpoint.sentences() for word in sentence.split()}
    assert {word for text in texts for word in text.split()} <= words
    assert 3000 <= sum(len(text.split()) for text in texts) < 4000
    assert len({len(text) for text in texts}) > len(texts) / 2
    tokenizer, _ = tokenizer_for(1024, random_checkpoint.sentences())
    assert sum(len(row.ids) for row in encode(tokenizer, texts)) >= 3000
