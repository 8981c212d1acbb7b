"""How models live through thousands of edits that come a batch at a time, by what is done with those of before.

    python benchmarks/survival.py --edits edits.jsonl --work work --counts 100 500 1000 2000

"ledger": all edits so far are closed together, on the base model, as `rome_fast.Ledger` does after every change, and in
"ledger+edited" each batch's values are found with the update of those before in the model, as by add(on="edited"); the
others change the weights as edited so far, batch after batch. What a way remembers of earlier batches is part of the
method (`memit-history`, `encore`, `alphaedit`), or "dual+history"; methods take options, as in `methods.py`. Values are
those found on the unedited model, the same for all ways, unless --anew: then each batch's are found on the model as
edited so far. Rows that are there are not made again, but a way that changes weights begins from its first batch.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from methods import Bench, Variant, means, reading, rows, write
from rome_fast import Edit
from rome_fast.assets import model_dir
from rome_fast.closing.rebasing import rebased
from rome_fast.search.search import Solved
from rome_fast.updates.delta import Delta

RESULTS = Path(__file__).parent / "results"
TABLE = RESULTS / "survival.csv"
FIGURE = TABLE.with_suffix(".png")
# λ as it suits a small model: of the published 15,000 there is little left of an edit (docs/methods.md).
WAYS = (
    "ledger",
    "ledger+edited",
    "dual",
    "dual+history",
    "memit-history:penalty=1500",
    "encore:penalty=1500",
    "alphaedit",
)
FIRST = 100  # of the edits, whose fate is measured apart; and as many last ones
EVALUATED = 50  # of all edits, of the first and of the last ones, evenly spaced each


def states(bench: Bench, way: str, counts: Sequence[int], batch: int, anew: bool) -> Iterator[tuple[int, list[float]]]:
    """The model with so many edits, one count after the other, and ‖ΔW‖ / ‖W‖ of its layers."""
    name, _, option = way.partition("+")
    ledger, on_edited = name == "ledger", option == "edited"
    variant = Variant.parse("dual" if ledger else name, bench.runner)
    if option == "history":
        variant = replace(variant, method=replace(variant.method, remembers=True))
    names = [bench.runner.weight_name(layer) for layer in variant.layers]
    before = {name: bench.model.get_parameter(name).detach().clone() for name in names}
    places = range(bench.first, bench.first + max(counts))
    made: list[Delta] = []
    so_far: list[Solved] = []
    flow = bench.flow(variant)
    edges = [0, *counts] if way == "ledger" else [*range(0, max(counts), batch), max(counts)]
    for start, stop in pairwise(edges):
        some = places[0 if way == "ledger" else start : stop]
        if on_edited:
            requests = [bench.requests[i] for i in some]
            found = flow.search.find(requests, merge=False)
            if made:
                update = made.pop()
                update.revert(bench.model)
                found = rebased(bench.runner, flow.search, found, update)
            so_far += found
            solved = list(so_far)
        elif ledger or not anew:
            if ledger and made:
                made.pop().revert(bench.model)
            solved = bench.solved_for(variant, some)
        else:
            solved = flow.find([bench.requests[i] for i in some])
        solved = [each for each in solved if each.finite]
        closed = flow.closing.close(solved, flow.search)
        if not ledger:
            flow.closing.remember(closed)
        made.append(flow.closing.delta(closed))
        made[-1].apply(bench.model)
        if stop in counts:
            now = [bench.model.get_parameter(name).detach() for name in names]
            yield stop, [float((a - b).norm() / b.norm()) for a, b in zip(now, before.values(), strict=True)]
    with torch.no_grad():
        for name, weight in before.items():
            bench.model.get_parameter(name).copy_(weight)


def measured(bench: Bench, edits: Sequence[Edit]) -> dict[str, float]:
    """Figures of some of the edits, of the first and the last ones, and of the model."""
    found: dict[str, float] = {}
    for suffix, group in (("", edits), ("_first", edits[:FIRST]), ("_last", edits[-FIRST:])):
        own = means(bench, group[:: max(1, len(group) // EVALUATED)][:EVALUATED])
        names = tuple(own) if not suffix else ("efficacy", "argmax", "probability")
        found |= {name + suffix: own[name] for name in names}
    return found | reading(bench)


def run(bench: Bench, ways: Sequence[str], counts: Sequence[int], batch: int, anew: bool) -> None:
    for way in ways:
        values = "as edited so far" if anew or way.endswith("+edited") else "unedited model"
        done = {
            int(row["edits"])
            for row in rows(TABLE)
            if (row["way"], row["batch"], row["values"]) == (way, str(batch), values)
        }
        left = [count for count in counts if count not in done]
        start = time.process_time()
        for count, norms in states(bench, way, left, batch, anew) if left else ():
            seconds = time.process_time() - start
            edits = [bench.edits[i] for i in range(bench.first, bench.first + count)]
            row: dict[str, Any] = {"way": way, "edits": count, "batch": batch, "values": values}
            row |= measured(bench, edits)
            row |= {"update_ratios": " ".join(f"{norm:.2f}" for norm in norms), "seconds": round(seconds, 1)}
            conditions = bench.conditions(Variant.parse("dual", bench.runner), count)
            row |= {k: v for k, v in conditions.items() if k not in ("variant", "ridge", "penalty")}
            write(TABLE, row)
            start = time.process_time() - seconds


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    points = rows(TABLE)
    panels = (
        ("efficacy", "efficacy"),
        ("argmax", "target is the answer, bare"),
        ("argmax_first", f"the same, of the first {FIRST}"),
        ("paraphrase", "paraphrase"),
        ("neighborhood", "neighbourhood"),
        ("perplexity_ratio", "perplexity, of that before"),
        ("update_ratios", "‖ΔW‖ / ‖W‖, the layer with the largest"),
    )
    figure, axes = plt.subplots(2, 4, figsize=(15, 7))
    *places, last = axes.flat
    for panel, (field, title) in zip(places, panels, strict=True):
        for way, values in dict.fromkeys((point["way"], point["values"]) for point in points):
            of_way = [p for p in points if (p["way"], p["values"]) == (way, values)]
            own = sorted((int(p["edits"]), max(map(float, p[field].split()))) for p in of_way)
            style = "-" if values == "unedited model" else "--"
            label = way if style == "-" else f"{way}, values {values}"
            panel.plot(*zip(*own, strict=True), style, marker="o", markersize=4, label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("edits")
        panel.spines[["top", "right"]].set_visible(False)
        if field == "perplexity_ratio":
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100]))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
        elif field != "update_ratios":
            panel.set_ylim(0, 1.03)
    last.axis("off")
    last.legend(*places[0].get_legend_handles_labels(), frameon=False, loc="center")
    one = points[0]
    conditions = (
        f"{one['model']}, {one['dtype']}, {one['device']}, C of {one['statistics']}, layers {one['layers']}, "
        f"batches of {one['batch']}"
    )
    figure.text(0.995, 0.005, conditions, ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for values and statistics")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300, 500, 1000, 2000])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help=f"any of {', '.join(WAYS)}, or another method")
    parser.add_argument("--anew", action="store_true", help="find each batch's values on the model as edited so far")
    parser.add_argument("--sentences", type=Path, help="for perplexity, one a line (default: 50 of Wikipedia)")
    parser.add_argument("--model", type=Path, help="folder of a model (default: the demo's)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts = sorted(arguments.counts)
    folder = arguments.work / f"{arguments.edits.stem}-{counts[-1]}"
    source = arguments.model or model_dir(print)
    bench = Bench(source, folder, arguments.edits, counts[-1], ["dual"], arguments.sentences)
    bench.find(bench.first + counts[-1])
    run(bench, arguments.ways, counts, arguments.batch, arguments.anew)
    plot()


if __name__ == "__main__":
    main()
