"""Second moments of keys, C = E[k kᵀ], per layer: collect, save, load, and solve with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .assets import cache_dir
from .errors import ArgumentError, CheckpointError, StatisticsError
from .fingerprint import Fingerprint
from .kernels import mirror_lower_, second_moment_
from .rows import encode
from .runner import PackedRows, Runner, evaluating, watching
from .weights import load_tensors, save_tensors

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens wanted)."""

_BATCH_TOKENS = 4096
_FORMAT = "rome_fast second moment 1"


@dataclass
class LayerStatistics:
    """The second moment of one layer's keys and where it came from."""

    layer: int
    moment: Tensor  # (d_ff, d_ff) fp32: mean of k kᵀ over `tokens` positions
    tokens: int
    fingerprint: Fingerprint
    provenance: dict[str, str] = field(default_factory=dict)
    _factor: Tensor | None = field(default=None, repr=False)

    def factor(self, device: torch.device) -> Tensor:
        """Lower Cholesky factor of C in fp64 (d_ff, d_ff), computed once.

        Raises StatisticsError when C is not positive definite.
        """
        if self._factor is None or self._factor.device != device:
            lower, info = torch.linalg.cholesky_ex(self.moment.to(device, torch.float64))
            if int(info):
                raise StatisticsError(
                    f"statistics: C of layer {self.layer} is singular (Cholesky stops at pivot {int(info)} of "
                    f"{self.moment.shape[0]}; it saw {self.tokens} tokens for {self.moment.shape[0]} dimensions); "
                    "collect more tokens, at least twice the dimensions, or pass statistics='identity'"
                )
            self._factor = lower
        return self._factor


def statistics_cache() -> Path:
    """Where statistics are kept when no directory is given, one folder per model."""
    return cache_dir() / "statistics"


class Statistics:
    """Second moments of one model's keys, by layer."""

    def __init__(self, layers: Iterable[LayerStatistics]) -> None:
        self.layers = {entry.layer: entry for entry in layers}

    def for_layer(self, runner: Runner, layer: int) -> LayerStatistics:
        """The entry of a layer, checked to belong to this model.

        Raises StatisticsError naming both fingerprints for another model, layer or width.
        """
        if layer not in self.layers:
            have = ", ".join(map(str, sorted(self.layers))) or "none"
            raise StatisticsError(
                f"statistics: got layer(s) {have}, wanted layer {layer}; "
                f"collect it with: rome-fast statistics MODEL --corpus FILE --layers {layer} --out DIR"
            )
        entry = self.layers[layer]
        width = runner.weight(layer).shape[1]
        actual = Fingerprint.of(runner, layer)
        if entry.moment.shape != (width, width):
            raise StatisticsError(
                f"statistics: got C of shape {tuple(entry.moment.shape)} (model {entry.fingerprint}), wanted "
                f"({width}, {width}) for layer {layer} of this model ({actual})"
            )
        if not entry.fingerprint.matches(actual):
            raise StatisticsError(
                f"statistics: got those of model {entry.fingerprint}, wanted {actual}: the weights below layer "
                f"{layer} differ; collect statistics of this very model"
            )
        return entry

    def save(self, directory: str | Path) -> None:
        """One safetensors file per layer, each replaced atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for layer, entry in self.layers.items():
            metadata = {
                "format": _FORMAT,
                "layer": str(layer),
                "tokens": str(entry.tokens),
                "fingerprint": entry.fingerprint.to_json(),
                "provenance": json.dumps(entry.provenance),
            }
            save_tensors(directory / f"layer-{layer}.safetensors", {"second_moment": entry.moment}, metadata)

    @classmethod
    def cached(cls, runner: Runner, layer: int) -> "Statistics":
        """Those of this model and layer in the cache folder; StatisticsError with the command that makes them."""
        unreadable = ""
        for file in sorted(statistics_cache().glob(f"*/layer-{layer}.safetensors")):
            try:
                entry = _read_layer(file)
            except (CheckpointError, StatisticsError) as error:
                unreadable += f"\nunreadable there: {error}"
                continue
            if entry.fingerprint.matches(Fingerprint.of(runner, layer)):
                return cls([entry])
        name = runner.model.config._name_or_path or "MODEL"
        raise StatisticsError(
            f"statistics: none for layer {layer} of {name} in {statistics_cache()}; make them (once) with: "
            f"rome-fast statistics {name} --corpus FILE --layers {layer}\n"
            f"or edit without them, at some loss of specificity, by statistics='identity'{unreadable}"
        )

    @classmethod
    def load(cls, directory: str | Path) -> "Statistics":
        """Read what `save` wrote; CheckpointError for a damaged file, StatisticsError for anything else."""
        directory = Path(directory)
        files = sorted(directory.glob("layer-*.safetensors"))
        if not files:
            raise StatisticsError(
                f"statistics: found no layer-*.safetensors in {directory}; make them with: "
                f"rome-fast statistics MODEL --corpus FILE --out {directory}"
            )
        return cls(_read_layer(file) for file in files)


def _read_layer(file: Path) -> LayerStatistics:
    tensors, metadata = load_tensors(file)
    if metadata.get("format") != _FORMAT or set(tensors) != {"second_moment"}:
        raise StatisticsError(f"statistics: {file} is a safetensors file but not one of second moments")
    moment = tensors["second_moment"]
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise StatisticsError(f"statistics: {file} has C of shape {tuple(moment.shape)}, wanted a square matrix")
    if not bool(torch.isfinite(moment).all()):
        raise StatisticsError(f"statistics: {file} contains NaN or infinity; collect it again")
    try:
        return LayerStatistics(
            layer=int(metadata["layer"]),
            moment=moment,
            tokens=int(metadata["tokens"]),
            fingerprint=Fingerprint.from_json(metadata["fingerprint"]),
            provenance=json.loads(metadata["provenance"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StatisticsError(f"statistics: {file} has unreadable metadata ({error}); collect it again") from error


def collect_statistics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    layers: Sequence[int],
    tokens: int = 100_000,
    max_length: int = 128,
    progress: Progress | None = None,
) -> Statistics:
    """Second moments of the down-projection's inputs over the first `tokens` tokens of `texts`, in one pass.

    Each text is tokenised whole and cut into rows of at most `max_length` tokens; short rows, like those of ordinary
    use, give first tokens, whose keys are of their own kind, their weight in C. Layers above the last wanted one
    are not run. Products are taken in fp32 (fp64 for an fp64 model) and summed in fp64.

    Raises ArgumentError for a layer out of range, a budget below one token or texts that are not strings,
    StatisticsError for texts without a token or keys that are not finite.
    """
    runner = Runner(model)
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(runner.layers):
        raise ArgumentError(f"layers: got {list(layers)}, wanted some of 0 .. {len(runner.layers) - 1}")
    if isinstance(texts, str):
        raise ArgumentError("texts: got str, wanted an iterable of texts; put a single one into a list")
    if tokens < 1 or max_length < 1:
        raise ArgumentError(f"tokens, max_length: got {tokens}, {max_length}, wanted at least 1")
    length = min(max_length, runner.max_length)

    totals = {}
    for layer in wanted:
        width = runner.weight(layer).shape[1]
        totals[layer] = torch.zeros(width, width, dtype=torch.float64, device=runner.device)
    digest = hashlib.sha256()
    seen = 0
    with evaluating(model):
        for batch in _batches(_pieces(tokenizer, texts, length, tokens, digest)):
            _add_batch(runner, runner.pack(batch), totals)
            seen += sum(map(len, batch))
            if progress is not None:
                progress(seen, tokens)
    if not seen:
        raise StatisticsError("texts: got no tokens at all; give at least one text that is not empty")

    provenance = {
        "corpus_sha256": digest.hexdigest(),
        "max_length": str(length),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    entries = []
    for layer, total in totals.items():
        moment = (mirror_lower_(total) / seen).float().cpu()
        if not bool(torch.isfinite(moment).all()):
            raise StatisticsError(f"model: keys of layer {layer} contain NaN or infinity; check its weights")
        entries.append(LayerStatistics(layer, moment, seen, Fingerprint.of(runner, layer), dict(provenance)))
    return Statistics(entries)


@torch.no_grad()
def _add_batch(runner: Runner, rows: PackedRows, totals: dict[int, Tensor]) -> None:
    kept = rows.mask.reshape(-1)
    with ExitStack() as stack:
        for layer, total in totals.items():

            def see(keys: Tensor, _output: Tensor, total: Tensor = total) -> None:
                second_moment_(total, keys.reshape(-1, keys.shape[-1]), kept)

            stack.enter_context(watching(runner.projection(layer), see))
        runner.run(runner.embed(rows.ids), 0, max(totals) + 1)


def _pieces(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    length: int,
    tokens: int,
    digest: "hashlib._Hash",
) -> Iterator[list[int]]:
    left = tokens
    for text in texts:
        if not isinstance(text, str):
            raise ArgumentError(f"texts: got an item of type {type(text).__name__}, wanted str")
        digest.update(text.encode())
        ids = encode(tokenizer, [text])[0].ids
        for start in range(0, len(ids), length):
            piece = ids[start : min(start + length, start + left)]
            left -= len(piece)
            yield piece
            if not left:
                return


def _batches(pieces: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) * max(map(len, batch)) >= _BATCH_TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch
