"""Does an update belong to this weight, and is it in there already? A few elements tell, before and after a cast."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SPREAD = 16  # elements all over the weight, which tell one model from another
_TELLING = 16  # elements that the update changes most beside what they are, which tell before from after
_COLUMNS = 8  # of the weight, to find those in
# A cast to bf16 moves a value by at most 2⁻⁹ of itself: once where the sample was taken, once in the weight that it is
# compared with, and once more where the update was added to a rounded weight.
_RELATIVE = 2.0**-7
# The step of fp16 near zero.
_ABSOLUTE = 2.0**-24


@dataclass(frozen=True)
class Sample:
    """Some elements of a weight as an update found them, in the (d, d_ff) orientation."""

    rows: Tensor  # (n,) int64, as is the next; all three on the CPU
    columns: Tensor
    before: Tensor  # (n,) fp64

    @classmethod
    def of(cls, weight: Tensor, left: Tensor, right: Tensor) -> "Sample":
        """Of a weight (d, d_ff) that has yet to get the update left (d, r) @ right (r, d_ff)."""
        d, d_ff = weight.shape
        device = weight.device
        left, right = left.to(device), right.to(device)
        spread = min(_SPREAD, d * d_ff)
        flat = torch.linspace(0, d * d_ff - 1, spread, dtype=torch.float64, device="cpu").round().long()
        size = (left.norm(dim=0)[:, None] * right).norm(dim=0)
        columns = size.topk(min(_COLUMNS, d_ff)).indices
        change = (left @ right[:, columns]).abs()
        beside = weight[:, columns].to(change.dtype).abs() + change.mean() + torch.finfo(change.dtype).tiny
        telling = (change / beside).flatten().topk(min(_TELLING, change.numel())).indices.cpu()
        rows = torch.cat([flat // d_ff, telling // len(columns)])
        columns = torch.cat([flat % d_ff, columns.cpu()[telling % len(columns)]])
        return cls(rows, columns, _elements(weight, rows, columns))

    def found_in(self, weight: Tensor, left: Tensor, right: Tensor) -> tuple[bool, bool]:
        """Whether a weight is the one the update is for, and whether it is that one with the update.

        Both where the update is too small to tell.
        """
        if int(self.rows.max()) >= weight.shape[0] or int(self.columns.max()) >= weight.shape[1]:
            return False, False
        change = (left[self.rows.to(left.device)] * right.T[self.columns.to(right.device)]).double().sum(1).cpu()
        after = self.before + change
        now = _elements(weight, self.rows, self.columns)
        tolerance = _RELATIVE * torch.maximum(self.before.abs(), after.abs()) + _ABSOLUTE
        return bool(((now - self.before).abs() <= tolerance).all()), bool(((now - after).abs() <= tolerance).all())

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows.tolist(), "columns": self.columns.tolist(), "before": self.before.tolist()}

    @classmethod
    def from_json(cls, fields: Any) -> "Sample":
        """Raises ValueError, KeyError or TypeError for anything that `to_json` does not give."""
        rows, columns = (torch.tensor(fields[name], dtype=torch.int64, device="cpu") for name in ("rows", "columns"))
        before = torch.tensor(fields["before"], dtype=torch.float64, device="cpu")
        if not rows.shape == columns.shape == before.shape == (len(before),) or not len(rows):
            raise ValueError("a sample of rows, columns and values of different numbers")
        if int(torch.minimum(rows, columns).min()) < 0:
            raise ValueError("a sample of negative rows or columns")
        return cls(rows, columns, before)


def _elements(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return weight.detach()[rows.to(weight.device), columns.to(weight.device)].double().cpu()
