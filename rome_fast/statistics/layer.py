"""The second moment of one layer's keys, and the factor that solves with it."""

import bisect
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ArgumentError, StatisticsError
from ..models.fingerprint import Fingerprint

_RIDGES = [10.0**exponent for exponent in range(-12, 1)]
_POWER_STEPS = 20  # of both power iterations behind a condition number


@dataclass
class LayerStatistics:
    """The second moment of one layer's keys and where it came from."""

    layer: int
    moment: Tensor  # (d_ff, d_ff) fp32: mean of k kᵀ over `tokens` positions
    tokens: int
    fingerprint: Fingerprint
    provenance: dict[str, str] = field(default_factory=dict)
    # Added to the diagonal of C where it is solved with, in units of the mean of that diagonal; `moment` is without it.
    ridge: float = 0.0
    # ‖Δ‖ / ‖W‖ of one edit above which this model collapses, where a study has found it.
    collapse_limit: float | None = None
    _factor: tuple[torch.device, float, Tensor] | None = field(default=None, repr=False)

    def factor(self, device: torch.device, ridge: float | None = None) -> Tensor:
        """Lower Cholesky factor of C + ridge · mean(diag C) · I in fp64 (d_ff, d_ff), kept for the next call.

        `ridge` is that of the statistics unless given. Raises StatisticsError for fewer tokens than dimensions
        without a ridge, and where the matrix is not positive definite, with the ridge that would make it so.
        """
        ridge = self.ridge if ridge is None else ridge
        check_ridge(ridge)
        if self._factor is not None and self._factor[:2] == (device, ridge):
            return self._factor[2]
        width = self.moment.shape[0]
        if not bool(torch.isfinite(self.moment).all()):
            raise StatisticsError(f"statistics: C of layer {self.layer} contains NaN or infinity; collect it again")
        if not ridge and self.tokens < width:
            raise StatisticsError(
                f"statistics: C of layer {self.layer} is singular: it saw {self.tokens} tokens for {width} dimensions; "
                f"collect at least {2 * width}, or take a ridge ({_remedy(self.moment)}) or statistics='identity'"
            )
        # With wide layers this is the most memory that an edit needs: one copy, and what comes out of it.
        lower, info = torch.linalg.cholesky_ex(_ridged(self.moment.to(device), ridge))
        if int(info):
            moment = self.moment.to(device)
            raise StatisticsError(
                f"statistics: C of layer {self.layer} is singular (Cholesky stops at pivot {int(info)} of {width}"
                f"{_pivot(_ridged(moment, ridge), int(info))} where the diagonal is "
                f"{float(moment.diagonal().mean()):.1e} on average; it saw {self.tokens} tokens for {width} "
                f"dimensions); collect more tokens, or take a ridge ({_remedy(moment)}) or statistics='identity'"
            )
        self._factor = (device, ridge, lower)
        return lower

    def condition(self, device: torch.device, ridge: float | None = None) -> float:
        """Largest over smallest eigenvalue of the matrix that `factor` factors, by power iteration: a lower bound.

        Raises StatisticsError as `factor` does.
        """
        lower = self.factor(device, ridge)
        # Not all ones: an eigenvector may be orthogonal to anything as regular as that.
        start = torch.rand(lower.shape[0], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        largest = smallest = start.to(device)
        for _ in range(_POWER_STEPS):
            largest = lower @ (lower.T @ (largest / largest.norm()))
            smallest = torch.cholesky_solve(smallest / smallest.norm(), lower)
        return float(largest.norm() * smallest.norm())


def check_ridge(ridge: float) -> None:
    """Raise ArgumentError for a ridge that is no finite number from 0 on."""
    if not 0.0 <= ridge < float("inf"):
        raise ArgumentError(f"ridge: got {ridge}, wanted a finite number from 0 on, such as 1e-6")


def _ridged(moment: Tensor, ridge: float) -> Tensor:
    """A copy in fp64, the ridge added."""
    out = moment.to(torch.float64, copy=True)
    out.diagonal().add_(ridge * out.diagonal().mean())
    return out


def _pivot(matrix: Tensor, place: int) -> str:
    """What the pivot is that Cholesky finds not positive."""
    before = place - 1
    lower, info = torch.linalg.cholesky_ex(matrix[:before, :before])
    if int(info):
        # Those before it are rounding errors, too, whose signs depend on the order of sums.
        return ", which is 0 to rounding"
    row = torch.linalg.solve_triangular(lower, matrix[:before, before : before + 1], upper=False)
    return f", which is {float(matrix[before, before] - row.square().sum()):.1e}"


def _remedy(moment: Tensor) -> str:
    """The smallest power of ten that makes C positive definite, tried and not guessed."""

    def does(ridge: float) -> bool:
        return not int(torch.linalg.cholesky_ex(_ridged(moment, ridge))[1])

    if not does(_RIDGES[-1]):
        return f"none up to {_RIDGES[-1]:g} would do: this is no second moment"
    # Every try is a Cholesky factorisation, hence bisection.
    return f"ridge={_RIDGES[bisect.bisect_left(_RIDGES, True, key=does)]:.0e} would do"
