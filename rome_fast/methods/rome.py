"""ROME and its consistent variants, for one edit or several at once.

One edit:       Δ = r uᵀ / (uᵀ k_den),           u = C⁻¹ k_left     (Meng et al. 2022, equation 2)
Several:        Δ = R (Uᵀ K_den)⁻¹ Uᵀ,           U = C⁻¹ K_left     (equality constraints, as in EMMET)

ROME as released takes k_left from prefixed keys and k_den from the unprefixed one. Where the two differ widely, as
for a subject that is the first token, the denominator becomes small and the update destroys the model (Yang et al.
2024, "Understanding the Collapse of LLMs in Model Editing").
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, EditError


@dataclass(frozen=True)
class RomeVariant:
    """Which keys and which residual a variant uses."""

    name: str
    rows: Literal["prefixed", "all"]  # rows δ is optimised on and k̄ is the mean of; "all" adds the unprefixed one
    left: Literal["mean", "unprefixed"]
    denominator: Literal["mean", "unprefixed"]
    residual: Literal["delta", "to_unprefixed_value"]


METHODS: dict[str, RomeVariant] = {
    v.name: v
    for v in (
        RomeVariant("rome", "all", "mean", "unprefixed", "delta"),
        RomeVariant("c-rome-released", "all", "mean", "mean", "to_unprefixed_value"),
        RomeVariant("c-rome", "prefixed", "mean", "mean", "delta"),
        RomeVariant("p-rome", "all", "unprefixed", "unprefixed", "delta"),
    )
}


def variant(name: str) -> RomeVariant:
    if name not in METHODS:
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
    condition: float  # of Uᵀ K_den with its columns scaled to unit diagonal; 1 for one edit


def residual(method: RomeVariant, delta: Tensor, unprefixed_value: Tensor, mean_value: Tensor) -> Tensor:
    """What must be added to the value at k_den; all arguments (d,) or (r, d)."""
    if method.residual == "delta":
        return delta
    return unprefixed_value + delta - mean_value


def close(
    solved: Tensor,  # (r, d_ff): rows u = C⁻¹ k_left
    k_den: Tensor,  # (r, d_ff)
    residuals: Tensor,  # (r, d)
) -> Factors:
    """The closed form, solved in fp64.

    Raises EditError when a denominator is zero or the edits' keys are linearly dependent.
    """
    u, keys, r = (t.to(torch.float64) for t in (solved, k_den, residuals))
    gram = u @ keys.T
    denominators = gram.diagonal()
    if not bool(torch.isfinite(gram).all()) or bool((denominators == 0).any()):
        raise EditError("the denominator uᵀk of an edit is zero or not finite; check the statistics")
    numerators = r.norm(dim=1) * u.norm(dim=1)
    scale = denominators.abs().rsqrt()
    scaled = scale[:, None] * gram * scale
    condition = float(torch.linalg.cond(scaled)) if len(gram) > 1 else 1.0
    if not condition < 1e12:
        raise EditError(
            f"the edits' keys are linearly dependent (condition {condition:.1e}); "
            "two requests probably share subject and prompt: drop one, or edit them sequentially"
        )
    # Σ_i left_i (u_i · k_j) = r_j for every j, i.e. Gᵀ left = r; the unit diagonal keeps the solve well conditioned.
    left = scale[:, None] * torch.linalg.solve(scaled.T, scale[:, None] * r)
    return Factors(left.T, u, denominators, numerators, numerators / denominators.abs(), condition)
