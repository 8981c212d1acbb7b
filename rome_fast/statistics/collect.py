"""Second moments of the keys of several layers in one pass over a corpus."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ArgumentError, StatisticsError
from ..kernels import mirror_lower_, second_moment_
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner, evaluating
from ..models.verification import check_model
from ..opening import checkpoints
from ..opening.admission import admit_model, admit_tokenizer, checked_dtype, plain_modes
from ..runs.processes import ALONE, Processes, own_device
from ..weights import align_
from ..weights.files import check_writable
from .layer import LayerStatistics, check_ridge
from .provenance import origin_of
from .reading import Reading, Rows, made_ahead, other_texts
from .snapshots import Snapshots, Sums
from .store import (
    Statistics,
    check_replaces,
    kept_limit,
    kept_tokens,
    layer_file,
    likely_layers,
    usual_layers,
)

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens wanted)."""

TOKENS_PER_DIMENSION = 10

RESUME = "run the same command with as many processes again: each of them goes on from its last snapshot"
"""What to do when one of several processes has died."""

# A GPU wants many tokens per launch; in a CPU's caches a few thousand keys are enough.
_BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}


@plain_modes()
def collect_statistics(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Iterable[Any],
    layers: Sequence[int] | None = None,
    tokens: int | None = None,
    max_length: int = 128,
    progress: Progress | None = None,
    *,
    field: str = "text",
    out: str | Path | None = None,
    distributed: bool = False,
    memory: int | str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Statistics:
    """Second moments of the down-projection's inputs over the first `tokens` tokens of `texts`, in one pass.

    Of the given layers, or of those that an edit of this model takes by default.

    `model` may be the directory or hub id of a checkpoint, whose tokenizer is taken where None is given. It runs on
    `device` (by default a GPU where torch finds one), in `dtype` (by default as stored), under a budget of `memory`
    (bytes or "8GiB"; by default what is free): what does not fit is read layer by layer, each layer once for as many
    tokens as the budget has room for, with the same result to the bit.

    `texts` are strings, or mappings with a string in `field` (a data set); 10 tokens per dimension of the keys are
    read unless told otherwise. Each text is tokenised whole (by the megabyte) and cut into rows of at most `max_length`
    tokens, each of which begins with the special tokens, as BOS, that the text begins with; short rows, like those of
    ordinary use, give first tokens, whose keys are of their own kind, their weight in C. Layers above the last wanted
    one are not run. Products are taken in fp32 (fp64 for an fp64 model) and summed in fp64.

    With `out`, a folder, the result is saved there, and until then a snapshot every few seconds: the same call goes on
    after it was interrupted, with the same result to the bit. With `distributed`, the processes of torch.distributed
    share the work; all of them give the same texts and get the whole result, and the first one saves it.

    Raises ArgumentError for a layer out of range, a budget below one token, texts that are not strings, texts that
    are not the same in all processes, or statistics of more tokens in `out` that these would replace; StatisticsError
    for texts without a token, keys that are not finite or other texts than the interrupted call's; DistributedError
    for another process that died; CheckpointError where nothing can be written.
    """
    if isinstance(model, str | Path):
        opened: Any = opened_for(
            model, layers, memory=memory, device=own_device(device), dtype=dtype, trust_remote_code=trust_remote_code
        )
    else:
        admit_model(model, or_path=True)
        admit_tokenizer(tokenizer, offsets=False)
        if memory is not None:
            raise ArgumentError("memory: got a budget for a model that is in memory already; give its checkpoint")
        align_(model)
        opened = nullcontext((Runner(model), tokenizer))
    with opened as (runner, own):
        return collect(
            runner,
            own if tokenizer is None else tokenizer,
            texts,
            usual_layers(runner) if layers is None else layers,
            tokens,
            max_length,
            progress,
            field=field,
            out=out,
            distributed=distributed,
        )


@contextmanager
def opened_for(
    source: str | Path,
    layers: Sequence[int] | None = None,
    *,
    memory: int | str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Iterator[tuple[Runner, PreTrainedTokenizerBase]]:
    """A checkpoint ready to collect statistics of these layers (None: the usual ones); see `collect_statistics`."""
    outline = checkpoints.outline(
        source,
        memory=memory,
        layer=sorted(set(layers)) if layers else partial(likely_layers, statistics=None, spread=True),
        device=device,
        collecting=True,
        dtype=checked_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    tokenizer = checkpoints.load_tokenizer(outline.directory, trust_remote_code=trust_remote_code)
    if outline.placement is None:
        model = checkpoints.load_model(
            outline.directory, device=device, dtype=checked_dtype(dtype), trust_remote_code=trust_remote_code
        )
        align_(model)
        yield Runner(model), tokenizer
        return
    with closing(outline.stream()) as stream:
        yield Runner(stream.model, stream), tokenizer


def collect(
    runner: Runner,
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
    ridge: float = 0.0,
    resumed: Progress | None = None,
) -> Statistics:
    """`collect_statistics` of a model wherever its weights are, with a ridge to solve with.

    `resumed` is called with (tokens done, tokens wanted) where an interrupted run goes on.
    """
    check_model(runner)
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(runner.layers):
        raise ArgumentError(f"layers: got {list(layers)}, wanted some of 0 .. {len(runner.layers) - 1}")
    if isinstance(texts, str):
        raise ArgumentError("texts: got str, wanted an iterable of texts; put a single one into a list, a file's name "
                            "into rome_fast.statistics.Corpus.open")  # fmt: skip
    if isinstance(texts, Mapping):
        raise ArgumentError(f"texts: got a mapping of {', '.join(map(str, texts))}; choose one of them, as in texts[…]")
    budget = TOKENS_PER_DIMENSION * runner.weight(wanted[-1]).shape[1] if tokens is None else tokens
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in (budget, max_length)):
        raise ArgumentError(f"tokens, max_length: got {budget}, {max_length}, wanted whole numbers of at least 1")
    check_ridge(ridge)
    processes = Processes.of_default_group(RESUME) if distributed else ALONE
    batch_tokens = _BATCH_TOKENS.get(runner.device.type, _BATCH_TOKENS["cpu"])
    reading = Reading(tokenizer, texts, field, budget, min(max_length, runner.max_length), batch_tokens)

    fingerprints = {layer: Fingerprint.of(runner, layer) for layer in wanted}
    about = {"max_length": str(reading.length), **origin_of(runner, tokenizer)}
    run = {
        **about,
        "tokens": budget,
        "batch_tokens": batch_tokens,
        "rows": "behind special tokens",  # what snapshots of other releases, cut otherwise, do not have
        "layers": {layer: str(fingerprint) for layer, fingerprint in fingerprints.items()},
    }
    processes.agree("model, layers, tokens, max_length", json.dumps(run, sort_keys=True))
    limits: dict[int, float | None] = {}
    if out is not None:
        for layer, fingerprint in fingerprints.items():
            check_replaces(Path(out), layer, fingerprint, budget)
            if kept_tokens(file := layer_file(Path(out), layer), fingerprint):
                limits[layer] = kept_limit(file)
        check_writable(Path(out))
    snapshots = None if out is None else Snapshots(Path(out), run, processes.rank, processes.count)
    totals = {}
    for layer in wanted:
        width = runner.weight(layer).shape[1]
        totals[layer] = torch.zeros(width, width, dtype=torch.float64, device=runner.device)
    sums = snapshots.latest(totals) if snapshots else Sums(totals)
    if sums.batches and resumed is not None:
        resumed(sums.tokens, budget)
    try:
        with evaluating(runner.model):
            _sum_up(runner, reading, sums, processes, snapshots, progress)
        processes.agree("texts", reading.corpus.hexdigest())
        seen = sum(processes.gather(sums.tokens))
        processes.add_up_(list(sums.totals.values()))
        about |= {"corpus_sha256": reading.corpus.hexdigest()}
        entries = []
        for layer, total in sums.totals.items():
            moment = mirror_lower_(total).div_(seen).float().cpu()
            _check_finite(layer, moment)
            fingerprint, limit = fingerprints[layer], limits.get(layer)
            entries.append(LayerStatistics(layer, moment, seen, fingerprint, dict(about), ridge, limit))
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
    together = _batches_together(runner, reading.batch_tokens)
    with made_ahead(reading.windows(sums.start)) as windows:
        for window in windows:
            if sums.batches > window.start.batches and sums.rows != window.digest:
                raise other_texts()
            sums.start, sums.rows = window.start, window.digest
            numbered = list(enumerate(window.batches(reading.batch_tokens), window.start.batches))
            passed += sum(len(row) for number, batch in numbered if number < sums.batches for row in batch)
            numbered = [(number, batch) for number, batch in numbered if number >= sums.batches]
            for start in range(0, len(numbered), together):
                group = numbered[start : start + together]
                mine = [batch for number, batch in group if processes.takes(number)]
                if mine:
                    _add_batches(runner, mine, sums.totals)
                sums.tokens += sum(len(row) for batch in mine for row in batch)
                passed += sum(len(row) for _, batch in group for row in batch)
                sums.batches = group[-1][0] + 1
                if progress is not None and mine:
                    progress(passed, reading.tokens)
                if snapshots and snapshots.due():
                    _save(snapshots, sums)
    # The other processes' work is lost to a result, should this one die now: it waits for them.
    if snapshots and processes.count > 1:
        _save(snapshots, sums)


def _batches_together(runner: Runner, batch_tokens: int) -> int:
    """How many batches go through a layer before the next one is read; one where all layers are in memory."""
    if runner.stream is None or runner.spare_bytes is None:
        return 1
    # The rest is for what one layer computes.
    kept = batch_tokens * runner.hidden_size * runner.dtype.itemsize
    return max(1, runner.spare_bytes // 2 // kept)


def _add_batches(runner: Runner, batches: Sequence[Rows], totals: Mapping[int, Tensor]) -> None:
    """Add the keys of some batches to the sums, layer by layer; the order in which each sum grows is theirs."""
    packed = [runner.pack(batch) for batch in batches]
    # A mask costs a copy of the keys; rows of one length need none.
    kept = [
        None if len(batch[0]) == len(batch[-1]) else rows.mask.reshape(-1)
        for batch, rows in zip(batches, packed, strict=True)
    ]
    hidden = [runner.embed(rows.ids) for rows in packed]
    top = max(totals) + 1
    if runner.stream is not None:
        runner.stream.expect_passes(top)
    # With one batch at a time all layers are in memory, and one call does.
    steps = [(0, top)] if runner.stream is None else [(layer, layer + 1) for layer in range(top)]
    for start, stop in steps:
        for i in range(len(batches)):
            with ExitStack() as stack:
                for layer in range(start, stop):
                    if layer in totals:
                        see = _adding_to(totals[layer], kept[i])
                        stack.enter_context(runner.watching(layer, see))
                hidden[i] = runner.run(hidden[i], start, stop)


def _adding_to(total: Tensor, kept: Tensor | None) -> Callable[[Tensor, Tensor], None]:
    def see(keys: Tensor, _output: Tensor) -> None:
        second_moment_(total, keys.reshape(-1, keys.shape[-1]), kept)

    return see


def _save(snapshots: Snapshots, sums: Sums) -> None:
    for layer, total in sums.totals.items():
        # Σ k² is not finite where any key is not; better now than after hours.
        _check_finite(layer, total.diagonal())
    snapshots.save(sums)


def _check_finite(layer: int, moment: Tensor) -> None:
    if not bool(torch.isfinite(moment).all()):
        raise StatisticsError(f"model: keys of layer {layer} contain NaN or infinity; check its weights")
