"""What methods do with the same edits: each alone, and more and more of them jointly, with a figure of the latter.

    python benchmarks/methods.py --edits edits.jsonl                      # 110 edits, each alone
    python benchmarks/methods.py --edits edits.jsonl --joint 1 10 30 100 300 1000
    python benchmarks/methods.py --edits edits.jsonl --subjects           # those of subjects with several, jointly
    python benchmarks/methods.py --edits edits.jsonl --normal 20 --model ./model --variants c-rome dual dual@2-4

A variant is a method, perhaps with layers, ridge, penalty or rounds of its own: `dual`, `dual@9`, `dual@5-9`,
`dual:ridge=0.1`, `memit:penalty=1500`, `dual:rounds=2`. Values are found once, on the rows of `dual`, for all of them
(of those requests that are no first-token cases, other methods have the same rows), and kept in --work, as is every
result: a run that was interrupted goes on. Where a method merges, edits of one subject that are made jointly have one
value, found beside those. Further rounds start from them, and are a variant's own.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rome_fast import Edit, Statistics, collect_statistics, load_edits
from rome_fast.assets import demo_texts, model_dir
from rome_fast.closing.flow import Flow
from rome_fast.closing.geometry import Geometries
from rome_fast.demo import held_out_sentences
from rome_fast.evaluation import UNSEEN, RowUpdates, edited_perplexities, evaluate, sentence_perplexity
from rome_fast.methods import Method, method_named
from rome_fast.models.runner import Runner
from rome_fast.models.verification import check_shared_out, shared_out
from rome_fast.opening import checkpoints
from rome_fast.opening.defaults import default_layers, default_settings
from rome_fast.search.contexts import sample_contexts
from rome_fast.search.requests import Request, by_subject, tokenise
from rome_fast.search.search import Solved
from rome_fast.search.values import compute_dtype
from rome_fast.statistics import first_token_statistics
from rome_fast.study.cases import cases_of
from rome_fast.updates.delta import Delta

RESULTS = Path(__file__).parent / "results"
SINGLE, JOINT = RESULTS / "methods_single.csv", RESULTS / "methods_joint.csv"
SUBJECTS = RESULTS / "methods_subjects.csv"
FIGURE = JOINT.with_suffix(".png")
TOKENS = 60_000  # of the statistics
FOUND_AT_ONCE = 50
EVALUATED = 40  # of a joint point's edits, evenly spaced


@dataclass(frozen=True)
class Variant:
    """A method with layers."""

    text: str
    method: Method
    layers: tuple[int, ...]
    rounds: int = 1

    @classmethod
    def parse(cls, text: str, runner: Runner) -> "Variant":
        """Raises ModelError for layers that an edit of this model cannot be shared out among."""
        name, _, options = text.partition(":")
        name, _, where = name.partition("@")
        method = method_named(name)
        layers = shared_out(runner, runner.decoder.sites_of(default_layers(runner.model.config, method.spread)))
        if where:
            first, _, last = where.partition("-")
            layers = tuple(range(int(first), int(last or first) + 1))
            check_shared_out(runner, layers)
        pairs = (option.partition("=") for option in options.split(",") if option)
        changes: dict[str, Any] = {key: value if key == "arrival" else float(value) for key, _, value in pairs}
        rounds = int(changes.pop("rounds", 1))
        return cls(text, replace(method, **changes), layers, rounds)


class Bench:
    """A model, some requests with their values, and what is measured on them."""

    def __init__(
        self,
        source: Path,
        work: Path,
        file: Path,
        normal: int,
        variants: Sequence[str],
        sentences: Path | None = None,  # a file with one a line
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        self.name = source.name
        self.model, self.tokenizer, _ = checkpoints.load(source)
        self.runner = Runner(self.model)
        self.settings = default_settings(self.model.config)
        self.variants = [Variant.parse(text, self.runner) for text in variants]
        self.layers = shared_out(self.runner, self.runner.decoder.sites_of(default_layers(self.model.config, True)))
        wanted = sorted({*self.layers, *(layer for variant in self.variants for layer in variant.layers)})
        folder = work.parent / "statistics"
        missing = [layer for layer in wanted if not (folder / f"layer-{layer}.safetensors").exists()]
        if missing:
            texts = demo_texts()[: -len(held_out_sentences(100))]
            collect_statistics(self.model, self.tokenizer, texts, missing, TOKENS, out=folder)
        self.statistics = Statistics.load(folder)
        self.contexts = sample_contexts(self.model, self.tokenizer)
        own = None if sentences is None else sentences.read_text(encoding="utf-8").splitlines()
        self.sentences = held_out_sentences(50) if own is None else [line for line in own if line.strip()]
        self.base = sentence_perplexity(self.runner, self.tokenizer, self.sentences)
        self.nll = self.context_nll()
        edits = one_each(load_edits(file))
        cases = cases_of(self.runner, self.tokenizer, edits, normal)
        self.first = sum(case.first_token for case in cases)
        self.edits = [case.edit for case in cases]
        self.requests: list[Request] = []
        self.solved: list[Solved] = []

    def flow(self, variant: Variant) -> Flow:
        geometries = Geometries(self.runner, variant.layers, self.statistics)
        if variant.method.bare:
            geometries.first_tokens = first_token_statistics(self.runner, variant.layers)
        flow = Flow.measuring(self.runner, self.tokenizer, variant.method, geometries, self.contexts, self.settings)
        # Rows are kept as they enter the first of these layers, whichever of them are edited.
        flow.search.layers = self.layers
        return flow

    def find(self, count: int) -> None:
        """Values of the first edits, each its own, out of the folder where they are there."""
        flow = self.flow(Variant("dual", method_named("dual"), self.layers))
        while len(self.solved) < count:
            start = len(self.solved)
            some = self.edits[start : start + FOUND_AT_ONCE]
            requests = [tokenise(self.runner, self.tokenizer, edit, self.contexts, flow.method) for edit in some]
            file = self.work / f"values-{start:05d}.pt"
            if not file.exists():
                torch.save(flow.search.find(requests, merge=False), file)
                print(f"  values {start + len(some)}", flush=True)
            self.requests += requests
            self.solved += torch.load(file, weights_only=False)

    def context_nll(self) -> float:
        """Mean over the contexts of the mean NLL of their tokens, in nats."""
        texts = self.contexts
        return sum(math.log(sentence_perplexity(self.runner, self.tokenizer, [t])) for t in texts) / len(texts)

    def solved_for(self, variant: Variant, places: Sequence[int], *, jointly: bool = True) -> list[Solved]:
        """Values as the variant takes them, for edits that are made together or each alone."""
        solved = {i: self.solved[i] for i in places}
        if jointly and variant.method.merges:
            for group in by_subject([self.edits[i] for i in places]):
                if len(group) > 1:
                    solved |= self.merged(variant, [places[i] for i in group])
        return [each if variant.method.bare else replace(each, bare=None) for each in solved.values()]

    def merged(self, variant: Variant, places: Sequence[int]) -> dict[int, Solved]:
        """Of edits of one subject, with one value."""
        file = self.work / f"merged-{'-'.join(map(str, places))}.pt"
        if not file.exists():
            torch.save(self.flow(variant).find([self.requests[i] for i in places]), file)
        return dict(zip(places, torch.load(file, weights_only=False), strict=True))

    def found_again(self, flow: Flow, variant: Variant, places: range, solved: Sequence[Solved]) -> list[Solved]:
        """Values of edits that are made together after the variant's further rounds."""
        found = list(solved)
        for number in range(2, variant.rounds + 1):
            name = f"{variant.text.replace(':', '-')}-{number}-{places.start}-{places.stop}"
            file = self.work / f"round-{name}.pt"
            if not file.exists():
                torch.save(flow.find_again([self.requests[i] for i in places], found), file)
            found = torch.load(file, weights_only=False)
        return found

    def conditions(self, variant: Variant, edits: int) -> dict[str, Any]:
        method = variant.method
        return {
            "variant": variant.text,
            "layers": " ".join(map(str, variant.layers)),
            "ridge": method.ridge_of(edits),
            "penalty": method.penalty,
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "compute_dtype": str(compute_dtype(self.runner, self.settings)).removeprefix("torch."),
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "statistics": f"{self.statistics.layers[variant.layers[-1]].tokens} tokens",
            "sentences": len(self.sentences),
            "torch": torch.__version__,
        }


def single(bench: Bench) -> None:
    """Every edit alone: figures of all, first-token requests apart."""
    bench.find(len(bench.edits))
    places = range(len(bench.edits))
    for variant in bench.variants:
        solved = bench.solved_for(variant, places, jointly=False)
        flow = bench.flow(variant)
        if variant.rounds > 1:
            solved = [each for i in places for each in bench.found_again(flow, variant, range(i, i + 1), [solved[i]])]
        start = time.process_time()
        made = flow.close_each(bench.requests, solved)
        seconds = time.process_time() - start
        deltas = [delta for delta, _ in made]
        asked: dict[str, Any] = {"unseen_contexts": UNSEEN, "answer_tokens": 0, "essence_tokens": 0}
        figures = evaluate(bench.model, bench.tokenizer, bench.edits, deltas=deltas, **asked)
        updates = RowUpdates.of(bench.runner, deltas)
        ratios = [p / bench.base for p in edited_perplexities(bench.runner, bench.tokenizer, bench.sentences, updates)]
        for name, some in (("first token", range(bench.first)), ("other", range(bench.first, len(bench.edits)))):
            if not some:
                continue
            chosen = [figures[i] for i in some]

            def mean(field: str, chosen: Sequence[Any] = chosen) -> float:
                values = [float(v) for v in (getattr(each, field) for each in chosen) if v is not None]
                return round(sum(values) / len(values), 4) if values else float("nan")

            own = [ratios[i] for i in some]
            row = {
                "requests": name,
                "count": len(chosen),
                "probability": mean("probability"),
                "argmax": mean("argmax"),
                "probability_unseen": mean("probability_unseen"),
                "argmax_unseen": mean("argmax_unseen"),
                "paraphrase": mean("paraphrase"),
                "neighborhood": mean("neighborhood"),
                "perplexity_mean": round(sum(own) / len(own), 4),
                "perplexity_largest": round(max(own), 4),
                "needs_prefix": sum(made[i][1].needs_prefix for i in some),
                "update_ratio_largest": round(max(max(made[i][1].update_ratios) for i in some), 4),
                "closing_seconds": round(seconds, 1),
            }
            write(SINGLE, row | bench.conditions(variant, 1))


def joint(bench: Bench, counts: Sequence[int]) -> None:
    """More and more edits at once; of first-token requests none, which are another matter."""
    for count in counts:
        bench.find(bench.first + count)
        places = range(bench.first, bench.first + count)
        edits = [bench.edits[i] for i in places]
        for variant in bench.variants:
            done = [(r["model"], r["variant"], int(r["edits"])) for r in rows(JOINT)]
            if (bench.name, variant.text, count) in done:
                continue
            flow = bench.flow(variant)
            solved = bench.found_again(flow, variant, places, bench.solved_for(variant, places))
            start = time.process_time()
            closed = flow.closing.close(solved, flow.search)
            delta = flow.closing.delta(closed)
            seconds = time.process_time() - start
            sample = edits[:: max(1, len(edits) // EVALUATED)][:EVALUATED]
            figures = measured(bench, delta, sample)
            norms = [f.joint_norm / closed.weight_norms[layer] for layer, f in closed.factors.items()]
            row = {
                "edits": count,
                **figures,
                "update_ratios": " ".join(f"{norm:.2f}" for norm in norms),
                "missed": round(sum(closed.missed) / len(closed.missed), 3),
                "closing_seconds": round(seconds, 1),
            }
            write(JOINT, row | bench.conditions(variant, count) | {"evaluated": len(sample)})


def subjects(bench: Bench, edits: Sequence[Edit]) -> None:
    """All edits of subjects that have several, jointly: a value for each, one for each subject, and the first ones."""
    groups = [[edits[i] for i in places] for places in by_subject(edits)]
    cases = [cases_of(bench.runner, bench.tokenizer, some, len(some)) for some in groups if len(some) > 1]
    chosen = [[case.edit for case in some] for some in cases if not any(case.first_token for case in some)]
    dual = Variant("dual", method_named("dual"), bench.layers)
    for name, merges, some in (
        ("a value for each", False, [edit for group in chosen for edit in group]),
        ("one for each subject", True, [edit for group in chosen for edit in group]),
        ("the first of each", True, [group[0] for group in chosen]),
    ):
        variant = replace(dual, text=name, method=replace(dual.method, merges=merges))
        flow = bench.flow(variant)
        requests = [tokenise(bench.runner, bench.tokenizer, edit, bench.contexts, variant.method) for edit in some]
        start = time.process_time()
        solved = flow.find(requests)
        seconds = time.process_time() - start
        closed = flow.closing.close(solved, flow.search)
        row = {
            "values": name,
            "edits": len(some),
            "subjects": len(chosen),
            **measured(bench, flow.closing.delta(closed), some),
        }
        row |= {"missed": round(sum(closed.missed) / len(closed.missed), 3), "search_seconds": round(seconds, 1)}
        write(SUBJECTS, row | bench.conditions(variant, len(some)))


def measured(bench: Bench, delta: Delta, edits: Sequence[Edit]) -> dict[str, float]:
    """Figures of some edits with an update in the model, and of the model."""
    delta.apply(bench.model)
    found = means(bench, edits) | reading(bench)
    delta.revert(bench.model)
    return found


def means(bench: Bench, edits: Sequence[Edit]) -> dict[str, float]:
    """Of the metrics of some edits, as the model is now."""
    figures = evaluate(bench.model, bench.tokenizer, edits, unseen_contexts=UNSEEN, answer_tokens=0, essence_tokens=0)
    found = {}
    for name in ("efficacy", "argmax", "probability", "argmax_unseen", "paraphrase", "neighborhood"):
        values = [float(v) for v in (getattr(each, name) for each in figures) if v is not None]
        found[name] = round(sum(values) / len(values), 4)
    return found


def reading(bench: Bench) -> dict[str, float]:
    """How well the model reads now, beside how it did before."""
    perplexity = sentence_perplexity(bench.runner, bench.tokenizer, bench.sentences)
    return {
        "perplexity_ratio": round(perplexity / bench.base, 4),
        "context_nll_rise": round(bench.context_nll() - bench.nll, 4),
    }


def write(file: Path, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = rows(JOINT)
    panels = (
        ("argmax", "target is the answer, bare"),
        ("argmax_unseen", "the same behind unseen text"),
        ("paraphrase", "paraphrase"),
        ("neighborhood", "neighbourhood"),
        ("perplexity_ratio", "perplexity, of that before"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.6))
    for panel, (field, title) in zip(axes, panels, strict=True):
        for variant in dict.fromkeys(point["variant"] for point in points):
            own = sorted((int(p["edits"]), float(p[field])) for p in points if p["variant"] == variant)
            panel.plot(*zip(*own, strict=True), marker="o", markersize=4, label=variant)
        panel.set_xscale("log")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("edits")
        panel.spines[["top", "right"]].set_visible(False)
        if field == "perplexity_ratio":
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, 1.03)
    axes[0].legend(frameon=False, fontsize=8)
    layers = " or ".join(dict.fromkeys(point["layers"] for point in points))
    one = points[0]
    conditions = f"{one['model']}, {one['dtype']}, {one['device']}, C of {one['statistics']}, layers {layers}"
    figure.text(0.995, 0.005, conditions, ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(FIGURE, dpi=130)


def one_each(edits: Sequence[Edit]) -> list[Edit]:
    """Requests that say one thing each: of those for one prompt and subject, the first."""
    found: dict[tuple[str, str], Edit] = {}
    for edit in edits:
        found.setdefault((edit.prompt, edit.subject), edit)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["c-rome", "dual@9", "dual"])
    parser.add_argument("--joint", type=int, nargs="+", help="numbers of edits made jointly (default: each alone)")
    parser.add_argument("--subjects", action="store_true", help="edits of subjects that have several")
    parser.add_argument("--sentences", type=Path, help="for perplexity, one a line (default: 50 of Wikipedia)")
    parser.add_argument("--normal", type=int, help="requests, evenly spaced, that are no first-token cases")
    parser.add_argument("--work", type=Path, required=True, help="folder for values and statistics")
    parser.add_argument("--model", type=Path, help="folder of a model (default: the demo's)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    normal = arguments.normal or max(arguments.joint or [100])
    folder = arguments.work / f"{arguments.edits.stem}-{normal}"
    source = arguments.model or model_dir(print)
    bench = Bench(source, folder, arguments.edits, normal, arguments.variants, arguments.sentences)
    if arguments.subjects:
        subjects(bench, one_each(load_edits(arguments.edits)))
    elif arguments.joint:
        joint(bench, arguments.joint)
        plot()
    else:
        single(bench)


if __name__ == "__main__":
    main()
