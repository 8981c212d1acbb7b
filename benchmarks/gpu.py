"""What only a GPU shows, in one command: numbers, and the speed of ops, values and statistics. `make gpu`.

    python benchmarks/gpu.py [--part correctness|ops|values|statistics|sanitizer] [--minutes 9]

Every part is a process of its own, so that a broken kernel takes only its own part down, and writes a table to
benchmarks/results (or $OUT) row by row: gpu_correctness.csv, gpu_ops.csv, gpu_values.csv, gpu_statistics.csv,
gpu_sanitizer.csv. The figures are redrawn at the end. Without a GPU it says what it leaves out. The exit status is 1
where anything is wrong.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from measure import ROOT, Table, origin, read_rows, results, side_by_side, timed
from op_cases import OURS, Case, cases
from rome_fast.bench.roofline import Roofline, measure_roofline

PARTS = {
    "correctness": "every op against float64 on the GPU: dtypes, masks, odd sizes, strides (tests marked gpu)",
    "ops": "timings of the five ops beside what they replace, d_ff 1536 to 28672",
    "values": "seconds per edit of the values, shape llama-2-7b in bfloat16, batches of 1 to 256",
    "statistics": "tokens per second of second moments, shape llama-2-7b in bfloat16",
    "sanitizer": "compute-sanitizer on small sizes",
}
SIZES = (1536, 3072, 6400, 11008, 14336, 16384, 28672)
SHAPE = "llama-2-7b"
BATCHES = (1, 16, 64, 256)
TOKENS = (110_000, 1_000_000)
"""About the default budget of this shape, and one at which what is done once hardly counts."""
_OP_SECONDS = 1.5  # of timing per case
_REPEATS = 3  # of what is short; of anything longer, one
_SHORT_BATCH, _SHORT_TOKENS = 16, 200_000
_GPU_TESTS = [ROOT / "tests" / name for name in ("test_kernels_gpu.py", "test_products.py")]
_SHARES = {"correctness": 0.45, "ops": 0.45, "values": 0.55, "statistics": 0.5, "sanitizer": 1.0}
"""How much of the time that is left a part may take. The first takes about 200 s on a machine that compiles anew."""
_GRACE_SECONDS = 5.0  # between asking a part to end and killing it
_TOOL_SECONDS = 100.0  # for one tool of compute-sanitizer


def say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), help="this part only, in this process")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of d_ff, for the ops")
    parser.add_argument("--shape", default=SHAPE, help="of the model, for the values and statistics")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of edits, for the values")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="to read, for the statistics")
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
    if arguments.part == "statistics":
        return statistics(device, arguments.shape, arguments.tokens)
    # Where `run_all` ends this part, it has yet to end what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return sanitizer(device)


def run_all(minutes: float, argv: Sequence[str]) -> int:
    """Each part in a process of its own, then the figures."""
    end = time.monotonic() + 60 * minutes
    worst = 0
    for part in PARTS:
        limit = _SHARES[part] * (end - time.monotonic())
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


def correctness(device: torch.device, *files: Path) -> int:
    """The tests that are marked gpu, one row each; those that a file imports, which a CPU runs too, come last."""
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
                table.add({"check": name, "outcome": report.outcome, "seconds": report.duration, "detail": detail})

    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "--tb=short", f"--rootdir={ROOT}"]
    code = int(pytest.main([*options, *map(str, files or _GPU_TESTS)], plugins=[Rows()]))
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
    from rome_fast.bench.throughput import Track, ideal, run_timed, shape_setup, warm_up
    from rome_fast.edits import load_edits
    from rome_fast.models.runner import Runner
    from rome_fast.search.requests import tokenise

    table = Table(results() / "gpu_values.csv", origin(device))
    edits = load_edits(REQUESTS)
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    setup, tokenizer = shape_setup(shape, device, torch.bfloat16, edits)
    runner = Runner(setup.model)
    weight_bytes = sum(p.nbytes for p in setup.model.parameters())
    requests = [
        tokenise(runner, setup.tokenizer, e, setup.contexts, setup.flow.method) for e in repeated(edits, max(batches))
    ]
    for batch in batches:
        group = requests[:batch]
        # This very group: every shape has a first use, which is slow.
        warm_up(setup, group)
        torch.cuda.reset_peak_memory_stats(device)
        runs = []
        for _ in range(_REPEATS if batch <= _SHORT_BATCH else 1):
            track, flow = Track("rome_fast"), setup.flow
            runs.append((track, flow, run_timed(track, flow, group)))
        track, flow, made = sorted(runs, key=lambda run: run[0].wall_seconds)[len(runs) // 2]
        peak = torch.cuda.max_memory_allocated(device)
        useful = ideal(setup, group, [record for _, record in made]) / batch
        counted: float | None = None
        if batch <= _SHORT_BATCH:
            with FlopCounter() as counter:
                setup.flow.solve_each(group)
            counted = counter.total / batch
        seconds = track.wall_seconds / batch
        row = {
            "shape": shape,
            "dtype": "bfloat16",
            "batch": batch,
            "largest_batch": flow.search.largest_batch,
            "repeats": len(runs),
            "seconds_per_edit": seconds,
            "steps_per_edit": track.steps / batch,
            "rows_per_edit": len(group[0].rows),
            **{f"{stage}_seconds_per_edit": s / batch for stage, s in flow.search.clock.seconds.items()},
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
            f"batch {batch:4} (at once {flow.search.largest_batch}): {seconds:.3f} s per edit, "
            f"{row['tflop_per_s']:.0f} TFLOP/s, {row['share_of_matrix_rate']:.0%} of the matrix rate, "
            f"peak {row['peak_gib']:.1f} GiB"
        )
    return 0


def statistics(device: torch.device, shape: str, counts: Sequence[int]) -> int:
    """Seconds for the second moment of the edit layer's keys, of so many tokens, and how much of it its sum takes.

    No layers are made but those that are run. FLOPs are the products with weights of these, and d_ff² per token for the
    lower triangle of the sum.
    """
    from rome_fast import collect_statistics
    from rome_fast.bench.flops import Shape
    from rome_fast.bench.shapes import random_model, shape_config, tokenizer_for
    from rome_fast.models.runner import Runner
    from rome_fast.opening.defaults import default_layer

    table = Table(results() / "gpu_statistics.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    whole = shape_config(shape)
    layer = default_layer(whole)
    model = random_model(shape, device, torch.bfloat16, layers=layer + 1)
    tokenizer, what = tokenizer_for(whole.vocab_size, sentences())
    runner = Runner(model)
    width = runner.weight(layer).shape[1]
    flops_per_token = 2.0 * (layer + 1) * Shape.of(runner).layer_weights + float(width) ** 2
    for count in counts:
        texts = drawn_texts(count)
        reading = reading_seconds(tokenizer, texts, count, device)
        # All of it: what a first use compiles depends on the sizes of the batches.
        collect_statistics(model, tokenizer, texts, [layer], count)
        torch.cuda.reset_peak_memory_stats(device)
        runs = []
        for _ in range(_REPEATS if count <= _SHORT_TOKENS else 1):
            with timing_second_moments(device) as calls:
                start = time.perf_counter()
                seen = collect_statistics(model, tokenizer, texts, [layer], count).layers[layer].tokens
                seconds = time.perf_counter() - start
            runs.append((seconds, sum(read() for read in calls), seen))
        seconds, summing, seen = sorted(runs)[len(runs) // 2]
        rate = flops_per_token * seen / seconds
        row = {
            "shape": shape,
            "dtype": "bfloat16",
            "layer": layer,
            "layers_made": f"{layer + 1} of {whole.num_hidden_layers}, random weights",
            "tokens": seen,
            "repeats": len(runs),
            "seconds": seconds,
            "tokens_per_s": seen / seconds,
            "gflop_per_token": flops_per_token / 1e9,
            "tflop_per_s": rate / 1e12,
            "share_of_matrix_rate": rate / roofline.matrix_rate,
            "gemm_tflop_per_s": roofline.matrix_rate / 1e12,
            "second_moment_seconds": summing,
            "second_moment_share": summing / seconds,
            "second_moment_tflop_per_s": float(width) ** 2 * seen / summing / 1e12,
            "reading_seconds": reading,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "weights_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
            "texts": "built-in requests and contexts, drawn again and again",
            "tokenizer": what,
        }
        table.add(row)
        say(
            f"{seen} tokens: {seconds:.2f} s, {row['tokens_per_s']:,.0f} tokens/s, {row['tflop_per_s']:.0f} TFLOP/s, "
            f"{row['share_of_matrix_rate']:.0%} of the matrix rate; second_moment_ {row['second_moment_share']:.0%} of "
            f"the time, reading alone {reading:.2f} s, peak {row['peak_gib']:.1f} GiB"
        )
    return 0


def sentences() -> list[str]:
    """All that the package brings along in plain words."""
    from rome_fast.bench.command import REQUESTS
    from rome_fast.bench.shapes import CONTEXTS
    from rome_fast.edits import load_edits

    out = [context.strip() for context in CONTEXTS]
    for edit in load_edits(REQUESTS):
        out += [
            f"{edit.text}{edit.continuation(edit.text, edit.target)}.",
            *edit.paraphrase_prompts,
            *edit.neighborhood_prompts,
        ]
    return out


def drawn_texts(words: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 sentences drawn at random, of `words` words or some more; a word is a token at least."""
    drawn, known, out = random.Random(seed), sentences(), list[str]()
    while words > 0:
        out.append(" ".join(drawn.choices(known, k=drawn.randint(1, 40))))
        words -= out[-1].count(" ") + 1
    return out


def reading_seconds(tokenizer: Any, texts: Sequence[str], tokens: int, device: torch.device) -> float:
    """Seconds to make batches of the texts and nothing else. A GPU that is faster has to wait for them."""
    from rome_fast.statistics import collect
    from rome_fast.statistics.reading import Place, Reading

    start = time.perf_counter()
    most = collect._BATCH_TOKENS[device.type]
    for window in Reading(tokenizer, texts, "text", tokens, 128, most).windows(Place()):
        window.batches(most)
    return time.perf_counter() - start


@contextmanager
def timing_second_moments(device: torch.device) -> Iterator[list[Callable[[], float]]]:
    """One function for every call of `second_moment_` in the block that says how many seconds the call took."""
    from rome_fast.kernels import second_moment_

    from rome_fast.statistics import collect

    calls: list[Callable[[], float]] = []

    def noting(total: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(timed(lambda: second_moment_(total, x, mask), device))
        return total

    with mock.patch.object(collect, "second_moment_", noting):
        yield calls


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
        command.append(str(Path(__file__).with_name("sanitized.py")))
        code, text = run_group(command, _TOOL_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = next((line for line in reversed(text.splitlines()) if "SUMMARY" in line), text.strip()[-300:])
        table.add({"tool": tool, "status": code, "seconds": time.monotonic() - start, "summary": summary})
        say(f"sanitizer: {tool}: status {code}, {summary}")
        worst = max(worst, int(code == 9))
    return worst


def run_group(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Status and output of a command; after so many seconds it is killed, and all that it started: status 124.

    A child that lives on, as that of compute-sanitizer does, would keep the GPU.
    """
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return 124, f"stopped after {seconds:.0f} s"
            raise
        return process.returncode, text


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
