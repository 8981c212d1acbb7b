"""The .npz files of the released ROME and MEMIT code, read and written.

Taken from how that code sums: `mom2.mom2` is the SUM of k kᵀ over `mom2.count` tokens, so that C is their quotient.
`mom2.constructor` names a class and `sample_size` the number of documents; neither is needed to read one. Such a file
does not say which model it is of: all that can be checked is its shape. Those written here carry the fingerprint too.
"""

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import ArgumentError, StatisticsError
from ..models.fingerprint import Fingerprint
from ..models.runner import Runner
from ..weights.files import atomic_write
from .layer import LayerStatistics
from .store import Statistics

_FINGERPRINT = "rome_fast.fingerprint"
# Larger differences than the rounding of an fp32 sum make it something else than a second moment.
_ASYMMETRY = 1e-3


def import_npz(file: str | Path, model: PreTrainedModel | Runner, layer: int) -> Statistics:
    """Second moments of a layer of this model from a released .npz file; pickled objects in it are never loaded.

    Raises StatisticsError for a file that is not one of these, and, with shapes or both fingerprints, for one of
    another width or (where the file names its model) of another model.
    """
    runner = model if isinstance(model, Runner) else Runner(model)
    if not 0 <= layer < len(runner.layers):
        raise ArgumentError(f"layer: got {layer}, wanted one of 0 .. {len(runner.layers) - 1}")
    actual = Fingerprint.of(runner, layer)
    width = actual.key_size
    try:
        # Opened here, because numpy leaves a damaged file open.
        with Path(file).open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise StatisticsError(f"{file}: got a single array, wanted an .npz file with mom2.mom2 and mom2.count")
            if missing := {"mom2.mom2", "mom2.count"} - set(content.files):
                raise StatisticsError(f"{file}: wanted mom2.mom2 and mom2.count in it, {', '.join(missing)} missing")
            total, count = content["mom2.mom2"], content["mom2.count"]
            named = str(content[_FINGERPRINT]) if _FINGERPRINT in content.files else None
    except StatisticsError:
        raise
    # NotImplementedError and RuntimeError: of a zip file compressed in another way, or encrypted.
    except (
        OSError, ValueError, EOFError, MemoryError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise StatisticsError(f"{file}: cannot be read as an .npz file of second moments ({error})") from error
    origin = None if named is None else _read_fingerprint(file, named)
    if total.shape != (width, width):
        raise StatisticsError(
            f"{file}: got second moments of shape {total.shape} (model {origin or 'not named in the file'}), wanted "
            f"({width}, {width}) for layer {layer} of this model ({actual})"
        )
    if origin is not None and not origin.matches(actual):
        raise StatisticsError(f"{file}: got statistics of model {origin}, wanted {actual} (layer {layer})")
    if total.dtype.kind != "f" or count.size != 1 or count.dtype.kind not in "iuf" or not _at_least_one(count):
        raise StatisticsError(
            f"{file}: got {total.dtype} sums over {count!r} tokens, wanted floating-point sums over at least one"
        )
    tokens = int(count.reshape(-1)[0])
    moment = torch.from_numpy(total.astype(np.float64)) / tokens
    if not bool(torch.isfinite(moment).all()):
        raise StatisticsError(f"{file}: contains NaN or infinity; fetch it again")
    if float((moment - moment.T).abs().max()) > _ASYMMETRY * float(moment.abs().max()):
        raise StatisticsError(f"{file}: mom2.mom2 is not symmetric, so it is no second moment; fetch it again")
    moment = (moment + moment.T) / 2
    return Statistics([LayerStatistics(layer, moment.float(), tokens, actual, {"imported": Path(file).name})])


def export_npz(entry: LayerStatistics, file: str | Path, sample_size: int) -> None:
    """Write one layer as a released .npz file, fp32; `sample_size` is what its reader will ask for.

    Raises CheckpointError where it cannot be written.
    """
    arrays: dict[str, Any] = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(entry.tokens),
        "mom2.mom2": (entry.moment.double() * entry.tokens).float().numpy(),
        "sample_size": np.array(sample_size),
        _FINGERPRINT: np.array(entry.fingerprint.to_json()),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    atomic_write(Path(file), buffer.getvalue())


def _at_least_one(count: Any) -> bool:
    number = float(count.reshape(-1)[0])
    return 1 <= number < float("inf")


def _read_fingerprint(file: str | Path, text: str) -> Fingerprint:
    try:
        return Fingerprint.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"{file}: its fingerprint is unreadable ({error}); export it again") from error
