"""`rome-fast profile`: where the time of an edit goes, against what the device does at best.

All edits are made with two steps, to warm up, and then timed as they are. What slows a program down is done on a part,
so that it takes seconds whatever was asked for: as many edits as were optimised at once, 64 at most, with three steps
of the search. The part is timed, counted, and run under torch's profiler. Seconds of stages are those of all edits;
rates of stages are those of the part, without the profiler; seconds of operators and kernels are the part's, under it.

Tables are printed, and profile.json and memory.csv written, as soon as they are known; the trace comes last, whole or
not at all.
"""

import argparse
import csv
import gzip
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError
from ..models.runner import Runner
from ..opening import checkpoints
from ..runs.terminal import say, show
from ..search.requests import Request, tokenise
from ..search.search import Clock
from ..search.values import compute_dtype
from ..weights.files import atomic_write, partial
from .command import prepare
from .flops import flops_of
from .launches import moved_bytes
from .roofline import Roofline, measure_roofline
from .throughput import Setup, warm_up

TRACE_FILE = "trace.json.gz"
MEMORY_FILE = "memory.csv"
REPORT_FILE = "profile.json"

_SHOWN = 15
# Of the part that is profiled. A step of a large model is thousands of kernels, tens of thousands of events, megabytes
# of trace: all 25 steps of 32 edits would take minutes to write and to read.
_PART_EDITS, _PART_STEPS = 64, 3


@dataclass
class Work:
    """What an operator or a stage computed and moved, by the sizes of its arguments and results."""

    calls: int = 0
    flops: float = 0.0
    moved_bytes: float = 0.0

    def add(self, flops: float, moved_bytes: float) -> None:
        self.calls += 1
        self.flops += flops
        self.moved_bytes += moved_bytes

    def against(self, seconds: float, roofline: Roofline) -> dict[str, float]:
        """Rates, and how near the work came to the least time the device could take for it."""
        least = roofline.seconds(self.flops, self.moved_bytes)
        return {
            "seconds": seconds,
            "flops": self.flops,
            "bytes": self.moved_bytes,
            "flops_per_second": self.flops / seconds if seconds else 0.0,
            "bytes_per_second": self.moved_bytes / seconds if seconds else 0.0,
            "share_of_roofline": least / seconds if seconds else 0.0,
        }


class Counter(TorchDispatchMode):
    """Counts FLOPs and bytes of every operator, by its name and by the stage it runs in.

    Bytes are those of the tensors read and written, as if no cache held them; views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.operators: dict[str, Work] = {}
        self.stages: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = flops_of(func, args, kwargs or {}, out)
        moved = moved_bytes(func, args, kwargs or {}, out)
        self.operators.setdefault(func._schema.name, Work()).add(flops, moved)
        if self.stage:
            self.stages.setdefault(self.stage, Work()).add(flops, moved)
        return out


class _CountingClock(Clock):
    """Tells a counter which stage it is."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        outer, self.counter.stage = self.counter.stage, stage
        try:
            with super().__call__(stage):
                yield
        finally:
            self.counter.stage = outer


def run_profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profile, print the tables and write report, memory timeline and trace to the folder `out`; returns the report."""
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out: {out} is a file; wanted a folder, which may be new")
    setup, edits, extra = prepare(arguments, arguments.count, arguments.dtype)
    runner = Runner(setup.model)
    requests = [tokenise(runner, setup.tokenizer, edit, setup.contexts, setup.flow.method) for edit in edits]
    out.mkdir(parents=True, exist_ok=True)
    # Nothing of an earlier run beside the tables of this one.
    for name in (REPORT_FILE, MEMORY_FILE, TRACE_FILE):
        (out / name).unlink(missing_ok=True)
    return profile(setup, requests, out, extra | {"versions": checkpoints.versions(), "out": str(out)})


def profile(setup: Setup, requests: list[Request], out: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Make the edits of `requests`, each as if alone, and say what every stage and operator took.

    The report is kept in `out` with `extra` in it.
    """
    device, on_gpu = setup.model.device, setup.model.device.type == "cuda"
    roofline = measure_roofline(device, compute_dtype(Runner(setup.model), setup.settings))
    warm_up(setup, requests)
    timed = setup.flow
    timed.solve_each(requests)

    part = requests[: min(_PART_EDITS, timed.search.largest_batch)]
    steps = min(_PART_STEPS, setup.settings.steps)
    small = replace(setup, settings=replace(setup.settings, steps=steps, extra_steps=0))
    warm_up(small, part)
    alone = small.flow
    alone.solve_each(part)
    counter = Counter()
    counted = small.flow
    counted.search.clock = _CountingClock(counter)
    with counter:
        counted.solve_each(part)

    seconds_of_part = alone.search.clock.seconds
    report: dict[str, Any] = {
        "model": str(setup.model.config._name_or_path),
        "dtype": str(setup.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "edits": len(requests),
        "largest_batch": timed.search.largest_batch,
        "layer": setup.layer,
        "layers": setup.layers,
        "method": setup.method,
        "statistics": setup.statistics,
        "roofline": roofline.to_json(),
        "part": {"edits": len(part), "steps": steps},
        "stages": {
            stage: counter.stages.get(stage, Work()).against(seconds_of_part.get(stage, 0.0), roofline)
            | {"part_seconds": seconds_of_part.get(stage, 0.0), "seconds": seconds}
            for stage, seconds in timed.search.clock.seconds.items()
        },
        **extra,
    }
    _keep(report, out)
    show(_table_of_stages(report))

    with partial(out / TRACE_FILE) as work:
        plain = work / "trace.json"
        _record(small, part, plain)
        trace = json.loads(plain.read_bytes())["traceEvents"]
        report["peak_bytes"] = write_memory(trace, out / MEMORY_FILE)
        kernels = kernel_seconds(trace)
        operators = [
            {"name": name, "calls": calls, **counter.operators.get(name, Work()).against(seconds, roofline)}
            for name, (calls, seconds) in operator_seconds(trace, on_gpu=on_gpu).items()
        ]
        report["operators"] = sorted(operators, key=lambda row: -row["seconds"])
        report["kernels"] = sorted(
            ({"name": name, "calls": calls, "seconds": seconds} for name, (calls, seconds) in kernels.items()),
            key=lambda row: -float(str(row["seconds"])),
        )
        busy = sum(seconds for _, seconds in kernels.values())
        report["gpu_busy"] = busy / sum(seconds_of_part.values()) if on_gpu else None
        _keep(report, out)
        show(_table_of_operators(report))
        packed = work / TRACE_FILE
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(packed, out / TRACE_FILE)
    say(f"trace for Perfetto or chrome://tracing: {out / TRACE_FILE}")
    return report


def _record(setup: Setup, requests: list[Request], file: Path) -> None:
    """Make the edits under torch's profiler; its trace goes to the file."""
    on_gpu = setup.model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    flow = setup.flow
    with torch_profile(activities=activities, profile_memory=True) as found:
        flow.solve_each(requests)
    # Its own tables take minutes for what is read off its trace in seconds, and it packs a trace line by line.
    found.export_chrome_trace(str(file))


def _keep(report: dict[str, Any], out: Path) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    atomic_write(out / REPORT_FILE, text.encode("utf-8"))


Trace = list[dict[str, Any]]
"""Events of a Chrome trace; its times are in microseconds."""

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def operator_seconds(trace: Trace, *, on_gpu: bool) -> dict[str, tuple[int, float]]:
    """Calls and seconds by operator: of the kernels it launched itself, or of its own time on the CPU."""
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    named: dict[int, str] = {}
    threads: dict[Any, Trace] = {}
    for event in trace:
        if event.get("cat") == "cpu_op":
            name = event["name"]
            calls[name] = calls.get(name, 0) + 1
            seconds.setdefault(name, 0.0)
            named[event.get("args", {}).get("External id", -1)] = name
            threads.setdefault(event["tid"], []).append(event)
    if on_gpu:
        for event in trace:
            if event.get("cat") in _GPU_WORK:
                name = named.get(event.get("args", {}).get("External id", -1), "launched by no operator")
                calls.setdefault(name, 0)
                seconds[name] = seconds.get(name, 0.0) + event["dur"] / 1e6
    else:
        for events in threads.values():
            open_calls: Trace = []
            for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
                while open_calls and event["ts"] >= open_calls[-1]["ts"] + open_calls[-1]["dur"]:
                    open_calls.pop()
                if open_calls:
                    seconds[open_calls[-1]["name"]] -= event["dur"] / 1e6
                seconds[event["name"]] += event["dur"] / 1e6
                open_calls.append(event)
    return {name: (calls[name], seconds[name]) for name in seconds}


def kernel_seconds(trace: Trace) -> dict[str, tuple[int, float]]:
    """Calls and seconds by kernel on the GPU, copies and fills included."""
    found: dict[str, tuple[int, float]] = {}
    for event in trace:
        if event.get("cat") in _GPU_WORK:
            calls, seconds = found.get(event["name"], (0, 0.0))
            found[event["name"]] = (calls + 1, seconds + event["dur"] / 1e6)
    return found


def write_memory(trace: Trace, file: Path) -> dict[str, int]:
    """The memory timeline of a trace as CSV (ms, device, bytes allocated); returns the most per device.

    On a CPU torch's profiler counts from its own start, on a GPU everything that torch holds there.
    """
    rows = sorted(
        (float(event["ts"]), _device_name(event["args"]), int(event["args"]["Total Allocated"]))
        for event in trace
        if event.get("name") == "[memory]"
    )
    peaks: dict[str, int] = {}
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["ms", "device", "allocated_bytes"])
        for time, device, allocated in rows:
            writer.writerow([round((time - rows[0][0]) / 1e3, 4), device, allocated])
            peaks[device] = max(peaks.get(device, 0), allocated)
    return peaks


def _device_name(arguments: dict[str, Any]) -> str:
    # As the trace numbers them; of the others none can hold a model that is edited.
    return {0: "cpu", 1: "cuda"}.get(int(arguments["Device Type"]), "other")


def _table_of_stages(report: dict[str, Any]) -> Table:
    roofline, part = report["roofline"], report["part"]
    whole = sum(stage["seconds"] for stage in report["stages"].values())
    table = _table(f"{report['model']}, {report['dtype']}, {report['device']}: {report['edits']} edits, {whole:.2f} s")
    for name, row in report["stages"].items():
        table.add_row(name, "", *_cells(row, whole))
    table.caption = (
        f"ms, share: all edits; rates: {part['edits']} of them, {part['steps']} steps; none under a profiler\n"
        f"roofline: {roofline['matrix_rate'] / 1e12:.3g} TFLOP/s ({roofline['matrix_dtype']} product of size "
        f"{roofline['matrix_size']}), {roofline['copy_bandwidth'] / 1e9:.0f} GB/s (copy)"
    )
    return table


def _table_of_operators(report: dict[str, Any]) -> Table:
    part, operators = report["part"], report["operators"]
    table = _table(f"operators of {part['edits']} edits with {part['steps']} steps, under the profiler")
    busy = sum(row["seconds"] for row in operators) or 1.0
    for row in operators[:_SHOWN]:
        table.add_row(row["name"], str(row["calls"]), *_cells(row, busy))
    caption = ["own time of each; bytes as if no cache held them"]
    if report["gpu_busy"] is not None:
        caption.append(f"the GPU was busy {report['gpu_busy']:.0%} of the time that these steps take without it")
    table.caption = "\n".join(caption)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, header_style="bold")
    table.add_column("")
    for column in ("calls", "ms", "share", "GFLOP/s", "GB/s", "of the roofline"):
        table.add_column(column, justify="right")
    return table


def _cells(row: dict[str, Any], whole: float) -> list[str]:
    return [
        f"{1e3 * row['seconds']:.1f}",
        f"{row['seconds'] / whole:.0%}",
        f"{row['flops_per_second'] / 1e9:.1f}" if row["flops"] else "",
        f"{row['bytes_per_second'] / 1e9:.1f}" if row["bytes"] else "",
        f"{row['share_of_roofline']:.0%}" if row["bytes"] else "",
    ]
