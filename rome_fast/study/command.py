"""What the arguments of `rome-fast study` mean, and the run itself."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from .. import assets, checkpoints, demo
from ..bench.command import processor
from ..contexts import sample_contexts
from ..defaults import default_layer, default_settings
from ..edits import load_edits
from ..errors import ArgumentError
from ..evaluation import sentence_perplexity
from ..fingerprint import Fingerprint
from ..methods import hold_first_tokens, variant
from ..report.study import write_report
from ..runner import Runner
from ..statistics import Statistics, first_token_statistics
from .cases import cases_of, leading_tokens
from .measure import COLLAPSE_RATIO, Study
from .parts import Folder

_UNSEEN_SEED = 1  # the editing contexts have 0
_SENTENCES = 20
_PAPER_METHODS = ("rome", "c-rome-released", "c-rome", "p-rome")

Advance = Callable[[int, int], None]


def run_study(arguments: argparse.Namespace, advance: Advance, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a study or go on with it, write its report, and store the guard's limit with the statistics."""
    if arguments.batch < 1:
        raise ArgumentError(f"batch: got {arguments.batch}, wanted at least 1")
    methods = list(dict.fromkeys(arguments.methods or _PAPER_METHODS))
    for name in methods:
        variant(name)
    edits = load_edits(arguments.edits)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    own = arguments.model is None
    model, tokenizer, directory = checkpoints.load(assets.model_dir(say) if own else arguments.model)
    runner = Runner(model)
    layer = default_layer(model.config) if arguments.layer is None else arguments.layer
    fingerprint = Fingerprint.of(runner, layer)
    folder = arguments.statistics or (demo.statistics_dir(say) if own and arguments.layer is None else None)
    statistics = Statistics.load(folder) if folder else Statistics.cached(runner, layer)
    entry = statistics.for_layer(runner, layer)
    cases = cases_of(runner, tokenizer, edits, arguments.sample)
    if not cases:
        raise ArgumentError(f"sample: got {arguments.sample}, which leaves no request to study")
    if arguments.sentences:
        text = arguments.sentences.read_text(encoding="utf-8")
        sentences = [s for s in text.splitlines() if s.strip()]
    else:
        sentences = demo.held_out_sentences(_SENTENCES)
    contexts = sample_contexts(model, tokenizer)
    unseen = sample_contexts(model, tokenizer, seed=_UNSEEN_SEED)
    unseen = tuple(context for context in unseen if context not in contexts)
    leading = leading_tokens(tokenizer)
    conditions = {
        "model": directory.name,
        "fingerprint": str(fingerprint),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layer": layer,
        "methods": methods,
        "statistics": f"second moment of {entry.tokens} tokens",
        "settings": asdict(default_settings(model.config)),
        "requests": len(cases),
        "first_token": sum(case.first_token for case in cases),
        "edits_sha256": _hash(*(f"{c.edit.prompt}\0{c.edit.subject}\0{c.edit.target}" for c in cases)),
        "contexts": len(contexts),
        "unseen_contexts": len(unseen),
        "contexts_sha256": _hash(*contexts, *unseen),
        "sentences": len(sentences),
        "sentences_sha256": _hash(*sentences),
        "batch": arguments.batch,
        "collapse_ratio": COLLAPSE_RATIO,
        "tokens_before_every_text": leading,
        "first_token_means": _meaning(leading),
    }
    place = Folder(arguments.out, conditions)
    factor, held = entry.factor(runner.device), None
    if any(variant(name).bare for name in methods):
        held = hold_first_tokens(factor, first_token_statistics(runner, layer).moment.to(runner.device))
    study = Study(
        model,
        tokenizer,
        layer,
        factor,
        held,
        default_settings(model.config),
        methods,
        contexts,
        unseen,
        sentences,
        sentence_perplexity(runner, tokenizer, sentences),
    )
    done = 0
    for index, start in enumerate(range(0, len(cases), arguments.batch)):
        group = cases[start : start + arguments.batch]
        if not place.has(index):
            place.add(index, study.measure(group))
        done += len(group)
        advance(done, len(cases))
    more = {
        "perplexity_before": study.base,
        "device": str(runner.device),
        "processor": processor(runner.device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": checkpoints.versions(),
    }
    records = place.write(study.key_norms(), more)
    guard = place.guard()
    if folder and guard["threshold"] is not None:
        entry.collapse_limit = guard["threshold"]
        statistics.save(folder)
        say(f"the guard's limit ‖Δ‖ / ‖W‖ = {guard['threshold']:.3g} is stored with the statistics in {folder}")
    for file in write_report(arguments.out):
        say(f"wrote {file}")
    return {**conditions, **more, "guard": guard, "edits": records}


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _meaning(leading: int) -> str:
    if not leading:
        return "the subject's last token is the prompt's first token, at position 0, where attention sinks"
    return (
        f"the subject's last token is the first behind the {leading} token(s) that this tokenizer puts before every "
        "text; position 0, where attention sinks, is taken by those, so that these requests need not collapse"
    )
