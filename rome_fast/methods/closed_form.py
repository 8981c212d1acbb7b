"""The closed form: columns in, the factors of an update out. Pure functions, solved in fp64.

One column:  Δ = r uᵀ / (uᵀ k),             u = C⁻¹ k_left     (Meng et al. 2022, equation 2)
Several:     Δ = R (Uᵀ K + S)⁻¹ Uᵀ,         U = C⁻¹ K_left     (S = 0: equality constraints, as in EMMET)

`rome_fast.methods.method` says what the columns are and what S is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EditError, StatisticsError

FIRST_TOKEN_WEIGHT = 0.3
"""λ of C + λ C₁, with which the keys of first tokens are solved for; see docs/dual.md for what other weights do."""

# Of the edits' keys, beyond which they are linearly dependent, and what tells them apart is rounding.
_WORST_CONDITION = 1e6
_HALVINGS = 40  # of the search for a limit on ‖Δ‖: to rounding
_SMALL = 512  # columns, up to which the condition is taken from singular values
_VECTORS, _POWERS = 4, 12  # of iterations for an estimate of it
_TOGETHER = 256  # edits whose own updates are measured at a time
_BLOCK = 1024  # rows of products (columns, columns) that are only summed


@dataclass(frozen=True)
class Factors:
    """Δ = left @ right, and what a reader wants to know about each of `edits` in it.

    Of r columns, those at places e, edits + e, 2 edits + e, … belong to edit e; columns of earlier batches are last.
    """

    left: Tensor  # (d, r), or of fewer columns where there are earlier ones
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


def raised_factor(factor: Tensor | None, added: float, width: int) -> Tensor:
    """Lower Cholesky factor of C + added · I, (d_ff, d_ff) fp64, from that of C (None for C = I)."""
    if factor is None:
        return math.sqrt(1 + added) * torch.eye(width, dtype=torch.float64, device="cpu")
    lower = factor.to(torch.float64)
    raised = lower @ lower.T
    raised.diagonal().add_(added)
    return torch.linalg.cholesky(raised)


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
    denominators = gram.diagonal().clone()
    # The sum of finite numbers, and of no others, is finite: nothing of the matrix's size is made to see it.
    if not bool(torch.isfinite(gram.sum())) or bool((denominators == 0).any()):
        raise EditError("the denominator uᵀk of an edit is zero or not finite; check the statistics")
    scale = denominators.abs().rsqrt()
    scaled = gram.mul_(scale[:, None]).mul_(scale)
    penalties = torch.as_tensor(penalty, dtype=torch.float64, device=scaled.device).expand(len(scaled))
    added = penalties * scale**2
    scaled.diagonal().add_(added)
    # Σ_i left_i (u_i · k_j) = r_j for every j, i.e. Gᵀ left = r; the unit diagonal keeps the solve well conditioned.
    wanted = scale[:, None] * r
    left, condition = _solved(scaled.T, wanted)
    numerators = r[:edits].norm(dim=1) * u[:edits].norm(dim=1)
    if columns == 1:
        update_norms = numerators / (denominators[:edits].abs() + penalties[:edits])
    else:
        update_norms = _alone(scaled, wanted, u, scale, edits, columns)
    most = max(harmless, float(update_norms.norm()))
    norm = _norm(scale[:, None] * left, u)
    if len(scaled) > 1 and norm > most:
        left = _held(scaled.T, wanted, scale[:, None] * u, most)
        norm = _norm(scale[:, None] * left, u)
    off = ((scaled.T @ left - added[:, None] * left) / scale[:, None] - r)[:own].norm(dim=1)
    asked = r[:own].norm(dim=1)
    if columns > 1:
        off, asked = (t.reshape(columns, edits).norm(dim=0) for t in (off, asked))
    missed = torch.where(asked > 0, off / asked, 0.0)
    left, right = (scale[:, None] * left).T, u
    if earlier:
        # As their residuals are zero, Δ has the column space of the others, and no more than their number of factors.
        basis = torch.linalg.qr(r[:own].T).Q
        left, right = basis, (basis.T @ left) @ right
    return Factors(left, right, denominators[:edits], numerators, update_norms, missed, norm, condition)


@dataclass(frozen=True)
class Cost:
    """What it takes to solve for u and to close, at one layer."""

    flops: float  # in fp64; a product of (m, k) and (k, n) is 2 m k n
    bytes: int  # at most at a time: C's factor, the columns as they come in, and all that is made of them


def cost_of(columns: int, d_ff: int, d: int) -> Cost:
    """Of so many columns with a condition below `_WORST_CONDITION`, which are not held."""
    r = columns
    factor = 2 * d_ff**3 / 3  # of C, and of C + λ C₁
    solving = 2 * r * d_ff**2
    # Uᵀ K, the norm of all of Δ, and what is left off.
    products = 2 * r**2 * d_ff + r * (r + min(r, _BLOCK)) * (d + d_ff) + 2 * r**2 * d
    decomposed = 2 * r**3 / 3 + 2 * r**2 * d
    condition = 8 * r**2 * _VECTORS * _POWERS if r > _SMALL else 20 * r**3
    # u and k as they come, in fp32, and in fp64; the Gram matrix, its transpose and its decomposition; R and left.
    tensors = 12 * 2 * r * d_ff + 8 * 4 * r**2 + 8 * 4 * r * d + 8 * d_ff**2
    return Cost(factor + solving + products + condition + decomposed, tensors)


def _solved(gram: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
    """x of gram x = wanted, of least norm where rows are dependent, and the condition of gram."""
    if len(gram) <= _SMALL:
        condition = float(torch.linalg.cond(gram)) if len(gram) > 1 else 1.0
        if condition < _WORST_CONDITION:
            return torch.linalg.solve(gram, wanted), condition
    else:
        # Singular values take thirty times as long as the solution.
        lower_upper, pivots, info = torch.linalg.lu_factor_ex(gram)
        condition = math.inf if int(info) else _estimated_condition(gram, lower_upper, pivots)
        if condition < _WORST_CONDITION:
            return torch.linalg.lu_solve(lower_upper, pivots, wanted), condition
    return torch.linalg.pinv(gram, rtol=1 / _WORST_CONDITION) @ wanted, condition


def _estimated_condition(gram: Tensor, lower_upper: Tensor, pivots: Tensor) -> float:
    """σ₁ / σₙ by power iterations with GᵀG and its inverse, each from below (Golub & Van Loan, section 8.2)."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(len(gram), _VECTORS, generator=generator, dtype=gram.dtype, device="cpu").to(gram.device)

    def largest(apply: Callable[[Tensor], Tensor]) -> float:
        basis = torch.linalg.qr(start).Q
        for _ in range(_POWERS):
            image = apply(basis)
            if not bool(torch.isfinite(image).all()):
                return math.inf
            basis = torch.linalg.qr(image).Q
        return float(torch.linalg.matrix_norm(apply(basis), 2))

    def inverse(x: Tensor) -> Tensor:
        return torch.linalg.lu_solve(lower_upper, pivots, torch.linalg.lu_solve(lower_upper, pivots, x, adjoint=True))

    return math.sqrt(largest(lambda x: gram.T @ (gram @ x)) * largest(inverse))


def _alone(gram: Tensor, wanted: Tensor, u: Tensor, scale: Tensor, edits: int, columns: int) -> Tensor:
    """(edits,) ‖Δ‖ of every edit alone, made of its own columns."""
    places = torch.arange(columns * edits, device=gram.device).reshape(columns, edits).T
    norms = []
    for some in places.split(_TOGETHER):
        own = gram[some.unsqueeze(2), some.unsqueeze(1)]
        left = torch.linalg.pinv(own.mT, rtol=1 / _WORST_CONDITION) @ wanted[some]
        directions = scale[some].unsqueeze(2) * u[some]
        products = (left @ left.mT) * (directions @ directions.mT)
        norms.append(products.sum((1, 2)).clamp(min=0).sqrt())
    return torch.cat(norms)


def _norm(left: Tensor, right: Tensor) -> float:
    """‖leftᵀ right‖ of factors (r, d) and (r, d_ff): the sum of a symmetric matrix (r, r), of which blocks are made."""
    total = left.new_zeros(())
    for start in range(0, len(left), _BLOCK):
        own, others = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        total += ((left[own] @ left[own].T) * (right[own] @ right[own].T)).sum()
        total += 2 * ((left[own] @ left[others].T) * (right[own] @ right[others].T)).sum()
    return float(total.clamp(min=0).sqrt())


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
