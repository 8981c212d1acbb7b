"""What the collapse study measured, read from the directory it leaves behind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..errors import CheckpointError
from .reading import read_lines, read_object

_REMEDY = "run the study again"


@dataclass(frozen=True, kw_only=True)
class _MeasuredEdit:
    """One edit of an unedited model, and the perplexity of the model it made."""

    prompt: str
    subject: str
    target: str
    denominator: float  # uᵀ k_den with u = C⁻¹ k_left
    update_norm: float  # ‖Δ‖
    weight_norm: float  # ‖W‖ before the edit
    perplexity_before: float
    perplexity_after: float | None  # infinite for a model whose logits are not finite

    @property
    def update_ratio(self) -> float:
        """‖Δ‖ / ‖W‖."""
        return self.update_norm / self.weight_norm

    @property
    def perplexity_ratio(self) -> float | None:
        return None if self.perplexity_after is None else self.perplexity_after / self.perplexity_before


@dataclass(frozen=True, kw_only=True)
class StudyRecord(_MeasuredEdit):
    """One request edited by one method. Metrics are shares in 0 .. 1; None where there was nothing to measure."""

    method: str
    layer: int
    loss: float
    steps: int
    numerator_norm: float  # ‖r uᵀ‖
    first_token: bool  # the subject's last token is the first one of the prompt
    subject_position: int
    needs_prefix: bool
    collapsed: bool | None  # as measured
    predicted: bool  # by the guard, before the perplexity was measured
    probability: float | None = None  # of the target behind the bare prompt
    argmax: float | None = None
    decoded_right: float | None = None
    efficacy: float | None = None
    paraphrase: float | None = None
    neighborhood: float | None = None
    probability_prefixed: float | None = None  # behind the contexts the edit was made with
    argmax_prefixed: float | None = None
    decoded_right_prefixed: float | None = None
    efficacy_prefixed: float | None = None
    paraphrase_prefixed: float | None = None
    probability_unseen: float | None = None  # behind contexts that the edit never saw
    argmax_unseen: float | None = None
    decoded_right_unseen: float | None = None
    efficacy_unseen: float | None = None
    paraphrase_unseen: float | None = None


@dataclass(frozen=True, kw_only=True)
class FactorRecord(_MeasuredEdit):
    """One request edited with one combination of rome's parts and their repairs."""

    numerator_norm: float
    first_token: bool
    left: str  # key that u is made from: "mean" or "unprefixed"
    denominator_key: str  # "unprefixed" or "mean"
    residual: str  # "delta" or "to_unprefixed_value"
    collapsed: bool | None


@dataclass(frozen=True, kw_only=True)
class PrefixRecord(_MeasuredEdit):
    """A first-token request edited by rome with a neutral prefix before its subject."""

    words: int  # of the prefix; 0 for none


@dataclass(frozen=True)
class Keys:
    """Keys of n requests at the edit layer, and key norms of all layers."""

    solved: NDArray[np.float32]  # (n, d_ff) C⁻¹ k̄
    unprefixed: NDArray[np.float32]  # (n, d_ff) k_u
    mean: NDArray[np.float32]  # (n, d_ff) k̄
    first_token: NDArray[np.bool_]  # (n,)
    norms: NDArray[np.float32]  # (2, layers) mean norm of a first token's key, and of later tokens' keys


@dataclass(frozen=True)
class StudyData:
    """The whole directory. Empty or None is what was not measured."""

    conditions: dict[str, Any]
    records: list[StudyRecord]
    factors: list[FactorRecord]
    keys: Keys | None
    prefixes: list[PrefixRecord]
    guard: dict[str, Any] | None

    @property
    def collapse_ratio(self) -> float:
        """Perplexity ratio above which an edited model counts as collapsed."""
        return float(self.conditions["collapse_ratio"])

    @property
    def perplexity_before(self) -> float:
        return float(self.conditions["perplexity_before"])


def read_study(directory: Path) -> StudyData:
    """Read the files of a study; conditions.json and records.jsonl must be there, the others need not.

    Raises CheckpointError for a file that is missing, damaged or not of the study's form.
    """
    if not directory.is_dir():
        raise CheckpointError(f"directory: {directory} is not a directory; pass the one that the study wrote")
    conditions = read_object(directory / "conditions.json", _REMEDY)
    if conditions is None:
        raise CheckpointError(f"{directory}: conditions.json is missing, so this is no study's directory; {_REMEDY}")
    for name in ("collapse_ratio", "perplexity_before"):
        value = conditions.get(name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(
                f'{directory / "conditions.json"}: got {value!r} as "{name}", wanted a positive number; {_REMEDY}'
            )
    records = read_lines(directory / "records.jsonl", StudyRecord, _REMEDY)
    if not records:
        raise CheckpointError(f"{directory}: records.jsonl is missing or empty, nothing was measured yet; {_REMEDY}")
    return StudyData(
        conditions,
        records,
        read_lines(directory / "factors.jsonl", FactorRecord, _REMEDY),
        _keys(directory / "keys.safetensors"),
        read_lines(directory / "prefix.jsonl", PrefixRecord, _REMEDY),
        read_object(directory / "guard.json", _REMEDY),
    )


def _keys(file: Path) -> Keys | None:
    if not file.exists():
        return None
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {_REMEDY}") from error
    names = [field.name for field in fields(Keys)]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"{file}: has no {', '.join(missing)}, wanted {', '.join(names)}; {_REMEDY}")
    shapes = [tensors[name].shape for name in names]
    vectors = shapes[0]
    wanted: Sequence[tuple[int, ...]] = [vectors, vectors, vectors, vectors[:1], (2, *shapes[4][1:])]
    if len(vectors) != 2 or len(shapes[4]) != 2 or shapes != wanted:
        raise CheckpointError(f"{file}: got shapes {shapes} of {', '.join(names)}, wanted {wanted}; {_REMEDY}")
    if infinite := [name for name in names if not np.isfinite(tensors[name]).all()]:
        raise CheckpointError(f"{file}: {', '.join(infinite)} has values that are not finite; {_REMEDY}")
    if not vectors[0]:
        return None
    solved, unprefixed, mean, first_token, norms = (tensors[name] for name in names)
    return Keys(solved, unprefixed, mean, first_token.astype(np.bool_), norms)
