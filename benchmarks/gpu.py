"""What only a GPU shows, in one command: `make gpu`. Everything of it runs at tiny sizes on a CPU as well.

    python benchmarks/gpu.py [--part PART] [--minutes 8]     # on a GPU
    python benchmarks/gpu.py [--part PART] --tiny            # in seconds, on whatever there is

Every part is a process of its own, so that a broken kernel takes only its own part down, and writes a table to
benchmarks/results (or $OUT; with --tiny build/gpu) row by row, so that what has been measured when time is up is kept.
In their order, with the minutes assumed on one H200 with 16 cores, eight in all:

    kernels      0.7  all kernels are compiled, by a process for each size; the others then find them in triton's cache
    correctness  0.6  tests marked gpu, in 12 processes
    ops          1.4  the ops beside what they replace, d_ff 1536 to 28672
    values       2.3  seconds per edit, shape llama-2-7b in bfloat16, batches of 1 to 256: by the default rule as far as
                      a random model goes, 15 steps on 5 rows and one on all, and with all steps on all rows
    statistics   0.4  tokens per second of second moments, the same shape
    streaming    1.0  a checkpoint of the same shape edited under 6 GiB, its bytes and its rate
    end-to-end   0.9  the command line on a small checkpoint, in three dtypes, and a profile of 32 edits of llama-2-7b
    sanitizer    0.7  compute-sanitizer on small sizes

A part that takes longer than its share of the time is stopped; one that takes less leaves the rest to the others. The
figures are redrawn at the end. Without a GPU and --tiny it says what it leaves out. The exit status is 1 where anything
is wrong, or was stopped.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
import sanitized
from groups import ending_in_order, run_group
from measure import ROOT, Table, origin, read_rows, results, side_by_side, yes
from op_cases import OURS, Case, cases
from rome_fast.bench.roofline import Roofline, measure_roofline

PARTS = {
    "kernels": "every kernel compiled once, by many processes",
    "correctness": "every op against float64 on the GPU: dtypes, masks, odd sizes, strides (tests marked gpu)",
    "ops": "timings of the ops beside what they replace, d_ff 1536 to 28672",
    "values": "seconds per edit of the values, shape llama-2-7b in bfloat16, batches of 1 to 256",
    "statistics": "tokens per second of second moments, shape llama-2-7b in bfloat16",
    "streaming": "an edit under 6 GiB of a checkpoint of that shape: its bytes, and bytes per second",
    "end-to-end": "statistics, edit, evaluate, study, revert and profile by the command line, in three dtypes",
    "sanitizer": "compute-sanitizer on small sizes",
}
_MINUTES = {
    "kernels": 0.7,
    "correctness": 0.6,
    "ops": 1.4,
    "values": 2.3,
    "statistics": 0.4,
    "streaming": 1.0,
    "end-to-end": 0.9,
    "sanitizer": 0.7,
}
"""Assumed of each part, on the machine that the docstring names."""
_SLACK = 1.5  # times its share of the time that is left, which a part may take


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    d_ff: tuple[int, ...] = (1536, 3072, 6400, 11008, 14336, 16384, 28672)
    op_tokens: int = 16_384  # rows of a second moment
    op_rows: int = 4096  # of low_rank_apply_
    op_seconds: float = 0.6  # of timing per case
    shape: str = "llama-2-7b"
    batches: tuple[int, ...] = (1, 16, 64, 256)
    # About the default budget of this shape, and one at which what is done once hardly counts.
    tokens: tuple[int, ...] = (110_000, 1_000_000)
    memory: str = "6GiB"  # of a streamed edit
    streamed_steps: int = 3
    copied_bytes: int = 4 << 30
    command_shape: str = "tiny"
    command_tokens: int = 20_000
    command_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    profiled: int = 32  # edits of `shape`
    processes: int = 12  # of the tests
    tests: tuple[str, ...] = ("-m", "gpu", "tests/test_kernels_gpu.py", "tests/test_products.py")


TINY = Sizes(
    d_ff=(70,),
    op_tokens=130,
    op_rows=64,
    op_seconds=0.0,
    shape="tiny",
    batches=(1, 2),
    tokens=(300,),
    memory="300KiB",
    copied_bytes=1 << 20,
    command_tokens=400,
    command_dtypes=(torch.float16,),
    profiled=2,
    processes=1,
    tests=("-m", "not gpu", "tests/test_products.py", "-k", "result_in_fp32 or dtype_chosen"),
)

_GRACE_SECONDS = 5.0  # between asking a part to end and killing it
_TOOL_SECONDS = 60.0  # for one tool of compute-sanitizer
_WORKER_SECONDS = 100.0  # for one process that compiles
_COMMAND_SECONDS = 60.0  # for one command of the command line


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), help="this part only, in this process")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
    parser.add_argument("--device", help="cuda, or with --tiny cpu (default: cuda where torch finds one)")
    parser.add_argument("--sizes", type=int, nargs="+", help="of d_ff, for the ops")
    parser.add_argument("--shape", help="of the model, for values, statistics and streaming")
    parser.add_argument("--batches", type=int, nargs="+", help="of edits, for the values")
    parser.add_argument("--tokens", type=int, nargs="+", help="to read, for the statistics")
    parser.add_argument("--memory", help="budget of the streamed edit")
    parser.add_argument("--folder", help="where to put its checkpoint (default: the temporary folder)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available() if arguments.device is None else arguments.device.startswith("cuda")
    if not on_gpu and not arguments.tiny:
        say("no CUDA GPU here; left out:" if arguments.device is None else "without --tiny, left out on a CPU:")
        for name, what in PARTS.items():
            if arguments.part in (None, name):
                say(f"  {name}: {what}")
        return 0
    if arguments.tiny:
        # The tables of a GPU are not overwritten by what a CPU shows.
        os.environ.setdefault("OUT", str(ROOT / "build" / "gpu"))
    if arguments.part is None:
        return run_all(arguments.minutes, sys.argv[1:] if argv is None else argv)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    say(f"{arguments.part}: {name}, torch {torch.__version__}")
    given = {
        "d_ff": arguments.sizes and tuple(arguments.sizes),
        "shape": arguments.shape,
        "batches": arguments.batches and tuple(arguments.batches),
        "tokens": arguments.tokens and tuple(arguments.tokens),
        "memory": arguments.memory,
    }
    sizes = replace(TINY if arguments.tiny else Sizes(), **{k: v for k, v in given.items() if v})
    if arguments.worker:
        compile_kernels(arguments.worker, device, sizes)
        return 0
    with ending_in_order():
        return run_part(arguments.part, device, sizes, arguments.tiny, arguments.folder)


def run_part(part: str, device: torch.device, sizes: Sizes, tiny: bool, folder: str | None) -> int:
    """The exit status of a part."""
    if part == "kernels":
        return kernels(device, sizes, apart=not tiny)
    if part == "correctness":
        return correctness(device, sizes.tests, sizes.processes)
    if part == "ops":
        return ops(device, sizes)
    if part == "values":
        from gpu_values import values

        return values(device, sizes.shape, sizes.batches)
    if part == "statistics":
        from gpu_statistics import statistics

        return statistics(device, sizes.shape, sizes.tokens)
    if part == "streaming":
        from gpu_streaming import streaming

        return streaming(device, sizes.shape, sizes.memory, sizes.streamed_steps, sizes.copied_bytes, folder)
    if part == "end-to-end":
        from gpu_commands import end_to_end

        dtypes, profiled = sizes.command_dtypes, (sizes.shape, sizes.profiled)
        tokens, shape = sizes.command_tokens, sizes.command_shape
        return end_to_end(device, shape, tokens, _COMMAND_SECONDS, dtypes, profiled, apart=not tiny)
    return sanitizer(device)


def run_all(minutes: float, argv: Sequence[str]) -> int:
    """Each part in a process of its own, then the figures."""
    end = time.monotonic() + 60 * minutes
    worst = 0
    for part in PARTS:
        limit = share_of(part) * (end - time.monotonic())
        start = time.monotonic()
        with subprocess.Popen([sys.executable, __file__, *argv, "--part", part]) as process:
            try:
                code = process.wait(max(1.0, limit))
            except subprocess.TimeoutExpired:
                say(f"{part}: stopped after {limit:.0f} s; the rows so far are kept")
                code = 1
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
                process.kill()
        say(f"{part}: {'done' if code == 0 else f'status {code}'} in {time.monotonic() - start:.0f} s\n")
        worst = max(worst, int(code != 0))
    plot()
    return worst


def share_of(part: str) -> float:
    """How much of the time that is left when its turn comes a part may take."""
    names = list(PARTS)
    rest = sum(_MINUTES[name] for name in names[names.index(part) :])
    return min(1.0, _SLACK * _MINUTES[part] / rest)


def kernels(device: torch.device, sizes: Sizes, *, apart: bool) -> int:
    """A row for each worker; `apart` each is a process, and all of them run side by side."""
    table = Table(results() / "gpu_compiled.csv", origin(device))
    workers = [*(f"ops {d_ff}" for d_ff in sizes.d_ff), "values", "statistics", "sanitized"]

    def work(worker: str) -> tuple[int, str, float]:
        start = time.monotonic()
        if apart:
            options = ["--part", "kernels", "--shape", sizes.shape, "--worker", worker]
            code, text = run_group([sys.executable, __file__, *options], _WORKER_SECONDS)
        else:
            compile_kernels(worker, device, sizes)
            code, text = 0, ""
        return code, text, time.monotonic() - start

    wrong = 0
    with ThreadPoolExecutor(len(workers) if apart else 1) as pool:
        started = {pool.submit(work, worker): worker for worker in workers}
        for done in as_completed(started):
            code, text, seconds = done.result()
            detail = text.strip()[-300:] if code else ""
            table.add(
                {
                    "worker": started[done],
                    "status": code,
                    "seconds": seconds,
                    "correct": yes(code == 0),
                    "detail": detail,
                }
            )
            say(f"kernels: {started[done]}: {seconds:.0f} s {detail}")
            wrong += code != 0
    return int(wrong > 0)


def compile_kernels(worker: str, device: torch.device, sizes: Sizes) -> None:
    """Run once what a part will run, and nothing of it for long."""
    name, _, number = worker.partition(" ")
    if name == "ops":
        for case in cases(int(number), device, tokens=sizes.op_tokens, rows=sizes.op_rows):
            case.runs[OURS]()
            del case
    elif name == "values":
        from gpu_values import prepare_values
        from rome_fast.bench.throughput import warm_up

        prepared = prepare_values(device, sizes.shape, min(16, max(sizes.batches)))
        for count in sorted({1, len(prepared[1])}):
            warm_up(prepared[0], prepared[1][:count])
    elif name == "statistics":
        from gpu_statistics import prepare_statistics
        from random_checkpoint import drawn_texts
        from rome_fast import collect_statistics

        model, tokenizer, _, layer = prepare_statistics(device, sizes.shape)
        count = min(40_000, max(sizes.tokens))
        collect_statistics(model, tokenizer, drawn_texts(count), [layer], count)
    else:
        sanitized.main(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def correctness(device: torch.device, tests: Sequence[str], processes: int = 0) -> int:
    """The tests that are marked gpu, one row each; 1 also where none has passed.

    `tests` are arguments of pytest, files relative to the repository. Without processes of their own those tests
    that a file imports, which a CPU runs too, come last; processes need pytest-xdist, and there are none where it is
    missing.
    """
    import pytest

    table = Table(results() / "gpu_correctness.csv", origin(device))
    count = {"passed": 0, "failed": 0, "skipped": 0}

    class Rows:
        @staticmethod
        def pytest_collection_modifyitems(items: list[Any]) -> None:
            # When time is up, what no other machine can show has been seen.
            items.sort(key=lambda item: item.function.__module__ != item.module.__name__)

        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                count[report.outcome] += 1
                name = report.nodeid.partition("::")[2]
                detail = "" if report.outcome == "passed" else str(report.longrepr)[-500:]
                correct = yes(report.outcome == "passed") if report.outcome != "skipped" else ""
                row = {"check": name, "outcome": report.outcome, "correct": correct, "seconds": report.duration}
                table.add(row | {"detail": detail})

    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "--tb=short", f"--rootdir={ROOT}"]
    if processes and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(processes)]
    where = [str(ROOT / name) if name.startswith("tests/") else name for name in tests]
    code = int(pytest.main([*options, *where], plugins=[Rows()]))
    say(f"correctness: {count}")
    return code or int(count["passed"] == 0)


def ops(device: torch.device, sizes: Sizes) -> int:
    """Every case: check, then time, then one row per provider."""
    table = Table(results() / "gpu_ops.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    say(f"bf16 GEMM {roofline.matrix_rate / 1e12:.0f} TFLOP/s, copy {roofline.copy_bandwidth / 1e12:.2f} TB/s")
    wrong = 0
    for d_ff in sizes.d_ff:
        for case in cases(d_ff, device, tokens=sizes.op_tokens, rows=sizes.op_rows):
            wrong += measure_case(case, device, roofline, table, sizes.op_seconds)
            del case
            torch.cuda.empty_cache()
    return int(wrong > 0)


def measure_case(case: Case, device: torch.device, roofline: Roofline, table: Table, seconds: float) -> int:
    """Rows of one case; how many of its providers are wrong. Those are not timed."""
    right = case.check()
    times = side_by_side({name: run for name, run in case.runs.items() if right[name]}, device, seconds)
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
            "correct": yes(right[name]),
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


def sanitizer(device: torch.device) -> int:
    """Every kernel once under compute-sanitizer; each allocation is the driver's own, so that its end is known.

    On a CPU the same program runs without it. A device that the tool does not know is left out, with a row.
    """
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    table = Table(results() / "gpu_sanitizer.csv", origin(device))
    worst = 0
    for tool in ("memcheck", "racecheck") if device.type == "cuda" else ("none",):
        options: list[str] = []
        if tool != "none" and program is None:
            what = "there is no compute-sanitizer on this machine"
            table.add({"tool": tool, "status": "", "seconds": 0.0, "correct": "", "summary": what})
            say(f"sanitizer: {tool}: left out, {what}")
            continue
        if tool != "none":
            options = [str(program), "--tool", tool, "--error-exitcode", "9", "--print-limit", "3"]
        start = time.monotonic()
        command = [*options, sys.executable, str(Path(__file__).with_name("sanitized.py")), device.type]
        code, text = run_group(command, _TOOL_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = next((line for line in reversed(text.splitlines()) if "SUMMARY" in line), text.strip()[-300:])
        unknown = "Device not supported" in text
        correct = "" if unknown else yes(code == 0)
        seconds = time.monotonic() - start
        table.add({"tool": tool, "status": code, "seconds": seconds, "correct": correct, "summary": summary})
        say(f"sanitizer: {tool}: status {code}, {summary}")
        worst = max(worst, int(correct == "no"))
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
            for rule in dict.fromkeys(r.get("rule", "all steps") for r in rows):
                mine = [r for r in rows if r.get("rule", "all steps") == rule]
                axis.plot([int(r["batch"]) for r in mine], [float(r[name]) for r in mine], marker="o", label=rule)
            axis.legend(frameon=False, fontsize=7)
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
