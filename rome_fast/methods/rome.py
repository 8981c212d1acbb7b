"""ROME and its consistent variants, for one edit or several at once.

One edit:       Δ = r uᵀ / (uᵀ k_den),           u = C⁻¹ k_left     (Meng et al. 2022, equation 2)
Several:        Δ = R (Uᵀ K_den)⁻¹ Uᵀ,           U = C⁻¹ K_left     (equality constraints, as in EMMET)

ROME as released takes k_left from prefixed keys and k_den from the unprefixed one. Where the two differ widely, as
for a subject that is the first token, the denominator becomes small and the update destroys the model (Yang et al.
2024, "Understanding the Collapse of LLMs in Model Editing").

`dual` keeps both keys of such a subject, each with a value of its own: two columns of the joint form. The keys of all
first tokens have nearly one direction, so that C alone would give the second value to any of them: u of that column is
(C + λ C₁)⁻¹ k, with C₁ the second moment of the keys of all tokens at position 0.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, EditError, StatisticsError


@dataclass(frozen=True)
class RomeVariant:
    """Which keys and which residual a variant uses."""

    name: str
    # Rows δ is optimised on and k̄ is the mean of. "prefixed": those with anything before the subject's last token, be
    # it a context, the prompt, the rest of the subject or BOS; "all": the row without a context in any case.
    rows: Literal["prefixed", "all"]
    left: Literal["mean", "unprefixed"]
    denominator: Literal["mean", "unprefixed"]
    residual: Literal["delta", "to_unprefixed_value"]
    bare: bool = False  # whether the unprefixed key of a first-token subject gets a value of its own


FIRST_TOKEN_WEIGHT = 0.3
"""λ above; see docs/dual.md for what other weights do."""

# Of the edits' keys, beyond which they are linearly dependent, and what tells them apart is rounding.
_WORST_CONDITION = 1e6
_HALVINGS = 40  # of the search for a limit on ‖Δ‖: to rounding

METHODS: dict[str, RomeVariant] = {
    v.name: v
    for v in (
        RomeVariant("rome", "all", "mean", "unprefixed", "delta"),
        RomeVariant("c-rome-released", "all", "mean", "mean", "to_unprefixed_value"),
        RomeVariant("c-rome", "prefixed", "mean", "mean", "delta"),
        RomeVariant("p-rome", "all", "unprefixed", "unprefixed", "delta"),
        RomeVariant("dual", "prefixed", "mean", "mean", "delta", bare=True),
    )
}


def variant(name: str) -> RomeVariant:
    if not isinstance(name, str) or name not in METHODS:
        raise ArgumentError(f"method: got {name!r}, wanted one of {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class Factors:
    """Δ = left @ right, and what a reader wants to know about each edit in it."""

    left: Tensor  # (d, r)
    right: Tensor  # (r, d_ff)
    denominators: Tensor  # (r,) uᵀ k_den of every edit alone
    numerator_norms: Tensor  # (r,) ‖r uᵀ‖
    update_norms: Tensor  # (r,) ‖r uᵀ / (uᵀ k_den)‖ of every edit alone
    # (r,) ‖Δ k_den - r‖ / ‖r‖ of every edit: 0 to rounding, unless keys are linearly dependent or the update is held
    missed: Tensor
    joint_norm: float  # ‖Δ‖ of all of them together
    condition: float  # of Uᵀ K_den with its columns scaled to unit diagonal; 1 for one key


def hold_first_tokens(factor: Tensor | None, first_tokens: Tensor) -> Tensor:
    """Lower Cholesky factor of C + λ C₁, (d_ff, d_ff) fp64, from that of C (None for C = I) and C₁ itself.

    Raises StatisticsError where the sum is not positive definite: the rounding of C₁ can do that to a C that is nearly
    singular.
    """
    held = FIRST_TOKEN_WEIGHT * first_tokens.to(torch.float64)
    if factor is None:
        held.diagonal().add_(1.0)
    else:
        lower = factor.to(torch.float64)
        held.addmm_(lower, lower.T)
    both, info = torch.linalg.cholesky_ex(held)
    if int(info):
        raise StatisticsError(
            f"statistics: C with the moment of first tokens added is singular (Cholesky stops at pivot {int(info)} of "
            f"{len(held)}); collect more tokens, take a ridge (Statistics.with_ridge(1e-6)), or edit first tokens by "
            "method='c-rome'"
        )
    return both


def residual(method: RomeVariant, delta: Tensor, unprefixed_value: Tensor, mean_value: Tensor) -> Tensor:
    """What must be added to the value at k_den; all arguments (d,) or (r, d)."""
    if method.residual == "delta":
        return delta
    return unprefixed_value + delta - mean_value


def close(
    solved: Tensor,  # (r, d_ff): rows u = C⁻¹ k_left
    k_den: Tensor,  # (r, d_ff)
    residuals: Tensor,  # (r, d)
    *,
    harmless: float = math.inf,
) -> Factors:
    """The closed form, solved in fp64.

    Edits of one subject behind the same words have one key, which cannot have two values: where keys are linearly
    dependent, to `_WORST_CONDITION`, the least-squares update of least norm is taken, which meets such edits halfway.

    Keys that are nearly dependent can be told apart, at the price of an update that hurts the model and the other edits
    more than equality is worth. Where ‖Δ‖ exceeds both `harmless` and that of as many edits with nothing in common, the
    smallest singular values of Uᵀ K_den are raised until it does not: a regularised least squares, as MEMIT's, but one
    that is exact in all other directions.
    Raises EditError when a denominator is zero.
    """
    u, keys, r = (t.to(torch.float64) for t in (solved, k_den, residuals))
    gram = u @ keys.T
    denominators = gram.diagonal()
    if not bool(torch.isfinite(gram).all()) or bool((denominators == 0).any()):
        raise EditError("the denominator uᵀk of an edit is zero or not finite; check the statistics")
    numerators = r.norm(dim=1) * u.norm(dim=1)
    update_norms = numerators / denominators.abs()
    scale = denominators.abs().rsqrt()
    scaled = scale[:, None] * gram * scale
    # Σ_i left_i (u_i · k_j) = r_j for every j, i.e. Gᵀ left = r; the unit diagonal keeps the solve well conditioned.
    condition = float(torch.linalg.cond(scaled)) if len(gram) > 1 else 1.0
    wanted, directions = scale[:, None] * r, scale[:, None] * u
    if condition < _WORST_CONDITION:
        left = torch.linalg.solve(scaled.T, wanted)
    else:
        left = torch.linalg.pinv(scaled.T, rtol=1 / _WORST_CONDITION) @ wanted
    most = max(harmless, float(update_norms.norm()))
    if len(gram) > 1 and _norm(left, directions) > most:
        left = _held(scaled.T, wanted, directions, most)
    left = scale[:, None] * left
    missed = (gram.T @ left - r).norm(dim=1) / r.norm(dim=1).clamp(min=torch.finfo(r.dtype).tiny)
    return Factors(left.T, u, denominators, numerators, update_norms, missed, _norm(left, u), condition)


def _norm(left: Tensor, right: Tensor) -> float:
    """‖leftᵀ right‖ of factors (r, d) and (r, d_ff)."""
    return float(((left @ left.T) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _held(gram: Tensor, wanted: Tensor, directions: Tensor, most: float) -> Tensor:
    """x of gram x = wanted with small singular values raised by as little as makes ‖xᵀ directions‖ at most `most`."""
    outer, singular, inner = torch.linalg.svd(gram)
    along, directions = outer.T @ wanted, inner @ directions
    # ‖Δ‖² = sᵀ (along alongᵀ ∘ directions directionsᵀ) s, with s the inverse singular values.
    products = (along @ along.T) * (directions @ directions.T)
    independent = singular > singular[0] / _WORST_CONDITION

    def inverse(floor: float) -> Tensor:
        return torch.where(independent, 1 / singular.clamp(min=floor), 0)

    low, high = float(singular[0]) / _WORST_CONDITION, float(singular[0])
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        s = inverse(middle)
        low, high = (middle, high) if float(s @ products @ s) > most**2 else (low, middle)
    return inner.T @ (inverse(high)[:, None] * along)
