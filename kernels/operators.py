"""The ops as torch operators, `torch.ops.rome_fast.…`: each picks a backend and runs it on arguments taken as valid.

As operators they carry a name in a profile, and torch.compile takes each as one step instead of breaking its graph.
Registered by hand: `torch.library.custom_op` costs 45 µs a call, this 6 µs (torch 2.13, one CPU thread). Only
`suffix_attention` has a gradient, by an operator of its own. What the others change comes first in the schema and is
not returned, which torch asks of operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .backends import choose, launching_on
from .configs import SUFFIX_HEAD_BYTES

# In the root of a checkout this folder can be imported as `kernels` too, and transformers, looking for a package of
# that name, does so. That copy must not take the names of the real one.
NAMESPACE = __name__.partition(".")[0]

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _second_moment_(total: Tensor, x: Tensor, mask: Tensor | None) -> None:
    choice = choose(
        "second_moment_",
        total.device,
        no_triton="fp64 rows have no 16-bit pieces" if x.dtype == torch.float64 else None,
        no_native=native.second_moment_obstacle(total, x),
    )
    if choice.backend == "triton":
        from .second_moment import second_moment_triton_

        with launching_on(total.device):
            second_moment_triton_(total, x, mask)
    elif choice.backend == "native":
        native.second_moment_native_(total, x, mask)
    else:
        reference.second_moment_ref_(total, x, mask)


def _prefixed_solve(
    keys: Tensor, groups: Tensor, count: int, factor: Tensor | None, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if choose("prefixed_solve", keys.device).backend == "triton":
        from .solve import prefixed_solve_triton

        with launching_on(keys.device):
            mean, solved, gram = prefixed_solve_triton(keys, groups, count, factor, inverse)
    else:
        mean, solved, gram = reference.prefixed_solve_ref(keys, groups, count, factor, inverse)
    # The solvers of torch return transposed views; a fake result has to have the strides of the true one.
    return mean, solved.contiguous(), gram.contiguous()


def _fake_prefixed_solve(
    keys: Tensor, groups: Tensor, count: int, factor: Tensor | None, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.solve_dtype(keys, factor, inverse)
    mean = keys.new_empty((count, keys.shape[1]), dtype=dtype)
    return mean, torch.empty_like(mean), keys.new_empty((count, count), dtype=dtype)


def _rank_update_(weight: Tensor, left: Tensor, right: Tensor) -> None:
    choice = choose("rank_update_", weight.device, no_native=native.rank_update_obstacle(weight, left, right))
    if choice.backend == "triton":
        from .rank_update import rank_update_triton_

        with launching_on(weight.device):
            rank_update_triton_(weight, left, right)
    elif choice.backend == "native":
        native.rank_update_native_(weight, left, right)
    else:
        reference.rank_update_ref_(weight, left, right)


def _low_rank_apply_(y: Tensor, x: Tensor, left: Tensor, right: Tensor, ids: Tensor) -> None:
    if choose("low_rank_apply_", y.device).backend == "triton":
        from .low_rank_apply import low_rank_apply_triton_

        with launching_on(y.device):
            low_rank_apply_triton_(y, x, left, right, ids)
    else:
        reference.low_rank_apply_ref_(y, x, left, right, ids)


def _suffix_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output, and what the backward pass of a kernel wants of the forward pass; empty for the reference."""
    call = reference.SuffixCall(*arguments)
    if _suffix_attention_on_triton(call):
        from .suffix import suffix_attention_triton

        with launching_on(call.query.device):
            return suffix_attention_triton(call)
    return reference.suffix_attention_ref(call), call.query.new_empty(0, dtype=torch.float32)


def _fake_suffix_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = reference.SuffixCall(*arguments)
    kept = call.query.shape[:3] if _suffix_attention_on_triton(call) else (0,)
    return torch.empty_like(call.query), call.query.new_empty(kept, dtype=torch.float32)


def _suffix_attention_backward(
    gradient: Tensor, output: Tensor, total: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call = reference.SuffixCall(*arguments)
    # What has run forward runs backward, whatever has been forced since.
    if total.dim() == 1:
        return reference.suffix_attention_backward_ref(gradient, call)
    from .suffix import suffix_attention_backward_triton

    with launching_on(call.query.device):
        return suffix_attention_backward_triton(gradient, output, total, call)


def _fake_suffix_attention_backward(
    _gradient: Tensor, _output: Tensor, _total: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _suffix_attention_on_triton(call: reference.SuffixCall) -> bool:
    obstacle = None
    if call.query.dtype == torch.float64:
        obstacle = "there is no kernel for fp64 queries"
    elif call.query.shape[3] * call.query.element_size() > SUFFIX_HEAD_BYTES:
        obstacle = f"the kernel takes heads of {SUFFIX_HEAD_BYTES // call.query.element_size()} at most in this dtype"
    return choose("suffix_attention", call.query.device, no_triton=obstacle).backend == "triton"


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for `total`, which nobody reads, would be a launch in every layer
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]


def _suffix_attention_gradients(
    ctx: Any, gradient: Tensor | None, _of_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * len(ctx.numbers)
    output, total, *tensors = ctx.saved_tensors
    arguments = [x if y is None else y for x, y in zip(ctx.numbers, tensors, strict=True)]
    gradients = _REGISTERED.suffix_attention_backward(gradient, output, total, *arguments)
    return *gradients, *(None,) * (len(arguments) - len(gradients))


def _no_second_gradient(_ctx: Any, *_: Tensor | None) -> None:
    raise RuntimeError("suffix_attention has no second derivative; take its gradient without create_graph=True")


def _fake_nothing(*_: Tensor | None) -> None:
    """What an op in place returns."""


def _register(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


_register("second_moment_(Tensor(a!) total, Tensor x, Tensor? mask) -> ()", _second_moment_, _fake_nothing)
_register(
    "prefixed_solve(Tensor keys, Tensor groups, int count, Tensor? factor, Tensor? inverse)"
    " -> (Tensor, Tensor, Tensor)",
    _prefixed_solve,
    _fake_prefixed_solve,
)
_register("rank_update_(Tensor(a!) weight, Tensor left, Tensor right) -> ()", _rank_update_, _fake_nothing)
_register(
    "low_rank_apply_(Tensor(a!) y, Tensor x, Tensor left, Tensor right, Tensor ids) -> ()",
    _low_rank_apply_,
    _fake_nothing,
)
_SUFFIX_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor context_keys, Tensor context_values, Tensor context_index,"
    " Tensor context_seen, Tensor? middle_keys, Tensor? middle_values, Tensor? middle_seen, float scale,"
    " float? soft_cap, int? window, Tensor? slopes"
)
_register(f"suffix_attention({_SUFFIX_CALL}) -> (Tensor, Tensor)", _suffix_attention, _fake_suffix_attention)
_register(
    f"suffix_attention_backward(Tensor gradient, Tensor output, Tensor total, {_SUFFIX_CALL})"
    " -> (Tensor, Tensor, Tensor)",
    _suffix_attention_backward,
    _fake_suffix_attention_backward,
)
torch.library.register_autograd(
    f"{NAMESPACE}::suffix_attention", _suffix_attention_gradients, setup_context=_keep_for_backward, lib=_LIBRARY
)
# Else torch would take the gradient for a constant.
torch.library.register_autograd(f"{NAMESPACE}::suffix_attention_backward", _no_second_gradient, lib=_LIBRARY)

_REGISTERED = getattr(torch.ops, NAMESPACE)
second_moment_ = _REGISTERED.second_moment_
prefixed_solve = _REGISTERED.prefixed_solve
rank_update_ = _REGISTERED.rank_update_
low_rank_apply_ = _REGISTERED.low_rank_apply_
suffix_attention = _REGISTERED.suffix_attention
