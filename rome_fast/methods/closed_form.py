"""The closed form: columns in, the factors of an update out. Pure functions, solved in fp64.

One column:  Δ = r uᵀ / (uᵀ k),             u = C⁻¹ k_left     (Meng et al. 2022, equation 2)
Several:     Δ = R (Uᵀ K + S)⁻¹ Uᵀ,         U = C⁻¹ K_left     (S = 0: equality constraints, as in EMMET)

`rome_fast.methods.method` says what the columns are and what S is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EditError, StatisticsError

FIRST_TOKEN_WEIGHT = 0.3
"""λ of C + λ C₁, with which the keys of first tokens are solved for; see docs/dual.md for what other weights do."""

# Of the edits' keys, beyond which they are linearly dependent, and what tells them apart is rounding.
_WORST_CONDITION = 1e6
_HALVINGS = 40  # of the search for a limit on ‖Δ‖: to rounding


@dataclass(frozen=True)
class Factors:
    """Δ = left @ right, and what a reader wants to know about each of `edits` in it.

    Of r columns, those at places e, edits + e, 2 edits + e, … belong to edit e; columns of earlier batches are last.
    """

    left: Tensor  # (d, r)
    right: Tensor  # (r, d_ff)
    denominators: Tensor  # (edits,) uᵀ k_den of the first column of every edit
    numerator_norms: Tensor  # (edits,) ‖r uᵀ‖ of the same
    update_norms: Tensor  # (edits,) ‖Δ‖ of every edit alone
    # (edits,) ‖Δ K - R‖ / ‖R‖ over the columns of every edit: 0 to rounding, unless S is not 0, keys are linearly
    # dependent or the update is held; 0 where R is
    missed: Tensor
    joint_norm: float  # ‖Δ‖ of all of them together
    condition: float  # of Uᵀ K_den + S with its columns scaled to unit diagonal; 1 for one key


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


def project_on_null_space(moment: Tensor, threshold: float) -> Tensor:
    """P of AlphaEdit, (d_ff, d_ff) fp64: the projection on the eigenvectors of C with eigenvalues below the threshold.

    Raises StatisticsError where there are none.
    """
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    vectors = vectors[:, values < threshold]
    if not vectors.shape[1]:
        raise StatisticsError(
            f"statistics: C has no eigenvalue below {threshold:g} (the smallest is {float(values[0]):.1e}), so that "
            "there is no null space to edit in; use another method"
        )
    return vectors @ vectors.T


def close(
    solved: Tensor,  # (r, d_ff): rows u = C⁻¹ k_left
    k_den: Tensor,  # (r, d_ff)
    residuals: Tensor,  # (r, d)
    *,
    columns: int = 1,
    earlier: int = 0,
    penalty: float | Tensor = 0.0,  # S: the same for every column, or (r,)
    harmless: float = math.inf,
) -> Factors:
    """The closed form, solved in fp64; rows in the order of `Factors`, `columns` for every edit, then `earlier`.

    Edits of one subject behind the same words have one key, which cannot have two values: where keys are linearly
    dependent, to `_WORST_CONDITION`, the least-squares update of least norm is taken, which meets such edits halfway.

    Keys that are nearly dependent can be told apart, at the price of an update that hurts the model and the other edits
    more than equality is worth. Where ‖Δ‖ exceeds both `harmless` and that of as many edits with nothing in common, the
    smallest singular values of Uᵀ K_den + S are raised until it does not: a regularised least squares, as MEMIT's, but
    one that is exact in all other directions.
    Raises EditError when a denominator is zero.
    """
    u, keys, r = (t.to(torch.float64) for t in (solved, k_den, residuals))
    own = len(u) - earlier
    edits = own // columns
    gram = u @ keys.T
    denominators = gram.diagonal()
    if not bool(torch.isfinite(gram).all()) or bool((denominators == 0).any()):
        raise EditError("the denominator uᵀk of an edit is zero or not finite; check the statistics")
    scale = denominators.abs().rsqrt()
    scaled = scale[:, None] * gram * scale
    penalties = torch.as_tensor(penalty, dtype=torch.float64, device=gram.device).expand(len(gram))
    scaled.diagonal().add_(penalties * scale**2)
    # Σ_i left_i (u_i · k_j) = r_j for every j, i.e. Gᵀ left = r; the unit diagonal keeps the solve well conditioned.
    condition = float(torch.linalg.cond(scaled)) if len(gram) > 1 else 1.0
    wanted, directions = scale[:, None] * r, scale[:, None] * u
    if condition < _WORST_CONDITION:
        left = torch.linalg.solve(scaled.T, wanted)
    else:
        left = torch.linalg.pinv(scaled.T, rtol=1 / _WORST_CONDITION) @ wanted
    numerators = r[:edits].norm(dim=1) * u[:edits].norm(dim=1)
    if columns == 1:
        update_norms = numerators / (denominators[:edits].abs() + penalties[:edits])
    else:
        update_norms = _alone(scaled[:own, :own], wanted[:own], directions[:own], columns)
    most = max(harmless, float(update_norms.norm()))
    if len(gram) > 1 and _norm(left, directions) > most:
        left = _held(scaled.T, wanted, directions, most)
    left = scale[:, None] * left
    off = (gram.T @ left - r)[:own].norm(dim=1)
    asked = r[:own].norm(dim=1)
    if columns > 1:
        off, asked = (t.reshape(columns, edits).norm(dim=0) for t in (off, asked))
    missed = torch.where(asked > 0, off / asked, 0.0)
    return Factors(left.T, u, denominators[:edits], numerators, update_norms, missed, _norm(left, u), condition)


def _alone(gram: Tensor, wanted: Tensor, directions: Tensor, columns: int) -> Tensor:
    """(edits,) ‖Δ‖ of every edit alone, made of its own columns."""
    edits = len(gram) // columns
    places = torch.arange(len(gram), device=gram.device).reshape(columns, edits).T
    own = gram[places.unsqueeze(2), places.unsqueeze(1)]
    left = torch.linalg.pinv(own.mT, rtol=1 / _WORST_CONDITION) @ wanted[places]
    products = (left @ left.mT) * (directions[places] @ directions[places].mT)
    return products.sum((1, 2)).clamp(min=0).sqrt()


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
