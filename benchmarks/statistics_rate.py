"""How many tokens a second does collecting second moments do, against a collector written the usual way?

    python benchmarks/statistics_rate.py --tokens 20000 --rounds 3 --threads 1

The usual way (`Usual`, after what the released editors do): documents up to the model's context, padded to the longest
of a batch, an attention mask, a forward pass that stops at the layer, the keys upcast to fp32, a full GEMM into an
fp32 sum, and one pass over the corpus per layer. `--context` gives it shorter rows. Both sides read the same texts and
are measured in turn, process time, in one process; every run appends two rows, for one layer and for five, to
benchmarks/results/statistics_rate.csv. Nothing is printed unless both agree on texts that they cut alike.
"""

import argparse
import csv
import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rome_fast.kernels import second_moment_
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rome_fast import collect_statistics
from rome_fast.assets import demo_texts, model_dir
from rome_fast.models.runner import Runner
from rome_fast.opening import checkpoints
from rome_fast.opening.defaults import default_layer
from rome_fast.statistics import collect

RESULTS = Path(__file__).parent / "results" / "statistics_rate.csv"
ALLOWED = 1e-6  # what `second_moment_` promises of a corpus
_DOCUMENTS = 100  # that the usual way sorts by length together
_CONTEXTS = 3  # times the context: tokens of one of its batches


class Stopped(Exception):
    """Ends a forward pass at the layer whose keys are wanted."""


class Usual:
    """A collector as the released editors have it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self.runner = Runner(model)
        self.accumulating = 0.0

    @torch.no_grad()
    def collect(self, texts: Sequence[str], layer: int, tokens: int) -> Tensor:
        """C (d_ff, d_ff) fp32 of the first `tokens` tokens of the texts."""
        width = self.runner.weight(layer).shape[1]
        total, count = torch.zeros(width, width), 0
        for ids, mask in self._batches(texts, tokens):
            seen: list[Tensor] = []

            def see(keys: Tensor, _output: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(keys)
                raise Stopped

            with self.runner.watching(layer, see), suppress(Stopped):
                self.model(input_ids=ids, attention_mask=mask)
            keys = seen[0][mask.bool()].float()
            begun = time.process_time()
            total += keys.T @ keys
            self.accumulating += time.process_time() - begun
            count += len(keys)
        return total / count

    def _batches(self, texts: Sequence[str], tokens: int) -> list[tuple[Tensor, Tensor]]:
        rows: list[list[int]] = []
        for text in texts:
            if not tokens:
                break
            row = self.tokenizer(text, truncation=True, max_length=self.context)["input_ids"][:tokens]
            tokens -= len(row)
            rows += [row] if row else []
        out = []
        for start in range(0, len(rows), _DOCUMENTS):
            batch: list[list[int]] = []
            for row in [*sorted(rows[start : start + _DOCUMENTS], key=len, reverse=True), []]:
                if batch and (not row or (len(batch) + 1) * len(batch[0]) > _CONTEXTS * self.context):
                    out.append(_padded(batch))
                    batch = []
                batch.append(row)
        return out


def _padded(batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(batch):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids, mask


class Ours:
    """`collect_statistics`, its accumulation timed."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.accumulating = 0.0

        def timed(total: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
            begun = time.process_time()
            second_moment_(total, keys, mask)
            self.accumulating += time.process_time() - begun
            return total

        setattr(collect, "second_moment_", timed)  # noqa: B010 (to the type checker it is not an attribute)

    def collect(self, texts: Sequence[str], layers: Sequence[int], tokens: int) -> dict[int, Tensor]:
        """C (d_ff, d_ff) fp32 of every layer."""
        found = collect_statistics(self.model, self.tokenizer, texts, layers, tokens)
        return {layer: entry.moment for layer, entry in found.layers.items()}


def check(usual: Usual, ours: Ours, texts: Sequence[str], layers: Sequence[int]) -> None:
    """Stop unless both find the same second moments of texts that fit into one row of either."""
    short = [text[:300] for text in texts[:4]]
    found = ours.collect(short, layers, 10_000)
    for layer in (layers[0], layers[-1]):
        wanted = usual.collect(short, layer, 10_000)
        error = float((found[layer] - wanted).norm() / wanted.norm())
        if not error < ALLOWED:
            raise SystemExit(f"layer {layer}: both sides differ by {error:.1e}, wanted less than {ALLOWED:.0e}")


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="of all rounds together (default: 20000)")
    parser.add_argument("--rounds", type=int, default=3, help="parts of the corpus, each measured alone (default: 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="file of finished rounds; the same command goes on behind them")
    parser.add_argument("--context", type=int, help="longest row of the usual way (default: the model's context)")
    parser.add_argument("--layers", type=int, nargs="+", help="default: the edit layer and the four below it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model, tokenizer, directory = checkpoints.load(model_dir(print))
    edit_layer = default_layer(model.config)
    layers = sorted(arguments.layers or range(edit_layer - 4, edit_layer + 1))
    context = arguments.context or Runner(model).max_length
    texts = demo_texts(print)
    usual, ours = Usual(model, tokenizer, context), Ours(model, tokenizer)
    check(usual, ours, texts, layers)
    usual.accumulating = ours.accumulating = 0.0

    tokens = arguments.tokens // arguments.rounds
    share = len(texts) // arguments.rounds
    about = {"tokens": tokens, "layers": layers, "context": context, "threads": arguments.threads}
    rounds: list[dict[str, Any]] = []
    if arguments.keep and arguments.keep.exists():
        rounds = [json.loads(line) for line in arguments.keep.read_text(encoding="utf-8").splitlines()]
        if other := [kept["about"] for kept in rounds if kept["about"] != about]:
            raise SystemExit(f"keep: {arguments.keep} has rounds of {other[0]}, wanted {about}; give another file")
    for part in range(len(rounds), arguments.rounds):
        some = texts[part * share : (part + 1) * share]
        seconds, accumulating = {}, {}
        each = []
        for layer in layers:
            begun = time.process_time()
            usual.collect(some, layer, tokens)
            each.append(time.process_time() - begun)
        seconds["usual 1"], seconds["usual all"] = each[-1], sum(each)
        for name, wanted in (("ours 1", layers[-1:]), ("ours all", layers)):
            ours.accumulating = 0.0
            begun = time.process_time()
            ours.collect(some, wanted, tokens)
            seconds[name] = time.process_time() - begun
            accumulating[name] = ours.accumulating
        rounds.append({"about": about, "seconds": seconds, "accumulating": accumulating})
        if arguments.keep:
            with arguments.keep.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(rounds[-1]) + "\n")
        shown = ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())
        print(f"round {part + 1} of {arguments.rounds}: {shown}", flush=True)

    for count, suffix in ((1, "1"), (len(layers), "all")):
        theirs, own = ([r["seconds"][f"{side} {suffix}"] for r in rounds] for side in ("usual", "ours"))
        append(
            {
                "model": directory.name,
                "device": f"CPU ({platform.machine()})",
                "dtype": str(model.dtype).removeprefix("torch."),
                "threads": arguments.threads,
                "torch": torch.__version__,
                "tokens": tokens * arguments.rounds,
                "rounds": arguments.rounds,
                "layers": " ".join(map(str, layers[-count:])),
                "usual_context": context,
                "usual_tokens_per_s": round(tokens / median(theirs), 1),
                "tokens_per_s": round(tokens / median(own), 1),
                "ratio": round(median(a / b for a, b in zip(theirs, own, strict=True)), 2),
                "accumulation_share": round(sum(r["accumulating"][f"ours {suffix}"] for r in rounds) / sum(own), 3),
            }
        )


def append(row: dict[str, str | int | float]) -> None:
    """Print a row of results and add it to the file."""
    print("  ".join(f"{name} {value}" for name, value in row.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
