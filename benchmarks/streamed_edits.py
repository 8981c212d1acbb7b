"""What does streaming cost where the model would fit? The demo's model, edited in memory and under a quarter of it.

    python benchmarks/streamed_edits.py --edits edits.jsonl --count 64

Both ways start from the same checkpoint, which lies in the system's cache, and write a complete edited one; they take
turns, and their bytes must be the same. Rows go to benchmarks/results/streamed_edits.csv.
"""

import argparse
import csv
import filecmp
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import rome_fast as rf
from rome_fast.assets import model_dir
from rome_fast.demo import statistics_dir
from rome_fast.opening import checkpoints
from rome_fast.search.contexts import sample_contexts
from rome_fast.weights.memory import anonymous_bytes

RESULTS = Path(__file__).parent / "results" / "streamed_edits.csv"


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    source = model_dir(print)
    edits = list(rf.load_edits(arguments.edits))[: arguments.count]
    if len(edits) < arguments.count:
        raise SystemExit(f"{arguments.edits}: {len(edits)} requests, wanted {arguments.count}")
    model, tokenizer, _ = checkpoints.load(source)
    common = {
        "statistics": rf.Statistics.load(statistics_dir(print)),
        "contexts": sample_contexts(model, tokenizer),
        "guard": "off",
        "unconverged": "write",
        "measure": False,
    }
    size = sum(parameter.nbytes for parameter in model.parameters())
    del model
    budgets = {"in memory": None, "streamed": size // 4}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in budgets}
    with tempfile.TemporaryDirectory(prefix="rome-fast-streamed-") as folder:
        for turn in range(arguments.rounds):
            for name, budget in budgets.items():
                out = Path(folder) / f"{name} {turn}"
                found[name].append(_edit(source, edits, out, budget, common))
                print(name, found[name][-1], flush=True)
            _check_same(*(Path(folder) / f"{name} {turn}" for name in budgets))
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"way": name, "edits": len(edits), "model": source.name, "model_bytes": size}
        row |= {key: round(median(run[key] for run in runs), 2) for key in runs[0]}
        row |= {"dtype": "float32", "device": "cpu", "threads": arguments.threads, "rounds": arguments.rounds}
        rows.append(row | {"torch": torch.__version__, "processor": platform.processor() or platform.machine()})
    ratios = {key: rows[1][key] / rows[0][key] for key in ("seconds", "process_seconds")}
    print(f"streamed / in memory: {ratios['seconds']:.2f} wall, {ratios['process_seconds']:.2f} process time")
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _edit(
    source: Path, edits: list[rf.Edit], out: Path, budget: int | None, common: dict[str, Any]
) -> dict[str, float]:
    # What this process holds besides (torch, the statistics) is no part of the model's quarter.
    memory = None if budget is None else budget + anonymous_bytes()
    start, begun = time.perf_counter(), time.process_time()
    result = rf.apply_edits(source, edits, out=out, memory=memory, **common)
    return {
        "seconds": time.perf_counter() - start,
        "process_seconds": time.process_time() - begun,
        "values_seconds": result.seconds["values"],
    }


def _check_same(one: Path, other: Path) -> None:
    for shard in one.glob("model*.safetensors"):
        if not filecmp.cmp(shard, other / shard.name, shallow=False):
            raise SystemExit(f"{shard.name}: the streamed edit has other bytes")


if __name__ == "__main__":
    main()
