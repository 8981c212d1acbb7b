"""What a method is: which rows, which keys, which residuals, which layers, and how the closed form is regularised."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ArgumentError

Keys = Literal["mean", "contexts", "unprefixed", "halves"]
"""Which keys of an edit are averaged: those of all its rows, of those behind contexts, or of the unprefixed row alone.

"halves" is the mean of the last two: MEMIT averages over the contexts of each length, the empty one being a length."""

Residual = Literal["delta", "to_unprefixed_value"]
Rows = Literal["prefixed", "all"]
Arrival = Literal["prompt", "here", "ahead"]

_NUMBERS = ("ridge", "ridge_per_edit", "largest_ridge", "penalty", "norm_penalty", "null_space", "sharing", "reach")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, known))}")


def _check_number(name: str, value: object, *, finite: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    if not number or (finite and value == math.inf):
        raise ArgumentError(f"{name}: got {value!r}, wanted a {'finite ' if finite else ''}number, not below 0")


@dataclass(frozen=True)
class Column:
    """One constraint of the closed form, of which every edit has one: a key, and what must be added to its value."""

    left: Keys = "mean"  # the key that the column u = C⁻¹ k is made of
    at: Keys = "mean"  # the key whose value the residual is added to
    # "delta": δ itself; "to_unprefixed_value": what leads from W k̄ to W k_u + δ, as in the code released with ROME.
    residual: Residual = "delta"

    def __post_init__(self) -> None:
        for name, known in (("left", Keys), ("at", Keys), ("residual", Residual)):
            _check_choice(name, getattr(self, name), get_args(known))


@dataclass(frozen=True)
class Method:
    """A method of editing.

    Its update is Δ = R (Uᵀ K + S)⁻¹ Uᵀ, with the columns' residuals R, their keys K and U = C⁻¹ K_left, or P K_left for
    the projection P on the null space of C.

    Raises ArgumentError for one that no edit, or none of a first-token subject, could be made by, for words that are
    none of those listed here, and for numbers that are below 0 or, but for `largest_ridge`, infinite.
    """

    name: str
    # Rows δ is optimised on. "prefixed": those with anything before the subject's last token, be it a context, the
    # prompt, the rest of the subject or BOS; "all": the row without a context in any case.
    rows: Rows
    columns: tuple[Column, ...] = (Column(),)
    # Whether the unprefixed key of a first-token subject has a value of its own, which columns there then add.
    bare: bool = False
    # S = ridge · the mean of diag(Uᵀ K) over the columns solved with the same matrix: `ridge` or, where that is more,
    # (n · ridge_per_edit)^1.5 for n edits made together, up to `largest_ridge`.
    ridge: float = 0.0
    ridge_per_edit: float = 0.0
    largest_ridge: float = math.inf
    penalty: float = 0.0  # S = penalty · I: λ of MEMIT, the L2 of AlphaEdit
    norm_penalty: float = 0.0  # α of ENCORE: C + (α / penalty) · I is solved with in place of C
    null_space: float | None = None  # the eigenvalue of C below which a direction belongs to its null space
    remembers: bool = False  # keys of earlier batches are columns with a residual of zero
    # Edits of one subject that are made together have one value, found on the rows of all of them, as their keys are
    # nearly the same (MEMIT-Merge, Dong et al. 2025, 2502.07322).
    merges: bool = False
    spread: bool = False  # over several layers, unless the call says which
    # With n layers left, one is asked for 1 / n^sharing of what is still missing: 1 in MEMIT, ½ in PMET (Li et al.
    # 2024).
    sharing: float = 1.0
    # Where it is measured how much of δ has arrived so far. "prompt": at the last layer, behind the prompt alone, as in
    # MEMIT; "here": at the layer whose turn it is, at each column's own key; "ahead": at the last layer behind the
    # prompt alone, for all columns, but at the last layer itself at each column's own key.
    arrival: Arrival = "here"
    # How many times δ is asked for by one edit that is spread, as text that no row has gets less of it; by several made
    # together fewer times, see `reach_of`.
    reach: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("rows", self.rows, get_args(Rows))
        _check_choice("arrival", self.arrival, get_args(Arrival))
        for name in _NUMBERS:
            value = getattr(self, name)
            if name != "null_space" or value is not None:
                _check_number(name, value, finite=name != "largest_ridge")
        if not self.reach:
            raise ArgumentError(f"reach: got 0 for method {self.name!r}, wanted more: nothing would be edited")
        if not isinstance(self.columns, tuple) or not all(isinstance(column, Column) for column in self.columns):
            raise ArgumentError(f"columns: got {self.columns!r}, wanted a tuple of rome_fast.methods.Column")
        if not self.columns:
            raise ArgumentError(f"columns: got none for method {self.name!r}, wanted at least one")
        unprefixed = any("unprefixed" in (column.left, column.at) for column in self.columns)
        if unprefixed and self.rows == "prefixed" and not self.bare:
            raise ArgumentError(
                f"columns: got an unprefixed key for method {self.name!r} of prefixed rows, wanted rows='all' or "
                "bare=True, as first tokens have no unprefixed row otherwise"
            )
        if self.norm_penalty and (not self.penalty or self.null_space is not None):
            raise ArgumentError(
                f"norm_penalty: got {self.norm_penalty:g} with a penalty of {self.penalty:g} and null_space "
                f"{self.null_space} for method {self.name!r}, wanted a penalty above 0 and no null space beside it"
            )

    def ridge_of(self, edits: int) -> float:
        """Of so many edits made together."""
        return max(self.ridge, min((edits * self.ridge_per_edit) ** 1.5, self.largest_ridge))

    def reach_of(self, edits: int) -> float:
        """Of so many edits made together: what is more than 1 shrinks as their ridge grows."""
        ridge = self.ridge_of(edits)
        return 1 + (self.reach - 1) * (self.ridge_of(1) / ridge if ridge else 1)

    @property
    def added_to_moment(self) -> float:
        """What C has added to its diagonal."""
        return self.norm_penalty / self.penalty if self.norm_penalty else 0.0

    @property
    def base(self) -> Keys:
        """Whose value v₀ is: its length bounds δ."""
        return "mean" if self.rows == "prefixed" else "unprefixed"
