"""What does C have to be made of? The same edits, closed with second moments of many kinds: a CSV and a figure.

    python benchmarks/corpus_choices.py --edits edits.jsonl --normal 10 --threads 1

Four choices, one at a time, the others at their defaults: tokens per dimension of the keys, length of the rows, whether
the keys of first tokens enter, and the ridge. Values do not depend on C: they are optimised once, for the first-token
requests of the file and some of the others, and every C closes each of them alone. Rows that
benchmarks/results/corpus_choices.csv has of the same model and requests are not measured again.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from rome_fast.kernels import mirror_lower_, second_moment_
from torch import Tensor

from measure import Table, origin, read_rows, results
from rome_fast import Statistics, collect_statistics, load_edits
from rome_fast.assets import demo_texts, model_dir
from rome_fast.closing.flow import Flow
from rome_fast.closing.geometry import Geometry
from rome_fast.demo import held_out_sentences
from rome_fast.errors import StatisticsError
from rome_fast.evaluation import EditMetrics, RowUpdates, edited_perplexities, evaluate, sentence_perplexity
from rome_fast.methods import method_named
from rome_fast.models.fingerprint import Fingerprint
from rome_fast.models.rows import encode
from rome_fast.models.runner import Runner, evaluating
from rome_fast.opening import checkpoints
from rome_fast.opening.defaults import default_layer, default_settings
from rome_fast.search.contexts import sample_contexts
from rome_fast.search.requests import Request, tokenise
from rome_fast.search.search import Solved
from rome_fast.statistics import LayerStatistics
from rome_fast.study.cases import cases_of
from rome_fast.updates.delta import Delta

PER_DIMENSION = (0.5, 1, 2, 5, 10, 20, 50)
ROWS = (16, 32, 64, 128, 256, 512, 2048)
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
USUAL_TOKENS, USUAL_ROWS = 10, 128
SMALL_RIDGE, ENOUGH = 1e-3, 2  # where there are fewer tokens per dimension than that
COLLAPSE = 1.5
SCORED_CONTEXTS = 3


class Bench:
    """The model, its requests with their values, and what is measured under a C."""

    def __init__(self, file: Path, normal: int) -> None:
        self.model, self.tokenizer, _ = checkpoints.load(model_dir(print))
        self.runner = Runner(self.model)
        self.layer = default_layer(self.model.config)
        self.cases = cases_of(self.runner, self.tokenizer, load_edits(file), normal)
        self.first = [case for case in self.cases if case.first_token]
        self.contexts = sample_contexts(self.model, self.tokenizer)
        self.sentences = held_out_sentences(20)
        self.base = sentence_perplexity(self.runner, self.tokenizer, self.sentences)

    def flow(self, method: str, factor: Tensor | None) -> Flow:
        settings = default_settings(self.model.config)
        layers = {self.layer: Geometry(factor)}
        return Flow.measuring(self.runner, self.tokenizer, method_named(method), layers, self.contexts, settings)

    @cached_property
    def solved(self) -> Mapping[str, tuple[list[Request], list[Solved]]]:
        """Values of all requests by c-rome, and of the first-token ones by rome."""
        found = {}
        for method, cases in (("c-rome", self.cases), ("rome", self.first)):
            flow = self.flow(method, None)
            requests = [tokenise(self.runner, self.tokenizer, case.edit, self.contexts, flow.method) for case in cases]
            found[method] = requests, flow.find(requests)
        return found

    def deltas(self, method: str, factor: Tensor) -> list[Delta]:
        return [delta for delta, _ in self.flow(method, factor).close_each(*self.solved[method])]

    def ratios(self, deltas: Sequence[Delta]) -> list[float]:
        updates = RowUpdates.of(self.runner, deltas)
        return [p / self.base for p in edited_perplexities(self.runner, self.tokenizer, self.sentences, updates)]

    def measure(self, entry: LayerStatistics) -> dict[str, Any]:
        factor = entry.factor(torch.device("cpu"))
        made = self.deltas("c-rome", factor)
        ratios = self.ratios(made)
        rome = self.ratios(self.deltas("rome", factor))
        weight = float(self.runner.weight(self.layer).norm())
        updates = [float(next(iter(delta.updates.values())).dense().norm()) / weight for delta in made]
        scores: dict[bool, list[EditMetrics]] = {}
        ratio: dict[bool, list[float]] = {}
        for first in (True, False):
            places = [i for i, case in enumerate(self.cases) if case.first_token == first]
            edits, deltas = [self.cases[i].edit for i in places], [made[i] for i in places]
            # Facts about first tokens answer behind a prefix.
            contexts = self.contexts[:SCORED_CONTEXTS] if first else ()
            scores[first] = evaluate(self.model, self.tokenizer, edits, contexts, deltas=deltas, essence_tokens=0)
            ratio[first] = [ratios[i] for i in places]
        return {
            "condition": entry.condition(torch.device("cpu")),
            "first_ratio": fmean(ratio[True]),
            "first_ratio_most": max(ratio[True]),
            "first_p_prefixed": fmean(s.probability_prefixed or 0.0 for s in scores[True]),
            "normal_ratio": fmean(ratio[False]),
            "normal_ratio_most": max(ratio[False]),
            "normal_p": fmean(s.probability for s in scores[False]),
            "normal_argmax": fmean(s.argmax for s in scores[False]),
            "paraphrase": fmean(s.paraphrase for s in scores[False] if s.paraphrase is not None),
            "neighborhood": fmean(s.neighborhood for s in scores[False] if s.neighborhood is not None),
            "update_ratio": fmean(updates),
            "rome_collapsed": sum(not r <= COLLAPSE for r in rome),
            "rome_ratio": geometric_mean(rome),
        }


def collected(bench: Bench, per_dimension: float, rows: int) -> LayerStatistics:
    """C of that many tokens; the beginning of the corpus is the same for all."""
    width = bench.runner.weight(bench.layer).shape[1]
    found = collect_statistics(
        bench.model, bench.tokenizer, demo_texts(), [bench.layer], round(per_dimension * width), rows
    )
    return found.layers[bench.layer]


@torch.no_grad()
def without_first_tokens(bench: Bench, entry: LayerStatistics, rows: int) -> LayerStatistics:
    """The same C less the keys at position 0 of its rows, which depend on the token there alone."""
    width = entry.moment.shape[0]
    firsts: list[int] = []
    left = entry.tokens
    for text in demo_texts():
        ids = encode(bench.tokenizer, [text])[0].ids[:left]
        firsts += ids[::rows]
        left -= len(ids)
        if not left:
            break
    total = torch.zeros(width, width, dtype=torch.float64)

    def see(keys: Tensor, _output: Tensor) -> None:
        second_moment_(total, keys.reshape(-1, width))

    with evaluating(bench.model), bench.runner.watching(bench.layer, see):
        bench.runner.run(bench.runner.embed(torch.tensor(firsts).unsqueeze(1)), 0, bench.layer + 1)
    kept = entry.tokens - len(firsts)
    moment = (entry.moment.double() * entry.tokens - mirror_lower_(total)) / kept
    share = float(total.trace() / (entry.moment.double().trace() * entry.tokens))
    print(f"  {len(firsts)} of {entry.tokens} tokens are first ones, and {share:.1%} of the trace of C")
    return LayerStatistics(bench.layer, moment.float(), kept, entry.fingerprint)


def choices(bench: Bench) -> Iterator[tuple[dict[str, Any], Callable[[], LayerStatistics]]]:
    """Every C by what it is made of, and a function that makes it."""

    @cache
    def of(per_dimension: float, rows: int) -> LayerStatistics:
        return collected(bench, per_dimension, rows)

    def ridged(ridge: float, entry: LayerStatistics) -> LayerStatistics:
        return Statistics([entry]).with_ridge(ridge).layers[bench.layer]

    fields = {"per_dimension": float(USUAL_TOKENS), "rows": USUAL_ROWS, "first_tokens": "yes", "ridge": 0.0}
    for number in map(float, PER_DIMENSION):
        few = number < ENOUGH
        made = partial(lambda n, few: ridged(SMALL_RIDGE, of(n, USUAL_ROWS)) if few else of(n, USUAL_ROWS), number, few)
        yield {"choice": "tokens", **fields, "per_dimension": number, "ridge": SMALL_RIDGE if few else 0.0}, made
    for rows in ROWS:
        yield {"choice": "rows", **fields, "rows": rows}, partial(of, USUAL_TOKENS, rows)
    for rows in (USUAL_ROWS, ROWS[-1]):
        without = partial(lambda rows: without_first_tokens(bench, of(USUAL_TOKENS, rows), rows), rows)
        yield {"choice": "first tokens", **fields, "rows": rows, "first_tokens": "no"}, without
    for ridge in RIDGES:
        yield (
            {"choice": "ridge", **fields, "ridge": ridge},
            partial(lambda ridge: ridged(ridge, of(USUAL_TOKENS, USUAL_ROWS)), ridge),
        )


def made_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("per_dimension", "rows", "first_tokens", "ridge"))


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(results() / "corpus_choices.csv")
    panels = (
        ("tokens", "per_dimension", "tokens per dimension"),
        ("rows", "rows", "longest row"),
        ("ridge", "ridge", "ridge, in units of the mean diagonal"),
    )
    figure, axes = plt.subplots(2, len(panels), figsize=(12, 6), sharey="row")
    for column, (choice, field, label) in enumerate(panels):
        points = sorted((row for row in rows if row["choice"] == choice), key=lambda row: float(row[field]))
        x = [float(row[field]) for row in points]
        top, bottom = axes[0][column], axes[1][column]
        for name, title in (("first_ratio_most", "first token, largest"), ("normal_ratio_most", "others, largest")):
            top.plot(x, [100 * (float(row[name]) - 1) for row in points], marker="o", markersize=4, label=title)
        for name, title in (
            ("first_p_prefixed", "P(target), first token, behind a prefix"),
            ("normal_p", "P(target), others"),
            ("paraphrase", "paraphrase"),
            ("neighborhood", "neighbourhood"),
        ):
            bottom.plot(x, [float(row[name]) for row in points], marker="o", markersize=4, label=title)
        for panel in (top, bottom):
            panel.set_xscale("log")
            panel.spines[["top", "right"]].set_visible(False)
        top.axhline(0, color="black", linewidth=0.6, linestyle=":")
        bottom.set_ylim(0, 1.03)
        bottom.set_xlabel(label)
    axes[0][0].set_ylabel("perplexity, change in %")
    axes[0][0].legend(frameon=False, fontsize=8)
    axes[1][0].legend(frameon=False, fontsize=8)
    figure.text(0.995, 0.005, "SmolLM2-135M-Instruct, float32, CPU, c-rome, layer 9", ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(results() / "corpus_choices.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--normal", type=int, default=10, help="requests besides the first-token ones (default: 10)")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.edits, arguments.normal)
    about = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "layer": bench.layer,
        "requests": len(bench.cases),
        "first_token_requests": len(bench.first),
        "fingerprint": str(Fingerprint.of(bench.runner, bench.layer)),
        "threads": torch.get_num_threads(),
    }
    file = results() / "corpus_choices.csv"
    before = read_rows(file) if file.exists() else []
    kept = [row for row in before if all(row[name] == str(value) for name, value in about.items())]
    table = Table(file, {}, kept)
    known: dict[tuple[str, ...], dict[str, Any]] = {made_of(row): dict(row) for row in kept}
    for fields, made in choices(bench):
        if any(row["choice"] == fields["choice"] and made_of(row) == made_of(fields) for row in kept):
            continue
        # The default belongs to several choices.
        if made_of(fields) not in known:
            try:
                figures = bench.measure(made())
            except StatisticsError as error:
                print(f"{fields}: {error}", flush=True)
                continue
            print(fields, {name: round(value, 4) for name, value in figures.items()}, flush=True)
            known[made_of(fields)] = fields | figures | about | origin(torch.device("cpu"))
        table.add(known[made_of(fields)] | {"choice": fields["choice"]})
    plot()


if __name__ == "__main__":
    main()
