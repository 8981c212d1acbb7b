"""The ops at one size each, beside what they replace: how to run every provider, and how right it is.

A case is checked before it is timed. Its own op may be twice as far from float64 as plain torch in the op's
accumulating dtype; the others, which may round more, a few units of the dtype of their result on top of that.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

import uninstalled  # noqa: F401  (it makes rome_fast importable)

# isort: split
from rome_fast.kernels import (
    add_rms_norm,
    backends,
    configs,
    faster,
    gated_activation,
    low_rank_apply_,
    operators,
    prefixed_solve,
    rank_update_,
    rotate_heads,
    second_moment_,
    suffix_attention,
)
from torch import Tensor

from rome_fast.bench.shapes import random_factor

OURS, OWN_KERNEL = "rome_fast", "rome_fast, its kernel"
HIDDEN = {1536: 576, 3072: 768, 6400: 1600, 11008: 4096, 14336: 4096, 16384: 4096, 28672: 8192}
"""Hidden size of the models whose d_ff is measured: SmolLM2, GPT-2, GPT-2-XL, Llama 2, Llama 3, GPT-J, Llama-3-70B."""
_SAMPLED = 64  # rows of a large result that are compared with float64


@dataclass
class Case:
    """One op at one size. Runs work in place on the same tensors; `reset` puts them back."""

    op: str
    variant: str
    dtype: torch.dtype
    sizes: dict[str, int]
    runs: dict[str, Callable[[], Tensor]]  # the op first; each returns what it computed
    plain: Callable[[], Tensor]  # torch in the accumulating dtype
    sample: Callable[[Tensor], Tensor]  # part of a result, in float64
    exact: Tensor
    reset: Callable[[], None]
    flops: float  # that cannot be avoided
    moved_bytes: float
    floor: float = 0.0  # error allowed in any case, relative
    errors: dict[str, float] = field(default_factory=dict)

    def check(self) -> dict[str, bool]:
        """Run every provider once; whether it is right. Its relative error is in `errors` afterwards."""
        wanted = self._error(self.plain)
        right = {}
        for name, run in self.runs.items():
            self.errors[name] = self._error(run)
            limit = 2 * wanted + self.floor
            if name != OURS:
                limit += 4 * torch.finfo(self.dtype).eps
            # A NaN compares as false.
            right[name] = self.errors[name] <= limit
        self.reset()
        return right

    def _error(self, run: Callable[[], Tensor]) -> float:
        self.reset()
        return float(torch.linalg.vector_norm(self.sample(run()) - self.exact) / torch.linalg.vector_norm(self.exact))


def cases(d_ff: int, device: torch.device, *, tokens: int = 16_384, rows: int = 4096) -> Iterator[Case]:
    """Every case at one d_ff, made one after another, so that one is freed before the next is made.

    Where an op is left to the library at this size, our kernel is beside it: the table that says so can be made anew.
    """
    for case in _cases(d_ff, device, tokens, rows):
        if device.type == "cuda" and faster.library_is_faster(case.op, d_ff, configs.architecture(device)):
            case.runs[OWN_KERNEL] = _forced(case.runs[OURS])
        yield case


def _forced(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same on our kernels, whatever the library is faster at."""

    def run_forced() -> Tensor:
        with mock.patch.dict(os.environ, {backends.VARIABLE: "triton"}):
            return run()

    return run_forced


def _cases(d_ff: int, device: torch.device, tokens: int, rows: int) -> Iterator[Case]:
    d = HIDDEN.get(d_ff, max(1, d_ff // 2))
    for dtype in (torch.bfloat16, torch.float32):
        yield second_moment_case(d_ff, tokens, dtype, device)
    yield solve_one_case(d_ff, device)
    yield solve_many_case(d_ff, 64, device)
    for dtype, rank in ((torch.bfloat16, 1), (torch.bfloat16, 8), (torch.float32, 1)):
        yield rank_update_case(d, d_ff, rank, dtype, device)
    yield low_rank_apply_case(rows, 64, d, d_ff, torch.bfloat16, device)
    yield suffix_attention_case(max(1, rows // 256), d, d_ff, torch.bfloat16, device)
    for make in (norm_case, rotation_case, activation_case):
        yield make(max(1, rows // 3), d, d_ff, torch.bfloat16, device)
    yield losses_case(max(2, rows // 32), 32_000 if rows >= 1024 else 500, d_ff, device)


def second_moment_case(d: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """XᵀX of random rows into an fp32 total; exact is float64 on some rows of the lower triangle."""
    random = _source(device)
    x = random(tokens, d).to(dtype)
    total = torch.zeros(d, d, device=device)
    wide = x if dtype == torch.float32 else None
    picked = torch.linspace(0, d - 1, min(d, _SAMPLED), device=device).long()
    lower = torch.arange(d, device=device) <= picked.unsqueeze(1)

    def full_product() -> Tensor:
        return x.T @ x

    def upcast_first() -> Tensor:
        rows = x.float() if wide is None else wide
        return total.addmm_(rows.T, rows)

    def fp32_result() -> Tensor:
        return total.add_(torch.mm(x.T, x, out_dtype=torch.float32))

    runs = {OURS: lambda: second_moment_(total, x), "full GEMM, same dtype": full_product}
    if dtype != torch.float32:
        # Not on a CPU, and from torch 2.8 on.
        if device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
            runs["full GEMM, fp32 result, add"] = fp32_result
        runs["upcast, full GEMM in fp32"] = upcast_first
    return Case(
        op="second_moment_",
        variant="fp32 total",
        dtype=dtype,
        sizes={"n": tokens, "d_ff": d},
        runs=runs,
        plain=upcast_first,
        sample=lambda got: torch.where(lower, got[picked].double(), 0),
        exact=torch.where(lower, x[:, picked].double().T @ x.double(), 0),
        reset=lambda: _zero(total),
        # On the matrix unit an fp32 product is six of bf16 pieces.
        flops=tokens * float(d) ** 2 * (1 if dtype != torch.float32 else 6),
        moved_bytes=x.nbytes + total.nbytes,
        floor=matrix_unit_error(tokens),
    )


def matrix_unit_error(tokens: int) -> float:
    """Relative error of a sum on the matrix unit, which adds 16 products at a time and cuts off instead of rounding.

    Every addition may lose a unit in the last place, and always in the same direction; the op starts a new sum after
    `configs.CHAIN_TOKENS`. An fp32 GEMM rounds to nearest, so that its errors cancel.
    """
    return torch.finfo(torch.float32).eps * (1 + min(tokens, configs.CHAIN_TOKENS) / 16)


def solve_one_case(d: int, device: torch.device, keys: int = 21) -> Case:
    """One edit, with the inverse in fp32: mean key, u and the denominator."""
    random = _source(device)
    factor = random_factor(d, device).float()
    inverse = torch.cholesky_inverse(factor)
    # The kernel may read either triangle.
    inverse = (inverse + inverse.T) / 2
    k = random(keys, d)
    groups = torch.zeros(keys, dtype=torch.int64, device=device)

    def with_inverse() -> Tensor:
        mean = k.mean(0)
        u = inverse @ mean
        _ = u @ mean
        return u

    def with_factor() -> Tensor:
        mean = k.mean(0, keepdim=True)
        u = torch.cholesky_solve(mean.T, factor)
        _ = mean @ u
        return u[:, 0]

    return Case(
        op="prefixed_solve",
        variant="one edit, inverse",
        dtype=torch.float32,
        sizes={"n": keys, "d_ff": d, "edits": 1},
        runs={
            OURS: lambda: prefixed_solve(k, groups, 1, None, inverse)[1][0],
            "mean, inverse @ k": with_inverse,
            "mean, cholesky_solve": with_factor,
        },
        plain=with_inverse,
        sample=lambda got: got.double(),
        exact=torch.cholesky_solve(k.double().mean(0).unsqueeze(1), factor.double())[:, 0],
        reset=_nothing,
        flops=2.0 * d**2,
        moved_bytes=inverse.nbytes + k.nbytes,
        floor=torch.finfo(torch.float32).eps,
    )


def solve_many_case(d: int, edits: int, device: torch.device, keys: int = 10) -> Case:
    """Many edits at once, with the factor in fp32."""
    random = _source(device)
    factor = random_factor(d, device).float()
    k = random(edits * keys, d)
    groups = torch.arange(edits, device=device).repeat_interleave(keys)

    def with_factor() -> Tensor:
        mean = k.unflatten(0, (edits, keys)).mean(1)
        u = torch.cholesky_solve(mean.T, factor)
        _ = mean @ u
        return u.T

    return Case(
        op="prefixed_solve",
        variant="many edits, factor",
        dtype=torch.float32,
        sizes={"n": edits * keys, "d_ff": d, "edits": edits},
        runs={OURS: lambda: prefixed_solve(k, groups, edits, factor)[1], "mean, cholesky_solve": with_factor},
        plain=with_factor,
        sample=lambda got: got.double(),
        exact=torch.cholesky_solve(k.double().unflatten(0, (edits, keys)).mean(1).T, factor.double()).T,
        reset=_nothing,
        flops=2.0 * edits * d**2,
        # A triangle, read once downwards and once upwards.
        moved_bytes=factor.nbytes + k.nbytes,
        floor=torch.finfo(torch.float32).eps,
    )


def rank_update_case(d: int, d_ff: int, rank: int, dtype: torch.dtype, device: torch.device) -> Case:
    """W += left @ right; exact is float64, rounded by nothing."""
    random = _source(device)
    original = random(d, d_ff).to(dtype)
    weight = original.clone()
    left, right = 0.01 * random(d, rank), random(rank, d_ff)
    left_rounded, right_rounded = left.to(dtype), right.to(dtype)
    picked = torch.linspace(0, d - 1, min(d, _SAMPLED), device=device).long()

    def rounded_once() -> Tensor:
        return weight.copy_(weight.float() + left @ right)

    runs: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: rank_update_(weight, left, right),
        "addmm_, factors in the weight's dtype": lambda: weight.addmm_(left_rounded, right_rounded),
        "outer product, round, add": lambda: weight.add_((left @ right).to(dtype)),
        "fp32 copy, add, round once": rounded_once,
    }
    return Case(
        op="rank_update_",
        variant=f"rank {rank}",
        dtype=dtype,
        sizes={"d": d, "d_ff": d_ff, "rank": rank},
        runs=runs,
        plain=rounded_once,
        sample=lambda got: got[picked].double(),
        exact=original[picked].double() + left[picked].double() @ right.double(),
        reset=lambda: _copy(weight, original),
        flops=2.0 * rank * d * d_ff,
        moved_bytes=2 * weight.nbytes + left.nbytes + right.nbytes,
        floor=torch.finfo(torch.float32).eps,
    )


def low_rank_apply_case(rows: int, edits: int, d: int, d_ff: int, dtype: torch.dtype, device: torch.device) -> Case:
    """y[row] += left[id] (right[id] · x[row]); one row in eight has no edit."""
    random = _source(device)
    original, x = random(rows, d).to(dtype), random(rows, d_ff).to(dtype)
    left = random(edits, d).to(dtype)
    right = (random(edits, d_ff) / math.sqrt(d_ff)).to(dtype)
    ids = torch.randint(0, edits, (rows,), device=device, generator=torch.Generator(device).manual_seed(1))
    ids[::8] = -1
    y = original.clone()
    of_edit = [(ids == edit).nonzero().squeeze(1) for edit in range(edits)]
    edited = (ids >= 0).nonzero().squeeze(1)
    chosen = ids[edited]

    def loop() -> Tensor:
        for edit, mine in enumerate(of_edit):
            y[mine] += (x[mine] @ right[edit]).unsqueeze(1) * left[edit]
        return y

    def batched() -> Tensor:
        scale = torch.bmm(right[chosen].unsqueeze(1), x[edited].unsqueeze(2)).squeeze(2)
        y[edited] += left[chosen] * scale
        return y

    def accumulated() -> Tensor:
        scale = (right[chosen].float() * x[edited].float()).sum(1, keepdim=True)
        y[edited] = (y[edited].float() + left[chosen].float() * scale).to(dtype)
        return y

    known = (ids >= 0).unsqueeze(1)
    picked = torch.linspace(0, rows - 1, min(rows, 4 * _SAMPLED), device=device).long()
    at = ids[picked].clamp(min=0)
    scale = (right[at].double() * x[picked].double()).sum(1, keepdim=True)
    return Case(
        op="low_rank_apply_",
        variant=f"{edits} edits",
        dtype=dtype,
        sizes={"n": rows, "d": d, "d_ff": d_ff, "edits": edits},
        runs={OURS: lambda: low_rank_apply_(y, x, left, right, ids), "loop over edits": loop, "gather, bmm": batched},
        plain=accumulated,
        sample=lambda got: got[picked].double(),
        exact=original[picked].double() + known[picked] * scale * left[at].double(),
        reset=lambda: _copy(y, original),
        flops=2.0 * len(edited) * (d + d_ff),
        moved_bytes=(len(edited) * (2 * d + d_ff) + edits * (d + d_ff)) * x.element_size(),
        floor=torch.finfo(torch.float32).eps,
    )


def suffix_attention_case(edits: int, d: int, d_ff: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Both passes over a batch of edits with 21 rows each: 10 tokens of a context, up to 8 of its own, 4 new ones.

    The result is the gradient of the query, which the whole of the forward pass enters.
    """
    random = _source(device)
    contexts, longest, middle, time = 21, 10, 8, 4
    rows, size = edits * contexts, 128 if d >= 4096 else 64
    heads = max(1, d // size)
    kv_heads = heads // next(group for group in (4, 3, 2, 1) if heads % group == 0)

    def states(rows: int, heads: int, time: int) -> Tensor:
        return random(rows, time, heads, size).to(dtype).transpose(1, 2)

    suffix = [states(rows, h, time) for h in (heads, kv_heads, kv_heads)]
    of_contexts = [states(contexts, kv_heads, longest) for _ in range(2)]
    of_middle = [states(rows, kv_heads, middle) for _ in range(2)]
    outer = states(rows, heads, time)
    index = torch.arange(rows, device=device) % contexts
    seen = torch.full_like(index, longest)
    own = torch.arange(rows, device=device) % (middle + 1)
    there = torch.cat(
        [seen.unsqueeze(1).expand(-1, longest) > 0, torch.arange(middle, device=device) < own[:, None]], 1
    )
    mask = torch.zeros(rows, 1, time, longest + middle + time, dtype=torch.bool, device=device)
    mask[..., : longest + middle] = there[:, None, None, :]
    mask[..., longest + middle :] = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    for x in suffix:
        x.requires_grad_()

    def fused() -> Tensor:
        out = suffix_attention(*suffix, *of_contexts, index, seen, *of_middle, own, scale=size**-0.5)
        return torch.autograd.grad(out, suffix, outer)[0]

    def joined(dtype: torch.dtype) -> Tensor:
        query, *new = (x.to(dtype) for x in suffix)
        keys, values = (
            torch.cat([c[index].to(dtype), m.to(dtype), x], 2).repeat_interleave(heads // kv_heads, 1)
            for c, m, x in zip(of_contexts, of_middle, new, strict=True)
        )
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask)
        return torch.autograd.grad(out, [query, *new], outer.to(dtype))[0]

    past = sum(x.nbytes for x in (*of_contexts, *of_middle))
    query_bytes, key_bytes = (x.numel() * x.element_size() for x in suffix[:2])
    return Case(
        op="suffix_attention",
        variant="both passes",
        dtype=dtype,
        sizes={"n": rows, "d": d, "d_ff": d_ff, "heads": heads, "kv_heads": kv_heads},
        runs={OURS: fused, "gather, join, repeat, sdpa": lambda: joined(dtype)},
        plain=lambda: joined(dtype),
        sample=lambda got: got.double(),
        exact=joined(torch.float64),
        reset=_nothing,
        # Two products of the first pass and three of the second one with every key, two with those of the suffix.
        flops=2.0 * rows * heads * time * size * (5 * mask.shape[3] + 2 * time),
        # Of the first pass: queries, their output, the new keys and values, the past; of the second one these, and
        # gradients of all but the past.
        moved_bytes=2 * past + 6 * query_bytes + 6 * key_bytes,
        floor=torch.finfo(torch.float32).eps,
    )


def norm_case(n: int, d: int, d_ff: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Both passes of a residual connection and the RMSNorm behind it, of n positions."""
    random, eps = _source(device), 1e-5
    x, update, of_hidden, of_normed = (random(n, d).to(dtype) for _ in range(4))
    weight = (1 + 0.1 * random(d)).to(dtype)

    def fused(x: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, update, weight, eps)

    def written(x: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + update
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return hidden, weight * unit.to(hidden.dtype)

    # Forward: two read, two written; backward: two gradients and what was normed read, a gradient written.
    moved = 8.0 * x.nbytes
    sizes, outers = {"n": n, "d": d, "d_ff": d_ff}, [of_hidden, of_normed]
    return _both_passes("add_rms_norm", [x, update], [weight], outers, fused, written, sizes, moved)


def rotation_case(n: int, d: int, d_ff: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Both passes of the rotation of queries and keys, of n positions."""
    random, size = _source(device), 128 if d >= 4096 else 64
    heads = max(1, d // size)
    kv_heads = heads // next(group for group in (4, 3, 2, 1) if heads % group == 0)
    states = [random(1, n, h, size).to(dtype) for h in (heads, kv_heads)]
    outers = [random(1, n, h, size).to(dtype) for h in (heads, kv_heads)]
    angles = random(1, n, size // 2).repeat(1, 1, 2)
    turns = [angles.cos().to(dtype), angles.sin().to(dtype)]

    def written(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        def turned(x: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return x * cos.unsqueeze(2) + torch.cat([-two, one], -1) * sin.unsqueeze(2)

        return turned(query), turned(key)

    sizes = {"n": n, "d": d, "d_ff": d_ff, "heads": heads, "kv_heads": kv_heads}
    moved = sum(4.0 * x.nbytes + 2.0 * t.nbytes for x, t in zip(states, turns, strict=True))
    return _both_passes("rotate_heads", states, turns, outers, rotate_heads, written, sizes, moved)


def activation_case(n: int, d: int, d_ff: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Both passes of the gated activation of n positions."""
    random = _source(device)
    gate, up, outer = (random(n, d_ff).to(dtype) for _ in range(3))

    def fused(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (gated_activation(gate, up, "silu"),)

    def written(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (torch.nn.functional.silu(gate) * up,)

    # Forward: two read, one written; backward: three read, two written.
    sizes = {"n": n, "d": d, "d_ff": d_ff}
    return _both_passes("gated_activation", [gate, up], [], [outer], fused, written, sizes, 8.0 * gate.nbytes)


def _both_passes(
    op: str,
    leaves: list[Tensor],  # that get a gradient
    frozen: list[Tensor],
    outers: list[Tensor],  # gradients of the results
    fused: Callable[..., tuple[Tensor, ...]],
    written: Callable[..., tuple[Tensor, ...]],  # as layers of transformers are
    sizes: dict[str, int],
    moved_bytes: float,
) -> Case:
    """The gradient of the first leaf, which all of the backward pass enters, behind the forward pass."""

    def run(function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> Tensor:
        own = [x.to(dtype).detach().requires_grad_() for x in leaves]
        results = function(*own, *(x.to(dtype) for x in frozen))
        return torch.autograd.grad(results, own, [x.to(dtype) for x in outers])[0]

    dtype = leaves[0].dtype
    return Case(
        op=op,
        variant="both passes",
        dtype=dtype,
        sizes=sizes,
        runs={OURS: lambda: run(fused, dtype), "as layers are written": lambda: run(written, dtype)},
        plain=lambda: run(written, dtype),
        sample=lambda got: got.double(),
        exact=run(written, torch.float64),
        reset=_nothing,
        flops=10.0 * sum(x.numel() for x in leaves),  # about; none of them on the matrix unit
        moved_bytes=moved_bytes,
        floor=torch.finfo(torch.float32).eps,
    )


def losses_case(rows: int, size: int, d_ff: int, device: torch.device) -> Case:
    """Losses and gradient of so many rows of logits, one in eight of them an essence."""
    random = _source(device)
    essences = max(1, rows // 8)
    targets = rows - essences
    logits = 3 * random(rows, size)
    label = torch.arange(targets, device=device) % size
    share = torch.full((targets,), 1 / targets, device=device)
    original = random(essences, size).log_softmax(1)
    before, unknown = original.clone(), torch.zeros(essences, dtype=torch.bool, device=device)

    def fused() -> Tensor:
        return operators.target_losses_(before, unknown, logits, label, share, 0.0625, 1.0, True)[2]

    def composed(dtype: torch.dtype) -> Tensor:
        leaf, known = logits.to(dtype).detach().requires_grad_(), original.to(dtype)
        after = leaf.log_softmax(1)
        nll = -(after[:targets].gather(1, label.unsqueeze(1)).squeeze(1) * share.to(dtype)).sum()
        divergence = (after[targets:].exp() * (after[targets:] - known)).sum()
        return torch.autograd.grad(nll + 0.0625 * divergence, leaf)[0]

    return Case(
        op="target_losses_",
        variant="losses and gradient",
        dtype=torch.float32,
        sizes={"n": rows, "vocabulary": size, "d_ff": d_ff},
        runs={OURS: fused, "log_softmax, autograd": lambda: composed(torch.float32)},
        plain=lambda: composed(torch.float32),
        sample=lambda got: got.double(),
        exact=composed(torch.float64),
        reset=_nothing,
        flops=10.0 * logits.numel(),  # about; none of them on the matrix unit
        moved_bytes=2.0 * logits.nbytes + before.nbytes,
        # An exponential of a difference that is up to 25.
        floor=25 * torch.finfo(torch.float32).eps,
    )


def _source(device: torch.device) -> Callable[..., Tensor]:
    """A function from a shape to normal numbers, the same ones for every case."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, device=device, generator=generator)


def _zero(target: Tensor) -> None:
    target.zero_()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _nothing() -> None:
    pass
