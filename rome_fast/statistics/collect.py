"""Second moments of the keys of several layers in one pass over a corpus."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError, StatisticsError
from ..fingerprint import Fingerprint
from ..kernels import mirror_lower_, second_moment_
from ..runner import Runner, evaluating, watching
from .layer import LayerStatistics
from .processes import Processes
from .reading import Reading, Rows, made_ahead, other_texts
from .snapshots import Snapshots, Sums
from .store import Statistics

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens wanted)."""

TOKENS_PER_DIMENSION = 10

# A GPU wants many tokens per launch; in a CPU's caches a few thousand keys are enough.
_BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}


def collect_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Any],
    layers: Sequence[int],
    tokens: int | None = None,
    max_length: int = 128,
    progress: Progress | None = None,
    *,
    field: str = "text",
    out: str | Path | None = None,
    distributed: bool = False,
) -> Statistics:
    """Second moments of the down-projection's inputs over the first `tokens` tokens of `texts`, in one pass.

    `texts` are strings, or mappings with a string in `field` (a data set); 10 tokens per dimension of the keys are
    read unless told otherwise. Each text is tokenised whole (by the megabyte) and cut into rows of at most `max_length`
    tokens; short rows, like those of ordinary use, give first tokens, whose keys are of their own kind, their weight
    in C. Layers above the last wanted one are not run. Products are taken in fp32 (fp64 for an fp64 model) and summed
    in fp64.

    With `out`, a folder, the result is saved there, and until then a snapshot every few seconds: the same call goes on
    after it was interrupted, with the same result to the bit. With `distributed`, the processes of torch.distributed
    share the work; all of them give the same texts and get the whole result, and the first one saves it.

    Raises ArgumentError for a layer out of range, a budget below one token or texts that are not strings,
    StatisticsError for texts without a token, keys that are not finite, other texts than the interrupted call's or
    another process that died, CheckpointError where nothing can be written.
    """
    runner = Runner(model)
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(runner.layers):
        raise ArgumentError(f"layers: got {list(layers)}, wanted some of 0 .. {len(runner.layers) - 1}")
    if isinstance(texts, str):
        raise ArgumentError("texts: got str, wanted an iterable of texts; put a single one into a list, a file's name "
                            "into rome_fast.statistics.Corpus.open")  # fmt: skip
    if isinstance(texts, Mapping):
        raise ArgumentError(f"texts: got a mapping of {', '.join(map(str, texts))}; choose one of them, as in texts[…]")
    budget = TOKENS_PER_DIMENSION * runner.weight(wanted[-1]).shape[1] if tokens is None else tokens
    if budget < 1 or max_length < 1:
        raise ArgumentError(f"tokens, max_length: got {budget}, {max_length}, wanted at least 1")
    processes = Processes.of_default_group() if distributed else Processes()
    batch_tokens = _BATCH_TOKENS.get(runner.device.type, _BATCH_TOKENS["cpu"])
    reading = Reading(tokenizer, texts, field, budget, min(max_length, runner.max_length), batch_tokens)

    fingerprints = {layer: Fingerprint.of(runner, layer) for layer in wanted}
    about = {
        "max_length": str(reading.length),
        "dtype": str(runner.dtype).removeprefix("torch."),
    }
    run = {
        **about,
        "tokens": budget,
        "batch_tokens": batch_tokens,
        "vocabulary": len(tokenizer),
        "layers": {layer: str(fingerprint) for layer, fingerprint in fingerprints.items()},
    }
    snapshots = None if out is None else Snapshots(Path(out), run, processes.rank, processes.count)
    totals = {}
    for layer in wanted:
        width = runner.weight(layer).shape[1]
        totals[layer] = torch.zeros(width, width, dtype=torch.float64, device=runner.device)
    sums = (snapshots.latest(totals) if snapshots else None) or Sums(totals)
    try:
        with evaluating(model):
            _sum_up(runner, reading, sums, processes, snapshots, progress)
        counted = torch.tensor(sums.tokens, device=runner.device)
        processes.add_up_([*sums.totals.values(), counted])
        seen = int(counted)
        about |= {"corpus_sha256": reading.corpus.hexdigest(), "torch": torch.__version__}
        entries = []
        for layer, total in sums.totals.items():
            moment = (mirror_lower_(total) / seen).float().cpu()
            _check_finite(layer, moment)
            entries.append(LayerStatistics(layer, moment, seen, fingerprints[layer], dict(about)))
        statistics = Statistics(entries)
        if out is not None and processes.rank == 0:
            statistics.save(out)
        # Before that, a failure may still need the snapshots of all.
        processes.wait()
        if snapshots:
            snapshots.remove()
        return statistics
    finally:
        if snapshots:
            snapshots.release()


@torch.no_grad()
def _sum_up(
    runner: Runner,
    reading: Reading,
    sums: Sums,
    processes: Processes,
    snapshots: Snapshots | None,
    progress: Progress | None,
) -> None:
    """Add this process's batches to the sums, from where they stand to the end."""
    passed = sums.start.tokens
    with made_ahead(reading.windows(sums.start)) as windows:
        for window in windows:
            if sums.batches > window.start.batches and sums.rows != window.digest:
                raise other_texts()
            sums.start, sums.rows = window.start, window.digest
            for number, batch in enumerate(window.batches(reading.batch_tokens), window.start.batches):
                passed += sum(map(len, batch))
                if number < sums.batches:
                    continue
                if processes.takes(number):
                    _add_batch(runner, batch, sums.totals)
                    sums.tokens += sum(map(len, batch))
                sums.batches = number + 1
                if progress is not None and processes.takes(number):
                    progress(passed, reading.tokens)
                if snapshots and snapshots.due():
                    _save(snapshots, sums)
    # The other processes' work is lost to a result, should this one die now: it waits for them.
    if snapshots and processes.count > 1:
        _save(snapshots, sums)


def _add_batch(runner: Runner, batch: Rows, totals: Mapping[int, Tensor]) -> None:
    rows = runner.pack(batch)
    # A mask costs a copy of the keys; rows of one length need none.
    kept = None if len(batch[0]) == len(batch[-1]) else rows.mask.reshape(-1)
    with ExitStack() as stack:
        for layer, total in totals.items():

            def see(keys: Tensor, _output: Tensor, total: Tensor = total) -> None:
                second_moment_(total, keys.reshape(-1, keys.shape[-1]), kept)

            stack.enter_context(watching(runner.projection(layer), see))
        runner.run(runner.embed(rows.ids), 0, max(totals) + 1)


def _save(snapshots: Snapshots, sums: Sums) -> None:
    for layer, total in sums.totals.items():
        # Σ k² is not finite where any key is not; better now than after hours.
        _check_finite(layer, total.diagonal())
    snapshots.save(sums)


def _check_finite(layer: int, moment: Tensor) -> None:
    if not bool(torch.isfinite(moment).all()):
        raise StatisticsError(f"model: keys of layer {layer} contain NaN or infinity; check its weights")
