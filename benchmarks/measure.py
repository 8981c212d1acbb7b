"""Timing side by side, rows of CSV that survive an interruption, and what a figure has to say of its origin."""

import csv
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FLUSHED_BYTES = 1 << 30
"""Written before each run on a GPU: several times its L2 cache, and long enough to hide the launch of what follows."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of several runs of one thing."""

    median: float
    low: float  # 20th percentile
    high: float  # 80th percentile
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        ordered = sorted(1e3 * s for s in seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def timed(run: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Run it; the function returned says how many seconds it took, and only that waits for a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return lambda: seconds
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    second.record()

    def read() -> float:
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    return read


def side_by_side(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float,
    least: int = 5,
    most: int = 30,
) -> dict[str, Times]:
    """Time all of `runs` in turns, `least` to `most` rounds within about `budget` seconds.

    On a GPU: its own time by events, from a cold L2 cache. On a CPU: wall time, caches as the others left them.
    """
    flushed = torch.empty(FLUSHED_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def once(run: Callable[[], object]) -> Callable[[], float]:
        flushed.zero_()
        return timed(run, device)

    for run in runs.values():
        once(run)()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget:
            break
        readers = {name: once(run) for name, run in runs.items()}
        for name, read in readers.items():
            seconds[name].append(read())
    return {name: Times.of(values) for name, values in seconds.items()}


def forget_peak(device: torch.device) -> None:
    """From now on `peak_bytes` means what comes; on a CPU it cannot be told to."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The most that torch held on a GPU, or this process in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def yes(holds: object) -> str:
    """What the column `correct` says."""
    return "yes" if holds else "no"


class Table:
    """A CSV file that is replaced when the first row comes, and complete after every row, whenever it is cut short."""

    def __init__(self, file: Path, origin: Mapping[str, Any], kept: Sequence[Mapping[str, Any]] = ()) -> None:
        """`kept` are rows that come before those added."""
        self.file, self.origin = file, dict(origin)
        self.rows: list[Mapping[str, Any]] = list(kept)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append({name: _short(value) for name, value in {**row, **self.origin}.items()})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".{self.file.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
            lines.flush()
            os.fsync(lines.fileno())
        partial.replace(self.file)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def results() -> Path:
    """Where tables and plots go: $OUT, or benchmarks/results."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")


def origin(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and day, for every row."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
    }
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return {**found, "commit": commit(), "date": datetime.now(UTC).date().isoformat()}


def commit() -> str:
    """The short hash of HEAD, with a plus sign where tracked files differ from it; outside a repository $COMMIT."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return os.environ.get("COMMIT", "")
    return head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it does not exist."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
