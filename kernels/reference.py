"""Every op in plain torch: the definition, the oracle of faster backends and the fallback.

Arguments are taken as valid; the checks live in `ops.py`.
"""

import torch
from torch import Tensor

_CHAIN_ROWS = 8192


def second_moment_ref_(total: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """total += XᵀX over the rows of X where mask is true; at least the lower triangle is brought up to date.

    Products of at most `_CHAIN_ROWS` rows are taken in fp32 (fp64 for fp64 rows) and added to `total` in the dtype of
    `total`: a product of a few thousand rows loses little in fp32, a sum over millions of them needs fp64.
    """
    rows = x if mask is None else x[mask]
    wide = torch.promote_types(rows.dtype, torch.float32)
    for part in rows.split(_CHAIN_ROWS):
        part = part.to(wide)
        # Not addmm_, which would go on summing in `total`: that has twice the error where `total` is fp32.
        total.add_(part.T @ part)
    return total


def mirror_lower_ref_(total: Tensor) -> Tensor:
    """Copy the lower triangle of a square matrix onto its upper one."""
    lower = total.tril(-1)
    return total.tril_().add_(lower.T)


def solve_dtype(keys: Tensor, factor: Tensor | None, inverse: Tensor | None) -> torch.dtype:
    """What a solve computes in: the dtype of the matrix given, of the keys for C = I."""
    matrix = factor if factor is not None else inverse
    return keys.dtype if matrix is None else matrix.dtype


def prefixed_solve_ref(
    keys: Tensor, groups: Tensor, count: int, factor: Tensor | None, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k̄_g = mean of the keys of group g,  U = K̄ C⁻¹ with C = L Lᵀ,  G = U K̄ᵀ (its diagonal: u_g · k̄_g)."""
    dtype = solve_dtype(keys, factor, inverse)
    mean = torch.zeros(count, keys.shape[1], dtype=dtype, device=keys.device)
    mean.index_add_(0, groups, keys.to(dtype))
    mean /= torch.bincount(groups, minlength=count).to(dtype).unsqueeze(1)
    return mean, *solve_mean_ref(mean, factor, inverse)


def solve_mean_ref(mean: Tensor, factor: Tensor | None, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """U and G of `prefixed_solve_ref` for given means; with both matrices, one step of refinement of K̄ C⁻¹."""
    if inverse is not None:
        solved = mean @ inverse
        if factor is not None:
            solved += (mean - solved @ factor @ factor.T) @ inverse
        return solved, solved @ mean.T
    if factor is None:
        return mean.clone(), mean @ mean.T
    # Two triangular solves beat cholesky_solve for many right-hand sides.
    half = torch.linalg.solve_triangular(factor, mean.T, upper=False)
    return torch.linalg.solve_triangular(factor.T, half, upper=True).T, half.T @ half


def solve_residual_ref(mean: Tensor, solved: Tensor, factor: Tensor) -> Tensor:
    """‖u C − k̄‖ / ‖k̄‖ for every row."""
    rest = solved @ factor @ factor.T - mean
    return torch.linalg.vector_norm(rest, dim=1) / torch.linalg.vector_norm(mean, dim=1)


def rank_update_ref_(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W += left @ right, added in fp32 (fp64 for fp64 weights) and rounded to the dtype of W once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == wide:
        # One pass; addcmul_ is the quicker of the two (12 and 14 ms for 4096 x 11008 in fp32 on a Zen 3 core).
        add = weight.addcmul_ if left.shape[1] == 1 else weight.addmm_
        return add(left.to(wide), right.to(wide))
    return weight.copy_(weight.to(wide) + left.to(wide) @ right.to(wide))


def low_rank_apply_ref_(y: Tensor, x: Tensor, left: Tensor, right: Tensor, ids: Tensor) -> Tensor:
    """y[row] += left[ids[row]] · (right[ids[row]] · x[row]); rows whose id is negative are left alone."""
    rows = (ids >= 0).nonzero().squeeze(1)
    chosen = ids[rows]
    wide = torch.promote_types(y.dtype, torch.float32)
    scale = (right[chosen].to(wide) * x[rows].to(wide)).sum(-1, keepdim=True)
    y[rows] = (y[rows].to(wide) + left[chosen].to(wide) * scale).to(y.dtype)
    return y
