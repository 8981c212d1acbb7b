"""The second moment of first-token keys, C₁: every token of the vocabulary once, alone at position 0.

A key there depends on the token alone, so one pass over the vocabulary sees all there are. Unlike C it needs no corpus
and no hours (49,152 tokens through 10 layers of SmolLM2-135M take about a minute of one CPU thread): it is made when an
edit first needs it, and kept in the cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import CheckpointError, StatisticsError
from ..kernels import mirror_lower_, second_moment_
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner, evaluating
from ..weights.files import os_errors
from .layer import LayerStatistics
from .store import FIRST_TOKENS, read_layer, statistics_cache, write_layer

# Tokens at a time, as in collecting C.
_BATCH_TOKENS = {"cuda": 32768, "cpu": 4096}


def first_token_statistics(runner: Runner, layers: Sequence[int]) -> dict[int, LayerStatistics]:
    """C₁ of layers, (d_ff, d_ff) in fp32 (fp64 for an fp64 model): from the cache, or made in one pass and kept there.

    Raises StatisticsError for keys that are not finite, CheckpointError where the cache cannot be written.
    """
    prints = {layer: Fingerprint.of(runner, layer) for layer in layers}
    found = {layer: _cached(layer, fingerprint) for layer, fingerprint in prints.items()}
    missing = [layer for layer, entry in found.items() if entry is None]
    entries = {layer: entry for layer, entry in found.items() if entry is not None}
    if missing:
        config = runner.model.config
        name = Path(config._name_or_path).name or config.model_type
        for entry in _collect(runner, {layer: prints[layer] for layer in missing}):
            folder = statistics_cache() / f"{name}-{entry.fingerprint}"
            with os_errors(f"writing {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
            write_layer(folder / _file(entry.layer), entry, FIRST_TOKENS)
            entries[entry.layer] = entry
    return {layer: entries[layer] for layer in layers}


def _file(layer: int) -> str:
    return f"first-tokens-{layer}.safetensors"


def _cached(layer: int, fingerprint: Fingerprint) -> LayerStatistics | None:
    """That of the model, or of one that it was edited from."""
    before = None
    for found in sorted(statistics_cache().glob(f"*/{_file(layer)}")):
        try:
            entry = read_layer(found, FIRST_TOKENS)
        except (CheckpointError, StatisticsError):
            continue  # what is damaged is made again
        if entry.fingerprint.matches(fingerprint):
            return entry
        if entry.fingerprint.matches(fingerprint, but_for_edits=True):
            before = entry
    return before


def first_token_passes(runner: Runner, layer: int) -> int:
    """How many times the weights up to the layer are gone through to make C₁."""
    return -(-runner.vocab_size // _batch(runner, layer))


def _batch(runner: Runner, layer: int) -> int:
    most = _BATCH_TOKENS.get(runner.device.type, _BATCH_TOKENS["cpu"])
    if runner.spare_bytes is None:
        return most
    hidden, width = runner.weight(layer).shape
    return max(1, min(most, runner.spare_bytes // (runner.dtype.itemsize * (10 * hidden + 5 * width))))


@torch.no_grad()
def _collect(runner: Runner, layers: Mapping[int, Fingerprint]) -> Iterator[LayerStatistics]:
    widths = {layer: runner.weight(layer).shape[1] for layer in layers}
    totals = {
        layer: torch.zeros(width, width, dtype=torch.float64, device=runner.device) for layer, width in widths.items()
    }

    def summing(layer: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def see(keys: torch.Tensor, _output: torch.Tensor) -> None:
            second_moment_(totals[layer], keys.reshape(-1, widths[layer]))

        return see

    count, last = runner.vocab_size, max(layers)
    with evaluating(runner.model), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(runner.watching(layer, summing(layer)))
        for ids in torch.arange(count, device=runner.device).split(_batch(runner, last)):
            runner.run(runner.embed(ids.unsqueeze(1)), 0, last + 1)
    about = {"dtype": str(runner.dtype).removeprefix("torch."), "torch": torch.__version__}
    for layer, fingerprint in layers.items():
        total = mirror_lower_(totals.pop(layer))
        moment = (total / count).to("cpu", torch.promote_types(runner.dtype, torch.float32))
        if not bool(torch.isfinite(moment).all()):
            raise StatisticsError(
                f"model: keys of layer {layer} contain NaN or infinity at position 0; load it in float32 or bfloat16, "
                "or edit first tokens by method='c-rome'"
            )
        yield LayerStatistics(layer, moment, count, fingerprint, about)
