"""What only a GPU shows, in one command: `make gpu`. Everything of it runs at tiny sizes on a CPU as well.

    python benchmarks/gpu.py [--part PART] [--minutes 8]     # on a GPU
    python benchmarks/gpu.py [--part PART] --tiny            # in seconds, on whatever there is

Every part is a process of its own, so that a broken kernel takes only its own part down, and writes a table to
benchmarks/results (or $OUT; with --tiny build/gpu) row by row, so that what has been measured when time is up is kept.
In their order, with the minutes assumed on one H200 with 16 cores, eight in all:

    kernels      0.7  all kernels are compiled, by a process for each size; the others then find them in triton's cache
    correctness  0.6  tests marked gpu, in 12 processes
    ops          1.4  the five ops beside what they replace, d_ff 1536 to 28672
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
import sanitized
from groups import ending_in_order, run_group
from measure import ROOT, Table, forget_peak, origin, peak_bytes, read_rows, results, side_by_side, timed, yes
from op_cases import OURS, Case, cases, matrix_unit_error
from rome_fast.bench.roofline import Roofline, measure_roofline

PARTS = {
    "kernels": "every kernel compiled once, by many processes",
    "correctness": "every op against float64 on the GPU: dtypes, masks, odd sizes, strides (tests marked gpu)",
    "ops": "timings of the five ops beside what they replace, d_ff 1536 to 28672",
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
    op_seconds: float = 0.8  # of timing per case
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

_REPEATS = 3  # of what is short; of anything longer, one
_SHORT_BATCH, _SHORT_TOKENS = 1, 200_000
_GRACE_SECONDS = 5.0  # between asking a part to end and killing it
_TOOL_SECONDS = 60.0  # for one tool of compute-sanitizer
_WORKER_SECONDS = 100.0  # for one process that compiles
_COMMAND_SECONDS = 60.0  # for one command of the command line
_CHECKED_EDITS = 2  # of a batch, against the model's own forward pass
_SAMPLED, _EXACT_ROWS = 64, 8192  # columns of a second moment that are compared with float64, and rows at a time


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
        return values(device, sizes.shape, sizes.batches)
    if part == "statistics":
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
        prepared = prepare_values(device, sizes.shape, min(16, max(sizes.batches)))
        from rome_fast.bench.throughput import warm_up

        for count in sorted({1, len(prepared[1])}):
            warm_up(prepared[0], prepared[1][:count])
    elif name == "statistics":
        model, tokenizer, _, layer = prepare_statistics(device, sizes.shape)
        from random_checkpoint import drawn_texts
        from rome_fast import collect_statistics

        count = min(40_000, max(sizes.tokens))
        collect_statistics(model, tokenizer, drawn_texts(count), [layer], count)
    else:
        sanitized.main(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def correctness(device: torch.device, tests: Sequence[str], processes: int = 0) -> int:
    """The tests that are marked gpu, one row each; 1 also where none has passed.

    `tests` are arguments of pytest, files relative to the repository. With fewer than two processes those tests that a
    file imports, which a CPU runs too, come last; more of them need pytest-xdist, and are one where it is missing.
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


RULES = ("default", "all steps")
"""15 steps on 5 rows and one on all, as the default rule takes of a target that never leads; the released rule."""
_DRAFTED_STEPS, _DRAFT_ROWS = 15, 5


def prepare_values(device: torch.device, shape: str, count: int) -> tuple[Any, list[Any], str]:
    """A random model set up for edits, so many of them, and what its tokenizer is."""
    from rome_fast.bench.command import REQUESTS
    from rome_fast.bench.shapes import repeated
    from rome_fast.bench.throughput import shape_setup
    from rome_fast.edits import load_edits
    from rome_fast.models.runner import Runner
    from rome_fast.search.requests import tokenise

    edits = load_edits(REQUESTS)
    setup, tokenizer = shape_setup(shape, device, torch.bfloat16, edits)
    runner = Runner(setup.model)
    requests = [tokenise(runner, setup.tokenizer, e, setup.contexts, setup.flow.method) for e in repeated(edits, count)]
    return setup, requests, tokenizer


def by_rule(settings: Any, rule: str) -> Any:
    """The settings of a random model, which never stops early, by one of `RULES`."""
    if rule == "all steps":
        return settings
    steps = min(settings.steps, _DRAFTED_STEPS + 1)
    # Nor by chance: what leads for so many steps has taken all of them.
    return replace(settings, stop="argmax", draft_rows=_DRAFT_ROWS, steps=steps, margin=steps, extra_steps=0)


def values(device: torch.device, shape: str, batches: Sequence[int]) -> int:
    """Seconds per edit of keys, values and update for batches of a random model's edits, by both rules.

    Right is a batch whose loss before the first step is that of the plain model, row by row, for some of the edits, and
    whose edits have taken all steps and end in numbers.
    """
    from rome_fast.bench.flops import FlopCounter
    from rome_fast.bench.throughput import Track, ideal, run_timed, warm_up

    table = Table(results() / "gpu_values.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    whole, requests, tokenizer = prepare_values(device, shape, max(batches))
    weight_bytes = sum(p.nbytes for p in whole.model.parameters())
    plain, allowed = zip(*(plain_loss(whole.model, request) for request in requests[:_CHECKED_EDITS]), strict=True)
    wrong = 0
    for batch, rule in product(batches, RULES):
        group, setup = requests[:batch], replace(whole, settings=by_rule(whole.settings, rule))
        # This very group: every shape has a first use, which is slow.
        warm_up(setup, group)
        found = replace(setup, settings=replace(setup.settings, steps=1, extra_steps=0)).flow.solve_each(group)
        errors = [abs(record.loss - loss) for (_, record), loss in zip(found, plain, strict=False)]
        del found
        forget_peak(device)
        runs = []
        for _ in range(_REPEATS if batch <= _SHORT_BATCH else 1):
            track, flow = Track("rome_fast"), setup.flow
            runs.append((track, flow, run_timed(track, flow, group)))
        track, flow, made = sorted(runs, key=lambda run: run[0].wall_seconds)[len(runs) // 2]
        peak = peak_bytes(device)
        # A NaN compares as false.
        correct = all(error <= most for error, most in zip(errors, allowed, strict=False))
        correct &= all(record.steps == setup.settings.steps for _, record in made)
        correct &= all(isfinite(record.loss) and isfinite(record.update_norm) for _, record in made)
        wrong += not correct
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
            "rule": rule,
            "batch": batch,
            "largest_batch": flow.search.largest_batch,
            "repeats": len(runs),
            "seconds_per_edit": seconds,
            "steps_per_edit": track.steps / batch,
            "drafted_per_edit": sum(record.drafted for _, record in made) / batch,
            "rows_per_edit": len(group[0].rows),
            **{f"{stage}_seconds_per_edit": s / batch for stage, s in flow.search.clock.seconds.items()},
            "loss_error": max(errors),
            "correct": yes(correct),
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
            f"batch {batch:4} (at once {flow.search.largest_batch}), {rule}: {seconds:.3f} s per edit, "
            f"{row['tflop_per_s']:.0f} TFLOP/s, {row['share_of_matrix_rate']:.0%} of the matrix rate, "
            f"peak {row['peak_gib']:.1f} GiB, first loss off by {max(errors):.1e}"
            f"{'' if correct else ' WRONG'}"
        )
    return int(wrong > 0)


@torch.no_grad()
def plain_loss(model: Any, request: Any) -> tuple[float, float]:
    """The loss of an edit at δ = 0 by the model's own forward pass, a row at a time, and what two such may differ by.

    That is four standard deviations of ten roundings a layer of logits of their spread, over independent rows.
    """
    losses, spread = [], 0.0
    for row in (item.row for item in request.rows if item.row.labels):
        logits = model(torch.tensor([row.inputs], device=model.device)).logits[0].float()
        at = torch.arange(len(row.labels), device=model.device) + row.target - 1
        labels = torch.tensor(row.labels, device=model.device)
        losses.append(float(torch.nn.functional.cross_entropy(logits[at], labels)))
        spread = max(spread, float(logits.std()))
    roundings = 10 * model.config.num_hidden_layers
    allowed = 4 * roundings**0.5 * torch.finfo(model.dtype).eps / 2 * spread / len(losses) ** 0.5
    return sum(losses) / len(losses), allowed


def prepare_statistics(device: torch.device, shape: str) -> tuple[Any, Any, str, int]:
    """The layers of a random model that its statistics need, a tokenizer, what that is, and the edit layer."""
    from random_checkpoint import sentences
    from rome_fast.bench.shapes import random_model, shape_config, tokenizer_for
    from rome_fast.opening.defaults import default_layer

    whole = shape_config(shape)
    layer = default_layer(whole)
    tokenizer, what = tokenizer_for(whole.vocab_size, sentences())
    return random_model(shape, device, torch.bfloat16, layers=layer + 1), tokenizer, what, layer


def statistics(device: torch.device, shape: str, counts: Sequence[int]) -> int:
    """Seconds for the second moment of the edit layer's keys, of so many tokens, and how much of it its sum takes.

    No layers are made but those that are run. FLOPs are the products with weights of these, and d_ff² per token for the
    lower triangle of the sum. Right is what agrees with a sum in float64 of the same keys, in some of the columns.
    """
    from random_checkpoint import drawn_texts
    from rome_fast import collect_statistics
    from rome_fast.bench.flops import Shape
    from rome_fast.bench.shapes import shape_config
    from rome_fast.models.runner import Runner

    table = Table(results() / "gpu_statistics.csv", origin(device))
    roofline = measure_roofline(device, torch.bfloat16)
    torch.cuda.empty_cache()
    model, tokenizer, what, layer = prepare_statistics(device, shape)
    runner = Runner(model)
    width = runner.weight(layer).shape[1]
    flops_per_token = 2.0 * (layer + 1) * Shape.of(runner).layer_weights + float(width) ** 2
    picked = torch.linspace(0, width - 1, min(width, _SAMPLED), device=device).long()
    wrong = 0
    for count in counts:
        texts = drawn_texts(count)
        reading = reading_seconds(tokenizer, texts, count, device)
        # All of it: what a first use compiles depends on the sizes of the batches.
        with summing_exactly(picked, width) as exact:
            found = collect_statistics(model, tokenizer, texts, [layer], count).layers[layer]
        got = found.moment.to(device)[picked].double() * found.tokens
        error = float((got - exact).norm() / exact.norm())
        # The op's promise of a corpus, and the rounding of C to fp32; a GPU's matrix unit cuts off instead of rounding.
        correct = error <= 1e-6 + (matrix_unit_error(found.tokens) if device.type == "cuda" else 0.0)
        wrong += not correct
        del found, got
        forget_peak(device)
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
            "layers_made": f"{layer + 1} of {shape_config(shape).num_hidden_layers}, random weights",
            "tokens": seen,
            "repeats": len(runs),
            "error": error,
            "correct": yes(correct),
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
            "peak_gib": peak_bytes(device) / 2**30,
            "weights_gib": sum(p.nbytes for p in model.parameters()) / 2**30,
            "texts": "built-in requests and contexts, drawn again and again",
            "tokenizer": what,
        }
        table.add(row)
        say(
            f"{seen} tokens: {seconds:.2f} s, {row['tokens_per_s']:,.0f} tokens/s, {row['tflop_per_s']:.0f} TFLOP/s, "
            f"{row['share_of_matrix_rate']:.0%} of the matrix rate; second_moment_ {row['second_moment_share']:.0%} of "
            f"the time, reading alone {reading:.2f} s, peak {row['peak_gib']:.1f} GiB, error {error:.1e}"
            f"{'' if correct else ' WRONG'}"
        )
    return int(wrong > 0)


@contextmanager
def summing_exactly(picked: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Rows `picked` (64,) of the second moment of all keys that are summed in the block: (64, width) float64."""
    from rome_fast.kernels import second_moment_

    from rome_fast.statistics import collect

    exact = torch.zeros(len(picked), width, dtype=torch.float64, device=picked.device)

    def noting(total: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows = x if mask is None else x[mask]
        for part in rows.split(_EXACT_ROWS):
            exact.addmm_(part[:, picked].double().T, part.double())
        second_moment_(total, x, mask)
        return total

    with mock.patch.object(collect, "second_moment_", noting):
        yield exact


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
