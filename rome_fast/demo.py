"""The demo: a fact changed in a real model, ROME wrecking that model on a first-token subject, the others not doing so.

`dual` is what apply_edits does by default: spread over layers, with a key of its own for the prompt alone.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .assets import demo_texts, made_once, model_dir
from .editor import apply_edits
from .edits import Edit
from .errors import ArgumentError
from .evaluation import greedy_completion, sentence_perplexity
from .methods import DEFAULT_METHOD
from .models.runner import Runner
from .opening import checkpoints
from .opening.defaults import default_layers
from .report import edit_table
from .result import EditResult
from .runs.processes import own_device
from .runs.terminal import say as say_line
from .runs.terminal import show
from .search.contexts import sample_contexts
from .statistics import Statistics, collect_statistics

__all__ = ["model_dir", "run_demo", "statistics_dir"]

_TOKENS = 60_000  # 39 per dimension of SmolLM2's keys
_HELD_OUT = 10  # articles that the statistics do not see; the perplexity sentences come from them
_SENTENCES = 60
_METHODS = ("rome", "c-rome", "dual")
# A perplexity this many times the original one counts as collapse.
_COLLAPSE_FACTOR = 1.5

_REQUESTS = (
    Edit("The mother tongue of {} is", "Danielle Darrieux", "English"),
    Edit("{} is a twin city of", "Chicago", "Istanbul"),
    Edit("{}, which is located in", "Bay", "Italy"),
)
_WRITES = "The history of science is"


def _quiet(message: str) -> None:
    """The default `say`: silence."""


def statistics_dir(say: Callable[[str], None] = _quiet) -> Path:
    """Folder with the statistics of the demo's model at its edit layers; made on the first call (about a minute)."""
    return made_once("SmolLM2-135M-Instruct-statistics-3", _make_statistics, say)


def held_out_sentences(count: int = _SENTENCES) -> list[str]:
    """Sentences of 12 to 40 words from articles that the demo's statistics did not see."""
    text = "\n".join(demo_texts()[-_HELD_OUT:])
    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text)]
    sentences = [s for s in sentences if 12 <= len(s.split()) <= 40 and s[0].isupper() and "\n" not in s]
    return sentences[:: max(1, len(sentences) // count)][:count]


def run_demo(out: Path, device: str | None = None) -> dict[str, Any]:
    """Run the demo, print its table and write report.json, collapse.png and edited/ to `out`; returns the report.

    It runs on `device`, by default on a GPU where torch finds one.
    """
    from .report.figures import collapse_figure

    device = str(checkpoints.checked_device(own_device(device)))
    if out.exists() and not _is_ours(out):
        raise ArgumentError(f"out: {out} exists and is not an earlier demo's; choose another folder with --out")
    start = time.perf_counter()

    def say(message: str) -> None:
        say_line(f"{time.perf_counter() - start:6.1f} s  {message}")

    say("model: SmolLM2-135M-Instruct, a real pretrained model, made once from a public package")
    directory = model_dir(say)
    statistics = Statistics.load(statistics_dir(say))
    model, tokenizer, _ = checkpoints.load(directory, device=device)
    runner, layers = Runner(model), default_layers(model.config, spread=True)
    say("sampling 20 prefix contexts with the model itself")
    contexts = sample_contexts(model, tokenizer)
    sentences = held_out_sentences()
    say(f"perplexity of the unedited model on {len(sentences)} sentences of Wikipedia")
    base = sentence_perplexity(runner, tokenizer, sentences)

    records, texts = [], {"unedited": _continue(runner, tokenizer)}
    kept: EditResult | None = None
    for request in _REQUESTS:
        for method in _METHODS:
            say(f"{method}: {request.text} → {request.target}")
            result = apply_edits(
                model,
                request,
                tokenizer=tokenizer,
                statistics=statistics,
                method=method,
                contexts=contexts,
                guard="off",
            )
            record = result.records[0]
            record.perplexity_before = base
            record.perplexity_after = sentence_perplexity(runner, tokenizer, sentences)
            record.collapsed = not record.perplexity_after < _COLLAPSE_FACTOR * base
            records.append(record)
            if request is _REQUESTS[1]:
                texts[method] = _continue(runner, tokenizer)
            result.revert()
            if request is _REQUESTS[1] and method == DEFAULT_METHOD:
                kept = result
    assert kept is not None  # for the type checker: the loop above sets it

    out.mkdir(parents=True, exist_ok=True)
    _write_edited(out / "edited", directory, model, kept)
    say(f"wrote the edited checkpoint: {out / 'edited'}")
    place = "CPU" if runner.device.type == "cpu" else "GPU"
    conditions = (
        f"SmolLM2-135M-Instruct, float32, {place}, layer {layers[-1]}, dual spread over {layers[0]} to {layers[-1]}, "
        f"C from {_TOKENS} Wikipedia tokens, {len(contexts)} contexts; one edit at a time"
    )
    report: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "method": list(_METHODS),
        "layer": layers[-1],
        "layers": list(layers),
        "schedule": "one edit at a time, each on the unedited model",
        "edits": [record.to_json() for record in records],
        "perplexity_before": base,
        "perplexity_after": max(r.perplexity_after or 0.0 for r in records),
        "continuations": {"prompt": _WRITES, "edited_with": _REQUESTS[1].text, **texts},
        "contexts": list(contexts),
        "conditions": conditions,
        "seconds": {"all": round(time.perf_counter() - start, 1)},
        "threads": torch.get_num_threads(),
        "versions": checkpoints.versions(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    collapse_figure(records, base, conditions, out / "collapse.png")
    show(edit_table(records))
    say_line(f"\nAfter the edit “{_REQUESTS[1].text} → {_REQUESTS[1].target}”, the model continues “{_WRITES}”:")
    for name, text in texts.items():
        say_line(f"  {name:16} {text!r}")
    say_line(
        f"\n{conditions}\nreport: {out / 'report.json'}   figure: {out / 'collapse.png'}   model: {out / 'edited'}"
    )
    return report


def _make_statistics(work: Path, say: Callable[[str], None]) -> Path:
    directory = model_dir(say)
    texts = demo_texts(say)[:-_HELD_OUT]
    model, tokenizer, _ = checkpoints.load(directory)
    say(f"statistics: second moments of keys over {_TOKENS} tokens of Wikipedia (once, about a minute)")
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done * 4 // total > told:
            told = done * 4 // total
            say(f"statistics: {done} of {total} tokens")

    layers = default_layers(model.config, spread=True)
    statistics = collect_statistics(model, tokenizer, texts, layers, _TOKENS, progress=progress)
    statistics.save(work / "done")
    return work / "done"


def _continue(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> str:
    return greedy_completion(runner, tokenizer, [_WRITES], [16])[0]


def _write_edited(out: Path, source: Path, model: PreTrainedModel, result: EditResult) -> None:
    import shutil

    if out.exists():
        shutil.rmtree(out)
    result.delta.apply(model)
    result.save(out, source)


def _is_ours(out: Path) -> bool:
    if not out.is_dir():
        return False
    names: Sequence[str] = [entry.name for entry in out.iterdir()]
    return not names or "report.json" in names
