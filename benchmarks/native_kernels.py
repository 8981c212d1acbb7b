"""How much faster than torch are the native kernels on this CPU? Checked against float64, timed, written as CSV.

    python benchmarks/native_kernels.py [--op second_moment_] [--threads 1 2] [--quick]

Every provider computes the same thing on the same random numbers, one after another in every round. Nothing is timed
before the results of this very process have been held against float64: no more than twice the error of the reference.
A row of benchmarks/results/native_kernels.csv is one provider on one problem, and replaces an older one of the same.
"""

import argparse
import csv
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rome_fast.kernels import native, reference
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "native_kernels.csv"
KEY = ("op", "provider", "shape", "dtype", "threads", "cpu")
ROUNDS = 5

Providers = dict[str, Callable[[], object]]
Row = dict[str, object]

# (tokens, d_ff, dtype, share of unmasked rows)
MOMENTS = [
    (4096, 256, torch.float32, 1.0),
    (4096, 1536, torch.float32, 1.0),
    (4096, 1536, torch.bfloat16, 0.9),
    (2048, 6400, torch.float32, 1.0),
    (2048, 6400, torch.bfloat16, 0.9),
]
# (d, d_ff, dtype, rank)
UPDATES = [
    (576, 1536, torch.bfloat16, 1),
    (4096, 11008, torch.bfloat16, 1),
    (4096, 11008, torch.bfloat16, 8),
    (4096, 11008, torch.bfloat16, 128),
    (4096, 11008, torch.float16, 1),
]
BLOCK = 16  # rows that "torch in blocks" takes at a time: of 16, 64 and all the quickest


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and process time of one call."""
    process, wall = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - wall, time.process_time() - process


def measure(op: str, shape: str, dtype: torch.dtype, providers: Providers, work: float, unit: str) -> list[Row]:
    """Rows of all providers, native first; `work` in 1e9 units of work per call."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in providers}
    for turn in range(ROUNDS + 1):
        for name, call in providers.items():
            taken = seconds(call)
            if turn:  # the first one warms up
                times[name].append(taken)
    wall = {name: [w for w, _ in taken] for name, taken in times.items()}
    process = {name: statistics.median(p for _, p in taken) for name, taken in times.items()}
    rows = []
    for name in providers:
        low, *_, high = statistics.quantiles(wall[name], n=5, method="inclusive")
        median = statistics.median(wall[name])
        row = {
            "op": op,
            "provider": name,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "median_ms": f"{median * 1e3:.2f}",
            "p20_ms": f"{low * 1e3:.2f}",
            "p80_ms": f"{high * 1e3:.2f}",
            "process_ms": f"{process[name] * 1e3:.2f}",
            "rate": f"{work / median:.1f}",
            "unit": unit,
            "native_is_faster_by": f"{median / statistics.median(wall['native']):.2f}",
            "in_process_time": f"{process[name] / process['native']:.2f}",
        }
        print("  ".join(str(value) for value in row.values()), flush=True)
        rows.append(row)
    return rows


def check(what: str, got: Tensor, plain: Tensor, wanted: Tensor) -> None:
    error, allowed = float((got.double() - wanted).norm()), 2 * float((plain.double() - wanted).norm())
    if not error <= allowed:
        raise SystemExit(f"{what}: error {error:.3g}, wanted at most {allowed:.3g}, twice the reference's")


def second_moment(n: int, d: int, dtype: torch.dtype, kept: float) -> list[Row]:
    x = torch.randn(n, d).to(dtype)
    mask = torch.rand(n) < kept if kept < 1 else None
    total, plain = (torch.zeros(d, d, dtype=torch.float64) for _ in range(2))
    native.second_moment_native_(total, x, mask)
    reference.second_moment_ref_(plain, x, mask)
    columns = torch.randperm(d)[:64].sort().values
    sample = (x if mask is None else x[mask])[:, columns].double()
    shape = f"{n} x {d}" + (f", {kept:.0%} unmasked" if mask is not None else "")
    part = columns[:, None], columns
    check(f"second_moment_ {shape}", total[part].tril(), plain[part].tril(), (sample.T @ sample).tril())
    rows = (x if mask is None else x[mask]).float()
    product = torch.empty(d, d)
    providers: Providers = {
        "native": lambda: native.second_moment_native_(total, x, mask),
        "torch": lambda: reference.second_moment_ref_(plain, x, mask),
        "its fp32 GEMM alone": lambda: torch.mm(rows.T, rows, out=product),
    }
    # Half of a GEMM, which is what there is to do.
    return measure("second_moment_", shape, dtype, providers, len(rows) * d * (d + 1) / 1e9, "useful GFLOP/s")


def in_blocks(weight: Tensor, left: Tensor, right: Tensor) -> None:
    for start in range(0, len(weight), BLOCK):
        reference.rank_update_ref_(weight[start : start + BLOCK], left[start : start + BLOCK], right)


def rank_update(d: int, width: int, dtype: torch.dtype, rank: int) -> list[Row]:
    weight = torch.randn(d, width).to(dtype)
    # Small, so that many updates in a row leave the weight what it is.
    left, right = torch.randn(d, rank) / 100, torch.randn(rank, width) / 100
    rough = left.to(dtype), right.to(dtype)
    shape = f"{d} x {width}, rank {rank}"
    wanted = weight[:64].double() + left[:64].double() @ right.double()
    got = native.rank_update_native_(weight.clone(), left, right)[:64]
    check(f"rank_update_ {shape}", got, reference.rank_update_ref_(weight[:64].clone(), left[:64], right), wanted)
    providers: Providers = {
        "native": lambda: native.rank_update_native_(weight, left, right),
        "torch": lambda: reference.rank_update_ref_(weight, left, right),
        f"torch, {BLOCK} rows at a time": lambda: in_blocks(weight, left, right),
        "addmm_ with rounded factors": lambda: weight.addmm_(*rough),
    }
    if rank > 1:
        # Several seconds a call: torch has no fast 16-bit product on this kind of CPU.
        del providers["addmm_ with rounded factors"]
    return measure("rank_update_", shape, dtype, providers, 2 * weight.nbytes / 1e9, "GB/s")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name', '')} family {found.get('cpu family', '')} model {found.get('model', '')}"


def conditions() -> Row:
    def git(*command: str) -> str:
        return subprocess.run(("git", *command), cwd=RESULTS.parents[1], capture_output=True, text=True).stdout.strip()

    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "instructions": native.instruction_set(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
    }


def save(rows: list[Row]) -> None:
    old: list[dict[str, str]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as lines:
            old = list(csv.DictReader(lines))
    new = {tuple(str(row[name]) for name in KEY) for row in rows}
    kept = [row for row in old if tuple(row[name] for name in KEY) not in new]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("second_moment_", "rank_update_"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="the smaller problems only, and nothing is written")
    arguments = parser.parse_args()
    if obstacle := native.obstacle():
        raise SystemExit(obstacle)
    torch.manual_seed(0)
    print(conditions(), flush=True)
    moments = [] if arguments.op == "rank_update_" else MOMENTS[: 2 if arguments.quick else None]
    updates = [] if arguments.op == "second_moment_" else UPDATES[: 1 if arguments.quick else None]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for rows in itertools.chain(itertools.starmap(second_moment, moments), itertools.starmap(rank_update, updates)):
            if not arguments.quick:
                save([row | conditions() for row in rows])


if __name__ == "__main__":
    main()
