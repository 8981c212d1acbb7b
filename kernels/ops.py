"""The public ops: check the arguments, then call the backend. Nothing is written when a check fails."""

import torch
from torch import Tensor

from . import reference

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDE = (torch.float32, torch.float64)


def _check(name: str, value: Tensor, dims: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted one of {wanted}; convert it with .to()")
    if value.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {dims} dimension(s)")
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, wanted {device} like the first argument; move it")


def _check_size(name: str, got: int, wanted: int, what: str) -> None:
    if got != wanted:
        raise ValueError(f"{name}: got {got} {what}, wanted {wanted}")


def second_moment_(
    total: Tensor,  # (d, d) fp32 | fp64
    x: Tensor,  # (n, d) bf16 | fp16 | fp32 | fp64
    mask: Tensor | None = None,  # (n,) bool
) -> Tensor:
    """total += XᵀX over the unmasked rows, in place.

    Only the lower triangle (with the diagonal) is defined until `mirror_lower_` is called once at the end.
    Products are accumulated in fp32 per call (fp64 for fp64 rows) and added to `total` in its own dtype.

    Raises TypeError for a dtype, ValueError for a shape, device or aliasing that does not fit.
    """
    _check("total", total, 2, _WIDE, total.device)
    _check("x", x, 2, _FLOATS, total.device)
    _check_size("total", total.shape[0], total.shape[1], "rows for a square matrix")
    _check_size("x", x.shape[1], total.shape[1], "columns")
    if mask is not None:
        _check("mask", mask, 1, (torch.bool,), total.device)
        _check_size("mask", mask.shape[0], x.shape[0], "entries")
    if total.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and x.numel():
        raise ValueError("x shares memory with total; pass a copy")
    return reference.second_moment_ref_(total, x, mask)


def mirror_lower_(total: Tensor) -> Tensor:  # (d, d) fp32 | fp64
    """Copy the lower triangle onto the upper one, in place: the last step of a second moment."""
    _check("total", total, 2, _WIDE, total.device)
    _check_size("total", total.shape[0], total.shape[1], "rows for a square matrix")
    return reference.mirror_lower_ref_(total)


def prefixed_solve(
    keys: Tensor,  # (n, d_ff) fp32 | fp64 | bf16 | fp16: keys of all edits' rows
    groups: Tensor,  # (n,) int64: which edit a key belongs to, 0 .. count - 1
    count: int,  # number of edits
    factor: Tensor | None,  # (d_ff, d_ff) fp32 | fp64: lower Cholesky factor of C; None means C = I
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key per edit, C⁻¹ applied to it, and all inner products between the two.

    Returns `mean` (count, d_ff), `solved` = mean · C⁻¹ (count, d_ff) and `gram` = solved · meanᵀ (count, count),
    whose diagonal holds the denominators uᵀk̄ of rank-one edits; all in the dtype of `factor` (of `keys` for None).

    Raises TypeError for a dtype, ValueError for a shape, device, an id out of range or an edit without keys.
    """
    _check("keys", keys, 2, _FLOATS, keys.device)
    _check("groups", groups, 1, (torch.int64,), keys.device)
    _check_size("groups", groups.shape[0], keys.shape[0], "entries")
    if factor is not None:
        _check("factor", factor, 2, _WIDE, keys.device)
        _check_size("factor", factor.shape[0], factor.shape[1], "rows for a square matrix")
        _check_size("factor", factor.shape[0], keys.shape[1], "rows")
    present = torch.unique(groups)
    if count < 1 or present.numel() != count or int(present[0]) != 0 or int(present[-1]) != count - 1:
        raise ValueError(f"groups: wanted every id of 0 .. {count - 1} at least once, got {present.tolist()[:20]}")
    return reference.prefixed_solve_ref(keys, groups, count, factor)


def rank_update_(
    weight: Tensor,  # (d, d_ff) bf16 | fp16 | fp32 | fp64; a transposed view is fine
    left: Tensor,  # (d, r) fp32 | fp64
    right: Tensor,  # (r, d_ff) fp32 | fp64
) -> Tensor:
    """W += left @ right in place, added in fp32 (fp64 for fp64 weights) and rounded to the dtype of W once.

    Raises TypeError for a dtype, ValueError for a shape, device or aliasing that does not fit.
    """
    _check("weight", weight, 2, _FLOATS, weight.device)
    _check("left", left, 2, _WIDE, weight.device)
    _check("right", right, 2, _WIDE, weight.device)
    _check_size("left", left.shape[0], weight.shape[0], "rows")
    _check_size("right", right.shape[1], weight.shape[1], "columns")
    _check_size("right", right.shape[0], left.shape[1], "rows")
    for name, factor in (("left", left), ("right", right)):
        if factor.numel() and factor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            raise ValueError(f"{name} shares memory with weight; pass a copy")
    return reference.rank_update_ref_(weight, left, right)


def low_rank_apply_(
    y: Tensor,  # (n, d) bf16 | fp16 | fp32 | fp64: outputs of the unedited projection
    x: Tensor,  # (n, d_ff): its inputs
    left: Tensor,  # (m, d): one column factor per edit
    right: Tensor,  # (m, d_ff): one row factor per edit
    ids: Tensor,  # (n,) int64: which edit a row sees; negative for none
) -> Tensor:
    """y[row] += left[id] · (right[id] · x[row]): many single-edit models evaluated in one forward, in place.

    Raises TypeError for a dtype, ValueError for a shape, device or an id out of range.
    """
    _check("y", y, 2, _FLOATS, y.device)
    for name, value in (("x", x), ("left", left), ("right", right)):
        _check(name, value, 2, _FLOATS, y.device)
    _check("ids", ids, 1, (torch.int64,), y.device)
    _check_size("x", x.shape[0], y.shape[0], "rows")
    _check_size("ids", ids.shape[0], y.shape[0], "entries")
    _check_size("left", left.shape[1], y.shape[1], "columns")
    _check_size("right", right.shape[1], x.shape[1], "columns")
    _check_size("right", right.shape[0], left.shape[0], "rows")
    if ids.numel() and int(ids.max()) >= left.shape[0]:
        raise ValueError(f"ids: got {int(ids.max())}, wanted less than the {left.shape[0]} edits given")
    return reference.low_rank_apply_ref_(y, x, left, right, ids)
