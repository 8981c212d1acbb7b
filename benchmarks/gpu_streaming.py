"""The part `streaming` of `make gpu`: a checkpoint edited under a budget of memory, against the same in memory.

Bytes must be the same, in deterministic mode, since a GPU otherwise adds gradients up in an order of its own; edits are
made one after the other, so that both ways optimise the same batches. What is read a second is set against two rates
of the same run: of copies from pinned memory to the device, and of reads from the system's page cache, where the
checkpoint lies, having just been written.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from measure import Table, forget_peak, origin, peak_bytes, results, yes
from random_checkpoint import requests, same_bytes, save_checkpoint
from rome_fast import EditResult, apply_edits
from rome_fast.bench.roofline import median_seconds
from rome_fast.bench.shapes import CONTEXTS
from rome_fast.weights import parse_bytes

_CHUNK_BYTES = 32 << 20  # read or copied at a time, as the streamer does
_EDITS, _CONTEXTS = 2, 4


def streaming(device: torch.device, shape: str, memory: str, steps: int, copied_bytes: int, folder: str | None) -> int:
    """A row for each rate, for the edit in memory and for the streamed one; 1 where that is not as it should be.

    `steps` are loss evaluations of each edit, in `folder` (None: the temporary one) is room for the checkpoint.
    """
    table = Table(results() / "gpu_streaming.csv", origin(device))
    with tempfile.TemporaryDirectory(prefix="rome-fast-streaming-", dir=folder) as name:
        return _Run(table, device, shape, memory, steps, Path(name)).all(copied_bytes)


class _Run:
    def __init__(self, table: Table, device: torch.device, shape: str, memory: str, steps: int, folder: Path) -> None:
        self.table, self.device, self.shape, self.folder = table, device, shape, folder
        self.memory, self.steps = memory, steps
        self.model = folder / "model"

    def all(self, copied_bytes: int) -> int:
        start = time.perf_counter()
        size = save_checkpoint(self.model, self.shape, self.device, torch.bfloat16)
        self.add("save", time.perf_counter() - start, size)
        # The first reading finds some of it on its way to the disk.
        cached = max(self.read_files() for _ in range(2))
        self.add("read, page cache", size / cached, size, cached)
        copied = copy_rate(self.device, copied_bytes)
        self.add("copy, pinned", copied_bytes / copied, copied_bytes, copied)
        resident = self.edit("resident", None)
        streamed = self.edit("streamed", self.memory, copied=copied, cached=cached, resident=resident)
        return int("no" in (resident["correct"], streamed["correct"]))

    def add(self, what: str, seconds: float, size: float, rate: float | None = None, **more: Any) -> dict[str, Any]:
        rate = size / seconds if rate is None else rate
        row = {
            "what": what,
            "shape": self.shape,
            "dtype": "bfloat16",
            "edits": "",
            "steps": "",
            "budget_gib": "",
            "seconds": seconds,
            "values_seconds": "",
            "gb": size / 1e9,
            "gb_per_s": rate / 1e9,
            "share_of_copy": "",
            "share_of_page_cache": "",
            "peak_gib": "",
            "difference": "",
            "correct": "",
        } | more
        self.table.add(row)
        print(f"streaming: {what}: {size / 1e9:.2f} GB in {seconds:.2f} s, {rate / 1e9:.2f} GB/s {row['correct']}")
        return row

    def read_files(self) -> float:
        """Bytes a second of all shards, by one thread."""
        buffer, count, start = bytearray(_CHUNK_BYTES), 0, time.perf_counter()
        for shard in sorted(self.model.glob("*.safetensors")):
            with shard.open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    count += got
        return count / (time.perf_counter() - start)

    def edit(
        self,
        what: str,
        memory: str | None,
        copied: float = 0.0,
        cached: float = 0.0,
        resident: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        read, out = [0, 0.0], self.folder / what

        def on_read(count: int, rate: float) -> None:
            read[:] = count, rate

        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        forget_peak(self.device)
        start = time.perf_counter()
        with deterministic():
            result = self.edited(memory, out, on_read)
        seconds = time.perf_counter() - start
        peak, budget = peak_bytes(self.device), None if memory is None else parse_bytes(memory)
        (weight,) = result.delta.updates
        before, after = stored(self.model, weight), stored(out, weight)
        more: dict[str, Any] = {}
        # What has changed nothing, or all to NaN, has edited nothing.
        correct = bool(torch.isfinite(after).all()) and not torch.equal(before, after)
        if resident is not None:
            if not read[0]:
                raise SystemExit(f"streaming: nothing was read: {memory} holds the whole checkpoint")
            wanted = stored(self.folder / resident["what"], weight)
            error = (after.double() - wanted.double()).norm() / (wanted.double() - before.double()).norm()
            within = self.device.type != "cuda" or budget is None or peak <= budget
            correct = correct and within and same_bytes(out, self.folder / resident["what"])
            more = {
                "difference": float(error),
                "share_of_copy": read[1] / copied,
                "share_of_page_cache": read[1] / cached,
            }
        return self.add(
            what,
            seconds,
            read[0],
            read[1],
            edits=_EDITS,
            steps=self.steps,
            budget_gib="" if budget is None else budget / 2**30,
            values_seconds=result.seconds["values"],
            peak_gib=peak / 2**30,
            correct=yes(correct),
            **more,
        )

    def edited(self, memory: str | None, out: Path, on_read: Any) -> EditResult:
        return apply_edits(
            self.model,
            requests(_EDITS),
            statistics="identity",
            method="c-rome",
            schedule="sequential",
            batch_size=1,
            contexts=CONTEXTS[:_CONTEXTS],
            # A random model learns no target: all steps are taken.
            settings={"steps": self.steps, "stop": "loss", "stop_loss": -1.0},
            guard="off",
            unconverged="write",
            measure=False,
            memory=memory,
            device=self.device,
            out=out,
            link="hard",
            on_read=on_read,
        )


def stored(folder: Path, name: str) -> Tensor:
    """A tensor of a checkpoint."""
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  (it is no mapping)
                return tensors.get_tensor(name)
    raise KeyError(name)


def copy_rate(device: torch.device, copied_bytes: int) -> float:
    """Bytes a second of copies to the device from pinned memory; on a CPU from memory to memory."""
    on_gpu = device.type == "cuda"
    source = torch.empty(min(copied_bytes, _CHUNK_BYTES), dtype=torch.uint8, pin_memory=on_gpu).random_()
    target = torch.empty(len(source), dtype=torch.uint8, device=device)
    times = max(1, copied_bytes // len(source))

    def run() -> None:
        for _ in range(times):
            target.copy_(source, non_blocking=on_gpu)

    return times * len(source) / median_seconds(run, device)


@contextmanager
def deterministic() -> Iterator[None]:
    """Sums in one order, as far as torch has such; where it has none it goes on."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # What is empty need not be filled, which takes time. (The types that torch ships do not have this switch.)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
