"""`rome-fast bench --predict`: what edits would take on a GPU that is not here, from what they launch and move.

What they launch (see `counting`) is set against the constants of a GPU:

    seconds of a kernel  = max(FLOPs / rate reached, bytes / bandwidth reached, least seconds of a kernel)
    seconds of a stretch = max(sum over its kernels, launches · seconds of the host for one)

where a stretch is what is launched between two places at which the host waits. Captured in a CUDA graph, a step takes
the sum over its kernels alone; capturing it, done once for the rows of a batch, takes the host as long as an eager step
and a constant more. Where constants come from stands beside them in `gpus/*.json`. Not in the model: how long a launch
of our own kernels takes the host, which may be more than another one; what caches hold; the latency of triangular
solves; the first use of a shape.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from ..edits import Edit
from ..errors import ArgumentError
from ..methods import method_named
from ..opening import checkpoints
from ..runs.terminal import show
from ..search.capture import CAPTURE_SECONDS
from ..search.slots import CAPTURED_POSITIONS
from .counting import Batch, Call, count_call
from .launches import KINDS, Launches, Stretch, launched
from .shapes import CONTEXTS, known_shape, repeated, shape_config, trained_tokenizer

_FOLDER = Path(__file__).with_name("gpus")
# Arguments that are of what is measured, None or False where they are not given.
_MEASURED = (
    *("model", "baseline", "statistics", "sentences", "no_quality", "keep", "csv", "plot"),
    *("layer", "layers", "device", "threads"),
)
_STEPS = 16  # of the default rule, all but the last of them on some of the rows


@dataclass(frozen=True)
class Gpu:
    """Constants of a GPU, each with its source in the file it is read from."""

    name: str
    matrix_rate: float  # FLOP/s of a large product in 16 bit
    copy_bandwidth: float  # bytes/s read and written
    memory: float  # bytes
    share_of_matrix_rate: float  # that products with weights reach
    attention_rate: float  # FLOP/s of attention, those of tiles that are not full included
    share_of_bandwidth_joining: float  # reached where tensors are joined
    share_of_bandwidth_pointwise: float  # and by all else
    kernel_seconds: float  # from a kernel to the next, at least
    launch_seconds: float  # of the host, for each
    capture_seconds: float  # of a graph, beyond the launches

    def seconds(self, launches: Launches) -> float:
        """Of the kernels of one call of an operator."""
        rate, share = self.matrix_rate * self.share_of_matrix_rate, self.share_of_bandwidth_pointwise
        if launches.kind == "attention":
            rate = self.attention_rate
        elif launches.kind == "joining":
            share = self.share_of_bandwidth_joining
        moving = launches.moved_bytes / (share * self.copy_bandwidth)
        return max(launches.flops / rate, moving, launches.kernels * self.kernel_seconds)

    def busy(self, stretches: Sequence[Stretch]) -> float:
        """Sum over kernels."""
        return sum(count * self.seconds(launches) for stretch in stretches for launches, count in stretch.items())

    def eager(self, stretches: Sequence[Stretch]) -> float:
        """Seconds where the host launches one kernel after the other."""
        return sum(max(self.busy([s]), self.launch_seconds * launched([s])) for s in stretches)


def known_gpus() -> list[str]:
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def gpu_constants(name: str) -> dict[str, Any]:
    """The file of a GPU: its name, and by constant the value, unit and source. Raises ArgumentError for another one."""
    if name not in known_gpus():
        raise ArgumentError(f"predict: got {name!r}, wanted one of {', '.join(known_gpus())}")
    found: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def gpu_named(name: str) -> Gpu:
    """Raises ArgumentError for one that is not known."""
    file = gpu_constants(name)
    return Gpu(file["name"], **{constant: entry["value"] for constant, entry in file["constants"].items()})


@dataclass(frozen=True)
class Rule:
    """How many evaluations of the loss an edit takes, and how many of them on some of its rows only."""

    steps: int
    drafted: int

    def parts(self, batch: Batch) -> list["Phase"]:
        """What the evaluations launch, phase by phase; in slots the first one on all rows is without a gradient."""
        if not (self.drafted and batch.draft_first):
            return [Phase(batch.rows, batch.first, batch.step, self.steps)]
        found = [Phase(batch.draft_rows, batch.draft_first, batch.draft_step, self.drafted)]
        left = self.steps - self.drafted
        if batch.look and left:
            found.append(Phase(batch.rows, batch.look, [], 1))
            left = left if left > 1 else 0
        return [*found, Phase(batch.rows, batch.first, batch.step, left)] if left else found


class Phase(NamedTuple):
    """Evaluations on the same rows: what the first of them launches, and what each further step does."""

    rows: int
    first: list[Stretch]
    step: list[Stretch]
    evaluations: int


def predict(
    calls: Sequence[Call], gpu: Gpu, rule: Rule, *, captured: float = 0, patience: float = 0
) -> dict[str, float]:
    """Seconds per edit of every stage, and of all together.

    Steps of at most `captured` positions are captured, once launching them has taken `patience` seconds of the host, if
    those that are left would take as many again.
    """
    batches = [batch for call in calls for batch in call.batches]
    stages = {
        "contexts": sum(gpu.eager(call.batches[0].contexts) for call in calls),
        "keys": sum(gpu.eager(batch.keys) for batch in batches),
        "values": sum(_values_seconds(batch, gpu, rule, captured, patience) for batch in batches),
        "update": sum(gpu.eager(batch.update) for batch in batches),
    }
    edits = sum(call.edits for call in calls)
    return {stage: seconds / edits for stage, seconds in (stages | {"all": sum(stages.values())}).items()}


def _values_seconds(batch: Batch, gpu: Gpu, rule: Rule, captured: float, patience: float) -> float:
    """The second evaluation or a later one is captured, where there is a further one to gain by it."""
    total = 0.0
    for rows, first, step, evaluations in rule.parts(batch):
        launching = gpu.launch_seconds * launched(step)
        eager = max(1, math.ceil(patience / launching)) if launching else evaluations
        worth = evaluations > eager + 1 and (evaluations - eager) * launching >= patience
        if worth and rows * batch.suffix <= captured:
            total += gpu.eager(first) + (eager - 1) * gpu.eager(step) + launching + gpu.capture_seconds
            total += (evaluations - eager) * gpu.busy(step)
        else:
            total += gpu.eager(first) + (evaluations - 1) * gpu.eager(step)
    return total


def totals(calls: Sequence[Call], gpu: Gpu, rule: Rule) -> dict[str, Any]:
    """Launches, FLOPs, bytes and seconds of kernels per edit, and the share of these seconds by kind."""
    pieces: list[tuple[int, list[Stretch]]] = []
    for call in calls:
        pieces.append((1, call.batches[0].contexts))
        for batch in call.batches:
            pieces += [(1, batch.keys), (1, batch.update)]
            for _, first, step, evaluations in rule.parts(batch):
                pieces += [(1, first), (evaluations - 1, step)]
    found: Stretch = Counter()
    for times, stretches in pieces:
        for stretch in stretches:
            for launches, count in stretch.items():
                found[launches] += times * count
    edits, busy = sum(call.edits for call in calls), gpu.busy([found])
    return {
        "launches_per_edit": launched([found]) / edits,
        "flops_per_edit": sum(count * launches.flops for launches, count in found.items()) / edits,
        "bytes_per_edit": sum(count * launches.moved_bytes for launches, count in found.items()) / edits,
        "kernel_seconds_per_edit": busy / edits,
        "share_of_kernel_seconds": {
            kind: gpu.busy([Counter({x: count for x, count in found.items() if x.kind == kind})]) / busy
            for kind in KINDS
        },
    }


def layer_launches(batch: Batch) -> dict[str, dict[str, int]]:
    """Kernels of one layer in one step, forward and backward, by operator, most first."""
    found: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    for launches, count in batch.layer.items():
        found["backward" if launches.backward else "forward"][launches.operator] += count * launches.kernels
    return {direction: dict(operators.most_common()) for direction, operators in found.items()}


def check_prediction(arguments: argparse.Namespace) -> None:
    """Raise ArgumentError for arguments of `rome-fast bench` that no prediction goes with."""
    gpu_constants(arguments.predict)
    if arguments.shape is None:
        raise ArgumentError("predict: got no shape, wanted one: nothing is known of weights but their sizes")
    known_shape(arguments.shape)
    given = [name for name in _MEASURED if getattr(arguments, name) is not None]
    given = [name for name in given if getattr(arguments, name) is not False]
    given += ["compute_dtype"] if arguments.compute_dtype != "auto" else []
    if given:
        named = ", ".join(name.replace("_", "-") for name in given)
        raise ArgumentError(f"predict: got {named} as well, which are of what is measured; leave them out")
    if len(arguments.batch or [1]) > 1 or len(arguments.dtype or [1]) > 1:
        raise ArgumentError("predict: got several batch sizes or dtypes, wanted one of each")
    if "float32" in (arguments.dtype or []):
        raise ArgumentError("predict: got dtype float32, wanted bfloat16 or float16, which rates of GPUs are of")
    for name, least in (("count", 1), ("steps", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ArgumentError(f"{name}: got {value}, wanted at least {least}")
    if min(arguments.batch or [1]) < 1:
        raise ArgumentError(f"batch: got {arguments.batch[0]}, wanted at least 1")


def run_prediction(arguments: argparse.Namespace, edits: Sequence[Edit]) -> dict[str, Any]:
    """Count, predict, print the tables; returns the report. For arguments that `check_prediction` has let pass."""
    gpu = gpu_named(arguments.predict)
    texts = [edit.text + edit.continuation(edit.text, edit.target) for edit in edits]
    vocabulary = shape_config(arguments.shape).vocab_size
    tokenizer, tokens = trained_tokenizer(vocabulary, [*CONTEXTS, *texts])
    edits = repeated(edits, arguments.count or (arguments.batch or [None])[0])
    size = (arguments.batch or [len(edits)])[0]
    dtype, steps = (arguments.dtype or ["bfloat16"])[0], arguments.steps or _STEPS
    calls = [
        count_call(
            arguments.shape,
            edits[start : start + size],
            tokenizer,
            method_named(arguments.method),
            gpu.memory,
            getattr(torch, dtype),
            identity=arguments.identity,
        )
        for start in range(0, len(edits), size)
    ]
    full = calls[0].settings.steps
    rules = {"default": Rule(steps, steps - 1), "all rows": Rule(full, 0)}
    report = {
        "gpu": gpu.name,
        "constants": gpu_constants(arguments.predict)["constants"],
        "shape": arguments.shape,
        "dtype": dtype,
        "edits": len(edits),
        "calls": len(calls),
        "batches": [{"edits": b.edits, "rows": b.rows, "suffix": b.suffix} for call in calls for b in call.batches],
        "tokenizer": tokens,
        "attends_apart": calls[0].apart,
        "rules": {
            name: {
                "steps": rule.steps,
                "drafted": rule.drafted,
                "seconds_per_edit": {
                    "eager": predict(calls, gpu, rule),
                    "captured": predict(calls, gpu, rule, captured=CAPTURED_POSITIONS, patience=CAPTURE_SECONDS),
                },
                **totals(calls, gpu, rule),
            }
            for name, rule in rules.items()
        },
        "layer_launches": layer_launches(calls[0].batches[0]),
        "versions": checkpoints.versions(),
    }
    show(_seconds_table(report))
    show(_work_table(report))
    show(_layer_table(report))
    return report


def _seconds_table(report: dict[str, Any]) -> Table:
    title = f"{report['shape']}, {report['dtype']}, on an {report['gpu']}: a prediction, in seconds per edit"
    stages = ("contexts", "keys", "values", "update", "all")
    table = _table(title, "", "steps", "on all rows", "", *stages)
    for name, rule in report["rules"].items():
        for mode, seconds in rule["seconds_per_edit"].items():
            steps = str(rule["steps"]), str(rule["steps"] - rule["drafted"])
            table.add_row(name, *steps, mode, *(f"{seconds[stage]:.3g}" for stage in stages))
    sizes = ", ".join(str(batch["edits"]) for batch in report["batches"])
    attention = "reads the past where it lies" if report["attends_apart"] else "is the library's, of a joined past"
    table.caption = "\n".join(
        [
            f"{report['edits']} edits in {report['calls']} calls, at once {sizes}; attention {attention}",
            f"assumed: how many steps, and that all edits of a batch take them; {report['tokenizer']}",
            "constants of the GPU, and what each was measured or fitted on, are in the report (--json)",
        ]
    )
    return table


def _work_table(report: dict[str, Any]) -> Table:
    table = _table("per edit", "", "launches", "TFLOP", "GB", "s of kernels", *KINDS)
    for name, rule in report["rules"].items():
        table.add_row(
            name,
            f"{rule['launches_per_edit']:.0f}",
            f"{rule['flops_per_edit'] / 1e12:.1f}",
            f"{rule['bytes_per_edit'] / 1e9:.0f}",
            f"{rule['kernel_seconds_per_edit']:.3g}",
            *(f"{rule['share_of_kernel_seconds'][kind]:.0%}" for kind in KINDS),
        )
    return table


def _layer_table(report: dict[str, Any]) -> Table:
    table = _table("one layer in a step", "", "launches", "of operators")
    for direction, operators in report["layer_launches"].items():
        named = ", ".join(f"{name} {count}" for name, count in operators.items())
        table.add_row(direction, str(sum(operators.values())), named)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "of operators") else "right")
    return table
