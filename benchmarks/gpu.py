"""What only a GPU shows, in one command: numbers, speed of the four ops, speed of the values. `make gpu`.

    python benchmarks/gpu.py [--part correctness|ops|values|sanitizer] [--minutes 9]

Every part is a process of its own, so that a broken kernel takes only its own part down, and writes a table to
benchmarks/results (or $OUT) row by row: gpu_correctness.csv, gpu_ops.csv, gpu_values.csv, gpu_sanitizer.csv. The
figures are redrawn at the end. Without a GPU it says what it leaves out. The exit status is 1 where anything is wrong.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from measure import ROOT, Table, origin, read_rows, results, side_by_side
from op_cases import OURS, Case, cases
from rome_fast.bench.roofline import Roofline, measure_roofline

PARTS = {
    "correctness": "every op against float64 on the GPU: dtypes, masks, odd sizes, strides (tests marked gpu)",
    "ops": "timings of the four ops beside what they replace, d_ff 1536 to 28672",
    "values": "seconds per edit of the values, shape llama-2-7b in bfloat16, batches of 1 to 256",
    "sanitizer": "compute-sanitizer on small sizes",
}
SIZES = (1536, 3072, 6400, 11008, 14336, 16384, 28672)
SHAPE = "llama-2-7b"
BATCHES = (1, 16, 64, 256)
_OP_SECONDS = 1.5  # of timing per case
_SHARES = {"correctness": 0.35, "ops": 0.45, "values": 0.75, "sanitizer": 1.0}
"""How much of the time that is left a part may take."""


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), help="this part only, in this process")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of d_ff, for the ops")
    parser.add_argument("--shape", default=SHAPE, help="of the model, for the values")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of edits, for the values")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        say("no CUDA GPU here; left out:")
        for name, what in PARTS.items():
            if arguments.part in (None, name):
                say(f"  {name}: {what}")
        return 0
    if arguments.part is None:
        return run_all(arguments.minutes, argv or sys.argv[1:])
    device = torch.device("cuda", torch.cuda.current_device())
    say(f"{arguments.part}: {torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    if arguments.part == "correctness":
        return correctness(device)
    if arguments.part == "ops":
        return ops(device, arguments.sizes)
    if arguments.part == "values":
        return values(device, arguments.shape, arguments.batches)
    return sanitizer(device)


def run_all(minutes: float, argv: Sequence[str]) -> int:
    """Each part in a process of its own, then the figures."""
    end = time.monotonic() + 60 * minutes
    worst = 0
    for part in PARTS:
        limit = _SHARES[part] * (end - time.monotonic())
        start = time.monotonic()
        try:
            done = subprocess.run([sys.executable, __file__, *argv, "--part", part], timeout=max(1.0, limit))
            code = done.returncode
        except subprocess.TimeoutExpired:
            say(f"{part}: stopped after {limit:.0f} s; the rows so far are kept")
            code = 1
        say(f"{part}: {'done' if code == 0 else f'status {code}'} in {time.monotonic() - start:.0f} s\n")
        worst = max(worst, int(code != 0))
    plot()
    return worst


def correctness(device: torch.device) -> int:
    """The tests that are marked gpu, one row each."""
    import pytest

    table = Table(results() / "gpu_correctness.csv", origin(device))
    count = {"passed": 0, "failed": 0, "skipped": 0}

    class Rows:
        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                count[report.outcome] += 1
                name = report.nodeid.partition("::")[2]
                detail = "" if report.outcome == "passed" else str(report.longrepr)[-500:]
                table.add({"check": name, "outcome": report.outcome, "seconds": report.duration, "detail": detail})

    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "--tb=short", f"--rootdir={ROOT}"]
    code = int(pytest.main([*options, str(ROOT / "tests" / "test_kernels_gpu.py")], plugins=[Rows()]))
    say(f"correctness: {count}")
    return code


def ops(device: torch.device, sizes: Sequence[int]) -> int:
    """Every case: check, then time, then one row per provider."""
    table = Table(results() / "gpu_ops.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    say(f"bf16 GEMM {roofline.matrix_rate / 1e12:.0f} TFLOP/s, copy {roofline.copy_bandwidth / 1e12:.2f} TB/s")
    wrong = 0
    for d_ff in sizes:
        for case in cases(d_ff, device):
            wrong += measure_case(case, device, roofline, table)
            del case
            torch.cuda.empty_cache()
    return int(wrong > 0)


def measure_case(case: Case, device: torch.device, roofline: Roofline, table: Table) -> int:
    """Rows of one case; how many of its providers are wrong. Those are not timed."""
    right = case.check()
    times = side_by_side({name: run for name, run in case.runs.items() if right[name]}, device, _OP_SECONDS)
    bound_ms = 1e3 * roofline.seconds(case.flops, case.moved_bytes)
    sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
    dtype = str(case.dtype).removeprefix("torch.")
    for name in case.runs:
        measured = times.get(name)
        row: dict[str, Any] = {
            "op": case.op,
            "variant": case.variant,
            "dtype": dtype,
            "d_ff": case.sizes["d_ff"],
            "sizes": sizes,
            "provider": name,
            "right": right[name],
            "error": case.errors[name],
            "ms": measured.median if measured else "",
            "ms_p20": measured.low if measured else "",
            "ms_p80": measured.high if measured else "",
            "runs": measured.runs if measured else 0,
            "bound_ms": bound_ms,
            "share_of_bound": bound_ms / measured.median if measured else "",
            "times_ours": measured.median / times[OURS].median if measured and OURS in times else "",
            "tflop_per_s": case.flops / measured.median / 1e9 if measured else "",
            "gb_per_s": case.moved_bytes / measured.median / 1e6 if measured else "",
            "gemm_tflop_per_s": roofline.matrix_rate / 1e12,
            "copy_gb_per_s": roofline.copy_bandwidth / 1e9,
        }
        table.add(row)
        figures = (
            f"{row['ms']:9.3f} ms  {row['share_of_bound']:5.0%} of the bound  x {row['times_ours'] or 0:.2f}"
            if measured
            else "WRONG, not timed"
        )
        say(f"{case.op:16}{case.variant:20}{dtype:9} {sizes:34}{name:40}error {row['error']:.1e} {figures}")
    return sum(not ok for ok in right.values())


def values(device: torch.device, shape: str, batches: Sequence[int]) -> int:
    """Seconds per edit of keys, values and update for batches of a random model's edits."""
    from rome_fast.bench.command import REQUESTS
    from rome_fast.bench.flops import FlopCounter
    from rome_fast.bench.shapes import repeated
    from rome_fast.bench.throughput import Track, ideal, run_timed, shape_setup
    from rome_fast.edits import load_edits
    from rome_fast.flow import tokenise
    from rome_fast.runner import Runner

    table = Table(results() / "gpu_values.csv", origin(device))
    edits = load_edits(REQUESTS)
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    setup, tokenizer = shape_setup(shape, device, torch.bfloat16, edits)
    runner = Runner(setup.model)
    weight_bytes = sum(p.nbytes for p in setup.model.parameters())
    requests = [
        tokenise(runner, setup.tokenizer, e, setup.contexts, setup.flow.how) for e in repeated(edits, max(batches))
    ]
    short = replace(setup, settings=replace(setup.settings, steps=2))
    short.flow.solve_each(requests[:2])
    for batch in batches:
        group = requests[:batch]
        torch.cuda.reset_peak_memory_stats(device)
        track, flow = Track("rome_fast"), setup.flow
        made = run_timed(track, flow, group)
        peak = torch.cuda.max_memory_allocated(device)
        useful = ideal(setup, group, [record for _, record in made]) / batch
        counted: float | None = None
        if batch <= 16:
            with FlopCounter() as counter:
                setup.flow.solve_each(group)
            counted = counter.total / batch
        seconds = track.wall_seconds / batch
        row = {
            "shape": shape,
            "dtype": "bfloat16",
            "batch": batch,
            "largest_batch": flow.largest_batch,
            "seconds_per_edit": seconds,
            "steps_per_edit": track.steps / batch,
            "rows_per_edit": len(group[0].rows),
            **{f"{stage}_seconds_per_edit": s / batch for stage, s in flow.clock.seconds.items()},
            "ideal_tflop_per_edit": useful / 1e12,
            "counted_tflop_per_edit": "" if counted is None else counted / 1e12,
            "tflop_per_s": useful / seconds / 1e12,
            "share_of_matrix_rate": useful / seconds / roofline.matrix_rate,
            "gemm_tflop_per_s": roofline.matrix_rate / 1e12,
            "peak_gib": peak / 2**30,
            "weights_gib": weight_bytes / 2**30,
            "statistics": "random, of the right size",
            "tokenizer": tokenizer,
        }
        table.add(row)
        say(
            f"batch {batch:4} (at once {flow.largest_batch}): {seconds:.3f} s per edit, "
            f"{row['tflop_per_s']:.0f} TFLOP/s, {row['share_of_matrix_rate']:.0%} of the matrix rate, "
            f"peak {row['peak_gib']:.1f} GiB"
        )
    return 0


def sanitizer(device: torch.device) -> int:
    """Every kernel once under compute-sanitizer; each allocation is the driver's own, so that its end is known."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        say("sanitizer: left out, there is no compute-sanitizer on this machine")
        return 0
    table = Table(results() / "gpu_sanitizer.csv", origin(device))
    worst = 0
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "3", sys.executable]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, str(Path(__file__).with_name("sanitized.py"))],
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=100,
            )
            code, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            code, text = 124, "stopped after 100 s"
        summary = next((line for line in reversed(text.splitlines()) if "SUMMARY" in line), text.strip()[-300:])
        table.add({"tool": tool, "status": code, "seconds": time.monotonic() - start, "summary": summary})
        say(f"sanitizer: {tool}: status {code}, {summary}")
        worst = max(worst, int(code == 9))
    return worst


def plot() -> None:
    """Share of the bound by op and d_ff, and seconds per edit by batch, from the tables."""
    try:
        import matplotlib
    except ImportError:
        say("figures: left out, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_rows(results() / "gpu_ops.csv") if row["ms"]]
    panels = sorted({(row["op"], row["variant"], row["dtype"]) for row in rows})
    if panels:
        figure, axes = plt.subplots(2, (len(panels) + 1) // 2, figsize=(16, 7), squeeze=False)
        for axis, key in zip(axes.flat, panels, strict=False):
            mine = [row for row in rows if (row["op"], row["variant"], row["dtype"]) == key]
            for provider in dict.fromkeys(row["provider"] for row in mine):
                points = sorted((int(r["d_ff"]), float(r["share_of_bound"])) for r in mine if r["provider"] == provider)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=provider)
            axis.set_title(" · ".join(key), fontsize=9)
            axis.set_xlabel("d_ff")
            axis.set_ylim(0)
            axis.legend(frameon=False, fontsize=6)
        axes[0][0].set_ylabel("share of the bound")
        _finish(figure, rows[0], results() / "gpu_ops.png")
    rows = read_rows(results() / "gpu_values.csv")
    if rows:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), squeeze=False)
        for axis, name in zip(axes.flat, ("seconds_per_edit", "share_of_matrix_rate"), strict=True):
            axis.plot([int(r["batch"]) for r in rows], [float(r[name]) for r in rows], marker="o")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("edits in one call")
            axis.set_title(f"{rows[0]['shape']}, {rows[0]['dtype']}: {name.replace('_', ' ')}", fontsize=9)
            axis.set_ylim(0)
        _finish(figure, rows[0], results() / "gpu_values.png")


def _finish(figure: Any, row: dict[str, str], file: Path) -> None:
    note = f"{row['device']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}, {row['date']}"
    figure.text(0.995, 0.005, note, ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(file, dpi=130)
    say(f"figure: {file}")


if __name__ == "__main__":
    sys.exit(main())
