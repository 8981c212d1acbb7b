"""The public ops: check the arguments, then call the operator. Nothing is written when a check fails.

What an index tensor holds is checked on a CPU only: on a GPU that would wait for all the work before it. While
torch.compile traces, only what a shape or dtype tells is checked.
"""

import math

import torch
from torch import Tensor

from . import operators, reference

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


def _check_target(name: str, value: Tensor) -> None:
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        raise ValueError(
            f"{name}: got an expanded tensor whose elements share memory, wanted one to write to; clone it"
        )


def _check_apart(name: str, value: Tensor, target_name: str, target: Tensor) -> None:
    # A tensor that is traced has no memory yet.
    if torch.compiler.is_compiling():
        return
    if value.numel() and value.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
        raise ValueError(f"{name} shares memory with {target_name}; pass a copy")


def _may_read(index: Tensor) -> bool:
    return index.device.type == "cpu" and not torch.compiler.is_compiling()


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
    Products of some thousand rows at a time are summed in fp32 (fp64 for fp64 rows) and added to `total` in its own
    dtype. An fp64 total stays within 1e-6 of float64 (Frobenius norm of the error over that of the sum) over 10⁶ rows
    in 1,000 calls: take one for a corpus. An fp32 total, half the memory, rounds once more per call or oftener, which
    adds up to more than that where the calls are many and alike.

    Raises TypeError for a dtype, ValueError for a shape, device or aliasing that does not fit.
    """
    _check("total", total, 2, _WIDE, total.device)
    _check("x", x, 2, _FLOATS, total.device)
    _check_size("total", total.shape[0], total.shape[1], "rows for a square matrix")
    _check_size("x", x.shape[1], total.shape[1], "columns")
    if mask is not None:
        _check("mask", mask, 1, (torch.bool,), total.device)
        _check_size("mask", mask.shape[0], x.shape[0], "entries")
    _check_target("total", total)
    _check_apart("x", x, "total", total)
    operators.second_moment_(total, x, mask)
    return total


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
    inverse: Tensor | None = None,  # (d_ff, d_ff) of the dtype of factor: C⁻¹, symmetric
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key per edit, C⁻¹ applied to it, and all inner products between the two.

    Returns `mean` (count, d_ff), `solved` = mean · C⁻¹ (count, d_ff) and `gram` = solved · meanᵀ (count, count),
    whose diagonal holds the denominators uᵀk̄ of rank-one edits; all in the dtype of the matrix given (of `keys` for
    none). An inverse replaces the solve by a product; with the factor beside it, one step of refinement follows.
    `solve_residual` says how good the result is.

    Raises TypeError for a dtype, ValueError for a shape, device, an id out of range or an edit without keys. On a GPU
    ids are not checked: there a single edit takes all keys as its own, and of several edits a key with an id out of
    range belongs to none, and the mean of no keys is NaN.
    """
    _check("keys", keys, 2, _FLOATS, keys.device)
    _check("groups", groups, 1, (torch.int64,), keys.device)
    _check_size("groups", groups.shape[0], keys.shape[0], "entries")
    for name, matrix in (("factor", factor), ("inverse", inverse)):
        if matrix is not None:
            _check(name, matrix, 2, _WIDE, keys.device)
            _check_size(name, matrix.shape[0], matrix.shape[1], "rows for a square matrix")
            _check_size(name, matrix.shape[0], keys.shape[1], "rows")
    if factor is not None and inverse is not None and factor.dtype != inverse.dtype:
        raise TypeError(f"inverse: got dtype {inverse.dtype}, wanted {factor.dtype} like factor; convert it with .to()")
    if count < 1:
        raise ValueError(f"count: got {count}, wanted at least 1")
    if _may_read(groups):
        present = torch.unique(groups).tolist()
        if present != list(range(count)):
            raise ValueError(f"groups: wanted every id of 0 .. {count - 1} at least once, got {present[:20]}")
    return operators.prefixed_solve(keys, groups, count, factor, inverse)


def solve_residual(
    mean: Tensor,  # (count, d_ff) fp32 | fp64
    solved: Tensor,  # (count, d_ff), of the same dtype: mean · C⁻¹
    factor: Tensor,  # (d_ff, d_ff), of the same dtype: lower Cholesky factor of C
) -> Tensor:  # (count,)
    """‖C u − k̄‖ / ‖k̄‖ of every edit: how well `solved` solves.

    Raises TypeError for a dtype, ValueError for a shape or device that does not fit.
    """
    _check("mean", mean, 2, _WIDE, mean.device)
    _check("solved", solved, 2, (mean.dtype,), mean.device)
    _check("factor", factor, 2, (mean.dtype,), mean.device)
    _check_size("solved", solved.shape[0], mean.shape[0], "rows")
    for name, value in (("solved", solved), ("factor", factor)):
        _check_size(name, value.shape[1], mean.shape[1], "columns")
    _check_size("factor", factor.shape[0], factor.shape[1], "rows for a square matrix")
    return reference.solve_residual_ref(mean, solved, factor)


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
    _check_target("weight", weight)
    _check_apart("left", left, "weight", weight)
    _check_apart("right", right, "weight", weight)
    operators.rank_update_(weight, left, right)
    return weight


def low_rank_apply_(
    y: Tensor,  # (n, d) bf16 | fp16 | fp32 | fp64: outputs of the unedited projection
    x: Tensor,  # (n, d_ff): its inputs
    left: Tensor,  # (m, d): one column factor per edit
    right: Tensor,  # (m, d_ff): one row factor per edit
    ids: Tensor,  # (n,) int64: which edit a row sees; negative for none
) -> Tensor:
    """y[row] += left[id] · (right[id] · x[row]): many single-edit models evaluated in one forward, in place.

    Raises TypeError for a dtype, ValueError for a shape, device, aliasing or an id out of range. On a GPU, where ids
    are not looked at, an id out of range makes its row NaN.
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
    if _may_read(ids) and ids.numel() and int(ids.max()) >= left.shape[0]:
        raise ValueError(f"ids: got {int(ids.max())}, wanted less than the {left.shape[0]} edits given")
    _check_target("y", y)
    for name, value in (("x", x), ("left", left), ("right", right)):
        _check_apart(name, value, "y", y)
    operators.low_rank_apply_(y, x, left, right, ids)
    return y


def suffix_attention(
    query: Tensor,  # (rows, heads, time, head_size) bf16 | fp16 | fp32 | fp64
    key: Tensor,  # (rows, kv_heads, time, head_size), of the dtype of query as are all keys and values
    value: Tensor,  # (rows, kv_heads, time, head_size)
    context_keys: Tensor,  # (contexts, kv_heads, longest, head_size)
    context_values: Tensor,  # (contexts, kv_heads, longest, head_size)
    context_index: Tensor,  # (rows,) int64: which context a row has
    context_seen: Tensor,  # (rows,) int64: how many of its first positions the row sees
    middle_keys: Tensor | None = None,  # (rows, kv_heads, middle, head_size), padded behind
    middle_values: Tensor | None = None,  # (rows, kv_heads, middle, head_size)
    middle_seen: Tensor | None = None,  # (rows,) int64: how many of the middle's first positions are there
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,  # (heads,) bf16 | fp16 | fp32 | fp64
) -> Tensor:  # (rows, heads, time, head_size), laid out in memory like query
    """softmax(scores) · values of a few new positions per row, behind a frozen past that rows share in part.

    A row's keys are those of its context that it sees, then of its middle, then of the suffix itself up to the query;
    positions are counted so from 0. Of query i and key j, with x = scale · q_i · k_j:

        score = soft_cap · tanh(x / soft_cap) + slope of the head · (j − i),  −∞ where j > i or j ≤ i − window

    and without the parts that are None (soft cap: Gemma 2, arXiv 2408.00118; slopes: ALiBi, Press et al., arXiv
    2108.12409). Query head h reads key head h // (heads / kv_heads). What is not seen may be anything, NaN included.
    Scores, weights and sums are in fp32 (fp64 for fp64 queries). On a GPU the products of 16-bit queries are of 16-bit
    factors, weights and gradients of scores included.

    Query, key and value get a gradient, which is the same in every run; the past, being frozen, gets none.

    Raises TypeError for a dtype, ValueError for a shape, a device, a past that wants a gradient, a number out of range.
    On a GPU, where index tensors are not looked at, an index or a number of positions out of range makes its row NaN.
    """
    _check("query", query, 4, _FLOATS, query.device)
    rows, heads, _, head_size = query.shape
    past = {"context_keys": context_keys, "context_values": context_values}
    counts = {"context_index": context_index, "context_seen": context_seen}
    middle = {"middle_keys": middle_keys, "middle_values": middle_values, "middle_seen": middle_seen}
    given = {name: x for name, x in middle.items() if x is not None}
    if given and len(given) < len(middle):
        raise ValueError(f"{', '.join(middle.keys() - given)}: got None, wanted all three of the middle or none")
    counts |= {name: x for name, x in given.items() if name == "middle_seen"}
    past |= {name: x for name, x in given.items() if name != "middle_seen"}
    for name, x in ({"key": key, "value": value} | past).items():
        _check(name, x, 4, (query.dtype,), query.device)
        _check_size(name, x.shape[3], head_size, "elements per head")
        _check_size(name, x.shape[1], key.shape[1], "key heads")
    for name, count in counts.items():
        _check(name, count, 1, (torch.int64,), query.device)
        _check_size(name, count.shape[0], rows, "entries")
    if not head_size or not key.shape[1] or heads % key.shape[1]:
        raise ValueError(
            f"query: got {heads} heads of size {head_size}, wanted a multiple of the {key.shape[1]} of key"
        )
    for name, x, like in (("key", key, query), ("value", value, query)):
        _check_size(name, x.shape[0], like.shape[0], "rows")
        _check_size(name, x.shape[2], like.shape[2], "positions")
    _check_size("context_values", context_values.shape[0], context_keys.shape[0], "contexts")
    _check_size("context_values", context_values.shape[2], context_keys.shape[2], "positions")
    if middle_keys is not None and middle_values is not None:
        _check_size("middle_keys", middle_keys.shape[0], rows, "rows")
        _check_size("middle_values", middle_values.shape[0], rows, "rows")
        _check_size("middle_values", middle_values.shape[2], middle_keys.shape[2], "positions")
    if slopes is not None:
        _check("slopes", slopes, 1, _FLOATS, query.device)
        _check_size("slopes", slopes.shape[0], heads, "entries")
        past["slopes"] = slopes
    for name, x in past.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: wants a gradient, and what is frozen gets none; detach it")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, wanted a finite number")
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap: got {soft_cap}, wanted a finite number above 0, or None")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1, which is the query's own position, or None")
    limits = {"context_index": context_keys.shape[0] - 1, "context_seen": context_keys.shape[2]}
    if middle_keys is not None:
        limits["middle_seen"] = middle_keys.shape[2]
    for name, count in counts.items():
        if rows and _may_read(count):
            least, most = map(int, count.aminmax())
            if least < 0 or most > limits[name]:
                raise ValueError(f"{name}: got {least} to {most}, wanted 0 to {limits[name]}")
    output, _ = operators.suffix_attention(
        query,
        key,
        value,
        context_keys,
        context_values,
        context_index,
        context_seen,
        middle_keys,
        middle_values,
        middle_seen,
        scale,
        soft_cap,
        window,
        slopes,
    )
    return output


def _check_frozen(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: wants a gradient, and what is frozen gets none; detach it")


def _check_like(name: str, value: Tensor, like: Tensor, what: str) -> None:
    _check(name, value, like.dim(), (like.dtype,), like.device)
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted {tuple(like.shape)} like {what}")


def _check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: got {eps}, wanted a finite number, not below 0")


def add_rms_norm(
    x: Tensor,  # (…, d) bf16 | fp16 | fp32 | fp64, as are the others
    update: Tensor | None,  # (…, d)
    weight: Tensor,  # (d,)
    eps: float,
) -> tuple[Tensor, Tensor]:  # (…, d), (…, d)
    """h = x + update, and weight · h / √(mean(h²) + eps): a residual connection and the RMSNorm behind it.

    (Zhang & Sennrich 2019, arXiv 1910.07467.) Computed in fp32 (fp64 for fp64); h is rounded before it is normed, and
    what is normed before it is weighted, as by the layers of transformers. Without an update, h is x itself.

    x and update get a gradient; weight, being frozen, gets none. Raises TypeError for a dtype, ValueError for a shape,
    a device, a weight that wants a gradient, or an eps below 0.
    """
    _check("x", x, max(1, x.dim()), _FLOATS, x.device)
    _check("weight", weight, 1, (x.dtype,), x.device)
    _check_size("weight", weight.shape[0], x.shape[-1], "entries")
    if update is not None:
        _check_like("update", update, x, "x")
    _check_frozen(weight=weight)
    _check_eps(eps)
    hidden, normed = operators.add_rms_norm(x, update, weight, eps)
    return x if update is None else hidden, normed


def rotate_heads(
    query: Tensor,  # (rows, time, heads, head_size) bf16 | fp16 | fp32 | fp64, as are the others
    key: Tensor,  # (rows, time, kv_heads, head_size)
    cos: Tensor,  # (rows, time, rotated), as is the next; rotated is even and at most head_size
    sin: Tensor,
    query_weight: Tensor | None = None,  # (head_size,), as is the next
    key_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:  # like query and key
    """Rotary position embedding of query and key: with the halves x₁ and x₂ of the first `rotated` elements of a head,

        y₁ = cos₁ x₁ − sin₁ x₂,  y₂ = cos₂ x₂ + sin₂ x₁

    (Su et al. 2021, arXiv 2104.09864, in the arrangement of Llama); elements behind them stay. With weights, every
    head is normed before, as by `add_rms_norm`. Computed in fp32 (fp64 for fp64) and rounded once behind the norm.

    Query and key get a gradient; all others, being frozen, get none. Raises TypeError for a dtype, ValueError for a
    shape, a device, something frozen that wants a gradient, one weight without the other, or an eps below 0.
    """
    _check("query", query, 4, _FLOATS, query.device)
    _check("key", key, 4, (query.dtype,), query.device)
    rows, time, _, size = query.shape
    for name, x in (("key", key), ("cos", cos)):
        _check(name, x, 4 if name == "key" else 3, (query.dtype,), query.device)
        _check_size(name, x.shape[0], rows, "rows")
        _check_size(name, x.shape[1], time, "positions")
    _check_size("key", key.shape[3], size, "elements per head")
    _check_like("sin", sin, cos, "cos")
    if cos.shape[2] % 2 or cos.shape[2] > size:
        raise ValueError(f"cos: got {cos.shape[2]} entries, wanted an even number of at most {size}, the head size")
    if (query_weight is None) != (key_weight is None):
        raise ValueError("query_weight, key_weight: got one of them, wanted both or none")
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None:
            _check(name, weight, 1, (query.dtype,), query.device)
            _check_size(name, weight.shape[0], size, "entries")
    _check_frozen(cos=cos, sin=sin, query_weight=query_weight, key_weight=key_weight)
    _check_eps(eps)
    return operators.rotate_heads(query, key, cos, sin, query_weight, key_weight, eps)


def gated_activation(
    gate: Tensor,  # (…) bf16 | fp16 | fp32 | fp64
    up: Tensor,  # like gate
    activation: str,  # "silu", "gelu", "gelu_tanh" or "relu"
) -> Tensor:  # like gate
    """act(gate) · up, in the middle of a gated MLP (Shazeer 2020, arXiv 2002.05202).

    Computed in fp32 (fp64 for fp64), the activation rounded before it is multiplied, as by the layers of transformers.
    Both get a gradient. Raises TypeError for a dtype, ValueError for a shape, a device or an unknown activation.
    """
    _check("gate", gate, gate.dim(), _FLOATS, gate.device)
    _check_like("up", up, gate, "gate")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, wanted one of {', '.join(reference.ACTIVATIONS)}")
    return operators.gated_activation(gate, up, activation)
