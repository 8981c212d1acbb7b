"""How do quality and collapse go with the number of edits? Joint and sequential, as CSV and a figure.

    python benchmarks/scaling.py --edits edits.jsonl --counts 1 10 30 100 --schedule joint

Every point is one row of benchmarks/results/scaling.csv; a point that is there already is not measured again. The
points of one curve share their work: joint edits are all optimised on the unedited model, sequential ones go on from
the model of the point before, which is kept as a Delta in the cache, so that a run that was interrupted goes on there.
With sequential batches of 100, points below 100 edits are one batch, that is the joint ones, and are left out.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rome_fast import Edit, Statistics, apply_edits, load_edits
from rome_fast.assets import cache_dir, model_dir
from rome_fast.closing.flow import Flow
from rome_fast.closing.geometry import Geometry
from rome_fast.demo import held_out_sentences, statistics_dir
from rome_fast.evaluation import evaluate, sentence_perplexity, summarise
from rome_fast.methods import method_named
from rome_fast.models.rows import edit_rows, needs_prefix
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.opening.defaults import default_layer, default_settings
from rome_fast.search.contexts import sample_contexts
from rome_fast.search.requests import Request, tokenise
from rome_fast.search.search import Solved
from rome_fast.search.values import compute_dtype
from rome_fast.updates.delta import Delta

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
FIGURE = RESULTS.with_suffix(".png")
METHOD = "c-rome"
EVALUATED = 100  # of a point's edits, evenly spaced
FIGURES = ("efficacy", "paraphrase", "neighborhood", "argmax", "decoded_right")


class Study:
    """The demo's model with its statistics, and what is measured on it."""

    def __init__(self) -> None:
        self.model, self.tokenizer, _ = checkpoints.load(model_dir(print))
        self.runner = Runner(self.model)
        self.layer = default_layer(self.model.config)
        self.settings = default_settings(self.model.config)
        self.statistics = Statistics.load(statistics_dir(print))
        self.contexts = sample_contexts(self.model, self.tokenizer)
        self.sentences = held_out_sentences(50)
        self.base = sentence_perplexity(self.runner, self.tokenizer, self.sentences)
        self.weight_norm = float(self.runner.weight(self.layer).norm())

    def requests(self, file: Path) -> list[Edit]:
        """Requests that say one thing each and answer without a prefix, in the file's order."""
        seen: set[tuple[str, str]] = set()
        out = []
        for edit in load_edits(file):
            key = (edit.prompt, edit.subject)
            if key not in seen and not needs_prefix(edit_rows(self.tokenizer, edit, [""], target=False)[0]):
                seen.add(key)
                out.append(edit)
        return out

    def flow(self) -> Flow:
        factor = self.statistics.for_layer(self.runner, self.layer).factor(self.runner.device)
        flow = Flow.measuring(
            self.runner,
            self.tokenizer,
            method_named(METHOD),
            {self.layer: Geometry(factor)},
            self.contexts,
            self.settings,
        )
        flow.guard = flow.closing.guard = "warn"
        flow.search.progress = lambda done, _: print(f"  {done} values", flush=True) if done % 16 < 4 else None
        return flow

    def measure(self, edits: Sequence[Edit]) -> dict[str, float]:
        """On the model as it is."""
        sample = edits[:: max(1, len(edits) // EVALUATED)][:EVALUATED]
        figures = summarise(evaluate(self.model, self.tokenizer, sample))
        perplexity = sentence_perplexity(self.runner, self.tokenizer, self.sentences)
        return {name: figures[name] for name in FIGURES} | {"perplexity_ratio": perplexity / self.base}


def joint(study: Study, edits: Sequence[Edit], counts: Sequence[int]) -> None:
    flow = study.flow()
    requests: list[Request] = [tokenise(study.runner, study.tokenizer, e, study.contexts, flow.method) for e in edits]
    solved: list[Solved] = []
    seconds = 0.0
    for count in counts:
        start = time.process_time()
        solved += flow.find(requests[len(solved) : count])
        closed = flow.closing.close(solved, flow.search)
        delta = flow.closing.delta(closed)
        seconds += time.process_time() - start
        delta.apply(study.model)
        record(study, "joint", 0, count, study.measure(edits[:count]), norm(delta), closed.condition, seconds)
        delta.revert(study.model)


def sequential(study: Study, edits: Sequence[Edit], counts: Sequence[int], batch: int) -> None:
    kept = cache_dir() / f"scaling-{METHOD}-{batch}"
    kept.mkdir(parents=True, exist_ok=True)
    done, total = resume(study, kept)
    for count in counts:
        if count % batch or count < done:
            continue
        if count > done:
            start = time.process_time()
            result = apply_edits(
                study.model,
                edits[done:count],
                tokenizer=study.tokenizer,
                statistics=study.statistics,
                contexts=study.contexts,
                schedule="sequential",
                batch_size=batch,
                guard="off",
                unconverged="write",
                measure=False,
                progress=lambda now, total: print(f"  {now} of {total}", flush=True) if now % 10 == 0 else None,
            )
            seconds = float(total.metadata.get("process_seconds", 0)) + time.process_time() - start
            total = total.merge(result.delta)
            total.metadata |= {"process_seconds": str(seconds), "condition": str(result.condition)}
            total.save(kept / f"{count}.safetensors")
            done = count
        figures = study.measure(edits[:count])
        condition, seconds = (float(total.metadata[name]) for name in ("condition", "process_seconds"))
        record(study, "sequential", batch, count, figures, norm(total), condition, seconds)


def resume(study: Study, kept: Path) -> tuple[int, Delta]:
    """Bring the model to where the last run of this curve left it: the edits made, and their Delta."""
    done = max((int(file.stem) for file in kept.glob("*.safetensors")), default=0)
    if not done:
        return 0, Delta({})
    delta = Delta.load(kept / f"{done}.safetensors")
    delta.apply(study.model)
    return done, delta


def norm(delta: Delta) -> float:
    (update,) = delta.updates.values()
    return float(update.dense().norm())


def record(
    study: Study,
    schedule: str,
    batch: int,
    count: int,
    figures: dict[str, float],
    update_norm: float,
    condition: float,
    seconds: float,
) -> None:
    row: dict[str, Any] = {
        "schedule": schedule,
        "batch": batch,
        "edits": count,
        **{name: round(value, 4) for name, value in figures.items()},
        "update_norm": round(update_norm, 2),
        "weight_norm": round(study.weight_norm, 2),
        "condition": f"{condition:.3g}",
        "process_seconds": round(seconds, 1),
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "compute_dtype": str(compute_dtype(study.runner, study.settings)).removeprefix("torch."),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "layer": study.layer,
        "method": METHOD,
        "statistics": "60000 tokens",
        "torch": torch.__version__,
    }
    print(row, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def rows() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = (*FIGURES[:3], "perplexity_ratio")
    figure, axes = plt.subplots(1, len(shown), figsize=(14, 3.4))
    curves = sorted({(row["schedule"], int(row["batch"])) for row in rows()})
    for panel, name in zip(axes, shown, strict=True):
        for schedule, batch in curves:
            points = sorted(
                (int(r["edits"]), float(r[name]))
                for r in rows()
                if (r["schedule"], int(r["batch"])) == (schedule, batch)
            )
            label = schedule if schedule == "joint" else f"sequential, batches of {batch}"
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        panel.set_xscale("log")
        panel.set_xlabel("edits")
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        if name == "perplexity_ratio":
            panel.set_yscale("log")
            panel.axhline(1, color="black", linewidth=0.6, linestyle=":")
        else:
            panel.set_ylim(0, 1.03)
    axes[0].legend(frameon=False, fontsize=8)
    figure.text(0.995, 0.01, "SmolLM2-135M-Instruct, float32, CPU, c-rome, C from 60k tokens", ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 30, 100, 300, 1000])
    parser.add_argument("--schedule", choices=("joint", "sequential"), default="joint")
    parser.add_argument("--batch", type=int, default=1, help="of the sequential schedule")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    batch = 0 if arguments.schedule == "joint" else arguments.batch
    done = {int(r["edits"]) for r in rows() if (r["schedule"], int(r["batch"])) == (arguments.schedule, batch)}
    counts = [count for count in sorted(arguments.counts) if count not in done]
    study = Study()
    edits = study.requests(arguments.edits)
    if counts and arguments.schedule == "joint":
        joint(study, edits, counts)
    elif counts:
        sequential(study, edits, counts, arguments.batch)
    plot()


if __name__ == "__main__":
    main()
