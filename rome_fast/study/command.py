"""What the arguments of `rome-fast study` mean, and the run itself."""

import argparse
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import assets, demo
from ..bench.command import processor
from ..closing.geometry import Geometries
from ..editor import checked_layer
from ..edits import EditsFileWarning, load_edits
from ..errors import ArgumentError
from ..evaluation import sentence_perplexity
from ..methods import method_named
from ..models.batches import free_memory
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner
from ..models.verification import shared_out
from ..opening import checkpoints
from ..opening.defaults import default_layers, default_settings
from ..report.study import write_report
from ..runs.processes import own_device
from ..runs.texts import read_sentences
from ..runs.workers import Turns, helped
from ..search.contexts import sample_contexts
from ..statistics import Statistics, first_token_statistics
from .cases import Case, cases_of, leading_tokens
from .measure import COLLAPSE_RATIO, Study
from .parts import Folder

_UNSEEN_SEED = 1  # the editing contexts have 0
_SENTENCES = 20
_METHODS = ("rome", "c-rome-released", "c-rome", "p-rome", "dual")  # the paper's, and what edits are made by here
# Of a process: its weights, what of them is converted or in use twice, and working memory.
_WEIGHTS, _REST_BYTES = 2, 2 << 30

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """A study that can begin or go on."""

    study: Study
    groups: Sequence[Sequence[Case]]  # a part each
    place: Folder
    statistics: Statistics
    folder: Path | None  # of the statistics
    processes: int

    def missing(self) -> list[int]:
        return [index for index in range(len(self.groups)) if not self.place.has(index)]

    def measure(self, take: Callable[[], int], advance: Advance) -> None:
        """Measure the parts that `take` names until it names none, but for those that are there."""
        total = sum(len(group) for group in self.groups)
        while (index := take()) < len(self.groups):
            if not self.place.has(index):
                self.place.add(index, self.study.measure(self.groups[index]))
            missing = self.missing()
            advance(total - sum(len(self.groups[i]) for i in missing), total)


def run_study(arguments: argparse.Namespace, advance: Advance, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a study or go on with it, write its report, and store the guard's limit with the statistics."""
    for name in ("batch", "processes", "threads"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ArgumentError(f"{name}: got {given}, wanted at least 1")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ArgumentError(f"out: {arguments.out} is a file, wanted a folder, which may be new")
    job = _prepare(arguments, say)
    study, place, turns = job.study, job.place, Turns()
    processes = max(1, min(job.processes, len(job.missing())))
    # Not chosen anew in each: there is less free memory by then, and threads have a part in the last digit.
    chosen = {"processes": job.processes, "threads": torch.get_num_threads()}
    alike = argparse.Namespace(**vars(arguments) | chosen)
    with helped(processes - 1, _help, alike, turns) as failed:
        job.measure(turns, advance)
    if failed:
        say(f"processes ended with status {', '.join(map(str, failed))}; what they had begun is measured here")
    job.measure(itertools.count().__next__, advance)
    more = {
        "perplexity_before": study.base,
        "device": str(study.model.device),
        "processor": processor(study.model.device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": checkpoints.versions(),
    }
    records = place.write(study.key_norms(), more)
    guard = place.guard()
    if job.folder and guard["threshold"] is not None:
        job.statistics.layers[study.layer].collapse_limit = guard["threshold"]
        job.statistics.save(job.folder)
        say(f"the guard's limit ‖Δ‖ / ‖W‖ = {guard['threshold']:.3g} is stored with the statistics in {job.folder}")
    for file in write_report(arguments.out):
        say(f"wrote {file}")
    return {**place.conditions, **more, "guard": guard, "edits": records}


def _help(arguments: argparse.Namespace, take: Callable[[], int]) -> None:
    """In a process of its own: measure parts, as long as there are any."""
    with warnings.catch_warnings():
        # The first process has said it.
        warnings.simplefilter("ignore", EditsFileWarning)
        job = _prepare(arguments, lambda line: None)
    job.measure(take, lambda done, total: None)


def _prepare(arguments: argparse.Namespace, say: Callable[[str], None]) -> _Job:
    """Everything up to the first part, the same in every process of a study."""
    methods = list(dict.fromkeys(arguments.methods or _METHODS))
    how = [method_named(name) for name in methods]
    edits = load_edits(arguments.edits, arguments.on_error, arguments.duplicates)
    own = arguments.model is None
    model, tokenizer, directory = checkpoints.load(
        assets.model_dir(say) if own else arguments.model,
        device=own_device(arguments.device),
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )
    runner = Runner(model)
    processes = arguments.processes or _fitting_processes(model)
    torch.set_num_threads(arguments.threads or max(1, _cores() // processes))
    layer = checked_layer(runner, arguments.layer)
    fingerprint = Fingerprint.of(runner, layer)
    spread: tuple[int, ...] = (layer,)
    if arguments.layer is None and any(method.spread for method in how):
        spread = shared_out(runner, runner.decoder.sites_of(default_layers(model.config, True)))
    layers = tuple(sorted({layer, *spread}))
    folder = arguments.statistics or (demo.statistics_dir(say) if own and arguments.layer is None else None)
    statistics = Statistics.load(folder) if folder else Statistics.cached(runner, layers)
    entry = statistics.for_layer(runner, layer)
    cases = cases_of(runner, tokenizer, edits, arguments.sample)
    if not cases:
        raise ArgumentError(f"sample: got {arguments.sample}, which leaves no request to study")
    sentences = read_sentences(arguments.sentences) if arguments.sentences else demo.held_out_sentences(_SENTENCES)
    contexts = sample_contexts(model, tokenizer)
    unseen = sample_contexts(model, tokenizer, seed=_UNSEEN_SEED)
    unseen = tuple(context for context in unseen if context not in contexts)
    leading = leading_tokens(tokenizer)
    conditions = {
        "model": directory.name,
        "fingerprint": str(fingerprint),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layer": layer,
        "spread": list(spread),
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
    geometries = Geometries(runner, layers, statistics)
    if any(method.bare for method in how):
        geometries.first_tokens = first_token_statistics(runner, layers)
    study = Study(
        model,
        tokenizer,
        layer,
        spread,
        # What is predicted does not depend on a limit that an earlier study has found.
        {layer: replace(geometry, limit=None) for layer, geometry in geometries.items()},
        default_settings(model.config),
        methods,
        contexts,
        unseen,
        sentences,
        sentence_perplexity(runner, tokenizer, sentences),
    )
    groups = [cases[start : start + arguments.batch] for start in range(0, len(cases), arguments.batch)]
    return _Job(study, groups, place, statistics, folder, processes)


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fitting_processes(model: PreTrainedModel) -> int:
    """One on a GPU, which a single process fills; on a CPU one a core, as far as the memory goes.

    Products of small models gain little from a second thread: two processes of one thread measure twice as much.
    """
    if model.device.type != "cpu":
        return 1
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(1, min(_cores(), free_memory(torch.device("cpu")) // (_WEIGHTS * weights + _REST_BYTES)))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _meaning(leading: int) -> str:
    if not leading:
        return "the subject's last token is the prompt's first token, at position 0, where attention sinks"
    return (
        f"the subject's last token is the first behind the {leading} token(s) that this tokenizer puts before every "
        "text; position 0, where attention sinks, is taken by those, so that these requests need not collapse"
    )
