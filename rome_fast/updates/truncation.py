"""The best approximation of an update by one of a smaller rank, from its factors.

‖(Δ − Δᵣ) L‖ is least, over all Δᵣ of rank r, where Δᵣ L = U Uᵀ Δ L with U the first r left singular vectors of Δ L
(Eckart and Young 1936): for Δᵣ = U Uᵀ Δ, whatever invertible L is. With L = I that is the nearest matrix; with C = L Lᵀ
the one whose outputs, on keys distributed as C, are nearest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError


@dataclass(frozen=True)
class Truncation:
    """How far an update of a smaller rank is off."""

    rank: int
    of: int  # the rank there was
    error: float  # ‖Δ − Δᵣ‖ / ‖Δ‖, Frobenius
    output_error: float | None  # ‖(Δ − Δᵣ) C^½‖ / ‖Δ C^½‖: of outputs on keys distributed as C; None without C


def check_rank(rank: object) -> None:
    """Raise ArgumentError for a rank that no adapter can have."""
    if type(rank) is not int or rank < 1:
        raise ArgumentError(f"rank: got {rank!r}, wanted a whole number from 1 on, or None for that of the update")


def truncated(
    left: Tensor,  # (d, n) fp32 | fp64
    right: Tensor,  # (n, d_ff) same dtype
    rank: int,
    factor: Tensor | None,  # L (d_ff, d_ff) of C = L Lᵀ; None where there is no C
) -> tuple[Tensor, Tensor, Truncation]:
    """left (d, r) and right (r, d_ff) of Δᵣ, in the dtype given; the factors themselves where their rank is no higher.

    The outputs are nearest where there is a C, otherwise the matrix.
    """
    n = left.shape[1]
    if rank >= n:
        return left, right, Truncation(n, n, 0.0, None if factor is None else 0.0)
    wide = right.to(torch.float64)
    basis, core = torch.linalg.qr(left.to(torch.float64))
    # Of Δ = basis · plain · (orthonormal rows), and so of Δ L.
    plain = core @ torch.linalg.qr(wide.T, mode="r").R.T
    weighted = None if factor is None else core @ torch.linalg.qr((wide @ factor.to(wide)).T, mode="r").R.T
    first = torch.linalg.svd(plain if weighted is None else weighted).U[:, :rank]

    def off(image: Tensor) -> float:
        norm = float(image.norm())
        return float((image - first @ (first.T @ image)).norm()) / norm if norm else 0.0

    about = Truncation(rank, n, off(plain), None if weighted is None else off(weighted))
    return (basis @ first).to(left), (first.T @ core @ wide).to(right), about
