"""The ops as torch operators, `torch.ops.rome_fast.…`: each picks a backend and runs it on arguments taken as valid.

As operators they carry a name in a profile, and torch.compile takes each as one step instead of breaking its graph.
Registered by hand: `torch.library.custom_op` costs 45 µs a call, this 6 µs (torch 2.13, one CPU thread). Those of a
layer have a gradient, by operators of their own. Those of a step of the search have no public function: what they are
given is the search's own. What operators change comes first in the schema and is not returned,
which torch asks of operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import library, native, reference
from .backends import choose, launching_on
from .configs import NORM_WIDTH, SUFFIX_HEAD_BYTES

# In the root of a checkout this folder can be imported as `kernels` too, and transformers, looking for a package of
# that name, does so. That copy must not take the names of the real one.
NAMESPACE = __name__.partition(".")[0]

_HALF = (torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def _second_moment_(total: Tensor, x: Tensor, mask: Tensor | None) -> None:
    choice = choose(
        "second_moment_",
        total.device,
        no_triton="fp64 rows have no 16-bit pieces" if x.dtype == torch.float64 else None,
        no_native=native.second_moment_obstacle(total, x),
        size=len(total) if x.dtype in _HALF and library.WIDE_RESULTS else None,
    )
    if choice.backend == "triton":
        from .second_moment import second_moment_triton_

        with launching_on(total.device):
            second_moment_triton_(total, x, mask)
    elif choice.backend == "library":
        library.second_moment_library_(total, x, mask)
    elif choice.backend == "native":
        native.second_moment_native_(total, x, mask)
    else:
        reference.second_moment_ref_(total, x, mask)


def _prefixed_solve(
    keys: Tensor, groups: Tensor, count: int, factor: Tensor | None, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    size = keys.shape[1] if count == 1 and inverse is not None else None
    choice = choose("prefixed_solve", keys.device, size=size)
    if choice.backend == "triton":
        from .solve import prefixed_solve_triton

        with launching_on(keys.device):
            mean, solved, gram = prefixed_solve_triton(keys, groups, count, factor, inverse)
    elif choice.backend == "library":
        mean, solved, gram = library.prefixed_solve_library(keys, factor, inverse)
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
    alike = y.dtype in _HALF and {x.dtype, left.dtype, right.dtype} == {y.dtype} and len(left) > 0
    size = x.shape[1] if alike and library.WIDE_RESULTS else None
    choice = choose("low_rank_apply_", y.device, size=size)
    if choice.backend == "triton":
        from .low_rank_apply import low_rank_apply_triton_

        with launching_on(y.device):
            low_rank_apply_triton_(y, x, left, right, ids)
    elif choice.backend == "library":
        library.low_rank_apply_library_(y, x, left, right, ids)
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
    raise RuntimeError("ops of rome_fast have no second derivative; take their gradients without create_graph=True")


def _add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update and what is normed; without an update the first is x, and an empty tensor takes its place."""
    if _layer_op_on_triton("add_rms_norm", x):
        from .layer import add_rms_norm_triton

        with launching_on(x.device):
            return add_rms_norm_triton(x, update, weight, eps)
    hidden, normed = reference.add_rms_norm_ref(x, update, weight, eps)
    # Whatever the layout of the arguments: a fake result has to have the strides of the true one.
    return hidden.contiguous(), normed.contiguous()


def _fake_add_rms_norm(x: Tensor, update: Tensor | None, _weight: Tensor, _eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(0) if update is None else x.new_empty(x.shape), x.new_empty(x.shape)


def _add_rms_norm_backward(
    gradient: Tensor, residual: Tensor | None, hidden: Tensor, weight: Tensor, eps: float
) -> Tensor:
    if _layer_op_on_triton("add_rms_norm", hidden):
        from .layer import add_rms_norm_backward_triton

        with launching_on(hidden.device):
            return add_rms_norm_backward_triton(gradient, residual, hidden, weight, eps)
    return reference.add_rms_norm_backward_ref(gradient, residual, hidden, weight, eps).contiguous()


def _fake_add_rms_norm_backward(_gradient: Tensor, _residual: Tensor | None, hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _keep_of_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, update, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.updated = update is not None
    ctx.save_for_backward(output[0] if ctx.updated else x, weight)


def _gradients_of_norm(ctx: Any, residual: Tensor | None, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight = ctx.saved_tensors
    if not ctx.updated:
        residual = None  # that of nothing
    of_hidden = residual
    if gradient is not None:
        of_hidden = _REGISTERED.add_rms_norm_backward(gradient, residual, hidden, weight, ctx.eps)
    return of_hidden, of_hidden if ctx.updated else None, None, None


def _rotate_heads(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if _layer_op_on_triton("rotate_heads", query):
        from .layer import rotate_heads_triton

        with launching_on(query.device):
            return rotate_heads_triton(query, *others)
    return reference.rotate_heads_ref(query, *others)


def _fake_rotate_heads(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _rotate_heads_backward(of_query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    if _layer_op_on_triton("rotate_heads", of_query):
        from .layer import rotate_heads_backward_triton

        with launching_on(of_query.device):
            return rotate_heads_backward_triton(of_query, *others)
    of_query, of_key = reference.rotate_heads_backward_ref(of_query, *others)
    return of_query.contiguous(), of_key.contiguous()


def _keep_of_rotation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, cos, sin, query_weight, key_weight, ctx.eps = inputs
    normed = query_weight is not None
    ctx.save_for_backward(query if normed else None, key if normed else None, cos, sin, query_weight, key_weight)


def _gradients_of_rotation(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _REGISTERED.rotate_heads_backward(of_query, of_key, *ctx.saved_tensors, ctx.eps)
    return *gradients, *(None,) * 5


def _gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if _layer_op_on_triton("gated_activation", gate):
        from .layer import gated_activation_triton

        with launching_on(gate.device):
            return gated_activation_triton(gate, up, activation)
    return reference.gated_activation_ref(gate, up, activation).contiguous()


def _fake_gated_activation(gate: Tensor, _up: Tensor, _activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_activation_backward(gradient: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if _layer_op_on_triton("gated_activation", gate):
        from .layer import gated_activation_backward_triton

        with launching_on(gate.device):
            return gated_activation_backward_triton(gradient, gate, up, activation)
    of_gate, of_up = reference.gated_activation_backward_ref(gradient, gate, up, activation)
    return of_gate.contiguous(), of_up.contiguous()


def _fake_gated_activation_backward(
    _gradient: Tensor, gate: Tensor, _up: Tensor, _activation: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _keep_of_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradients_of_activation(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_REGISTERED.gated_activation_backward(gradient, *ctx.saved_tensors, ctx.activation), None


def _layer_op_on_triton(op: str, x: Tensor) -> bool:
    obstacle = None
    if x.dtype == torch.float64:
        obstacle = "there is no kernel for fp64"
    elif x.shape[-1] > NORM_WIDTH and op == "add_rms_norm":
        obstacle = f"the kernel takes rows of {NORM_WIDTH} at most"
    return choose(op, x.device, no_triton=obstacle).backend == "triton"


def _target_losses_(before: Tensor, unknown: Tensor, logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _step_op_on_triton("target_losses_", logits):
        from .steps import target_losses_triton_

        with launching_on(logits.device):
            return target_losses_triton_(before, unknown, logits, *others)
    return reference.target_losses_ref_(before, unknown, logits, *others)


def _fake_target_losses_(
    _before: Tensor,
    _unknown: Tensor,
    logits: Tensor,
    _label: Tensor,
    share: Tensor,
    _kl_factor: float,
    _scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = logits.new_empty(logits.shape if wanted else 0)
    return logits.new_empty(len(logits)), share.new_empty(share.shape), gradient


def _stop_rule_(*arguments: Any) -> None:
    delta = arguments[9]
    if _step_op_on_triton("stop_rule_", delta):
        from .steps import stop_rule_triton_

        with launching_on(delta.device):
            stop_rule_triton_(*arguments)
    else:
        reference.stop_rule_ref_(*arguments)


def _clamped_adam_(delta: Tensor, *others: Any) -> None:
    if _step_op_on_triton("clamped_adam_", delta):
        from .steps import clamped_adam_triton_

        with launching_on(delta.device):
            clamped_adam_triton_(delta, *others)
    else:
        reference.clamped_adam_ref_(delta, *others)


def _step_op_on_triton(op: str, x: Tensor) -> bool:
    obstacle = None
    if x.dtype != torch.float32:
        obstacle = f"there is no kernel for {str(x.dtype).removeprefix('torch.')}"
    return choose(op, x.device, no_triton=obstacle).backend == "triton"


def _fake_nothing(*_: object) -> None:
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
_register(
    "add_rms_norm(Tensor x, Tensor? update, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    _fake_add_rms_norm,
)
_register(
    "add_rms_norm_backward(Tensor gradient, Tensor? residual, Tensor hidden, Tensor weight, float eps) -> Tensor",
    _add_rms_norm_backward,
    _fake_add_rms_norm_backward,
)
_ROTATION = "Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, float eps"
_register(f"rotate_heads(Tensor query, Tensor key, {_ROTATION}) -> (Tensor, Tensor)", _rotate_heads, _fake_rotate_heads)
_register(
    f"rotate_heads_backward(Tensor of_query, Tensor of_key, Tensor? query, Tensor? key, {_ROTATION})"
    " -> (Tensor, Tensor)",
    _rotate_heads_backward,
    _fake_rotate_heads,
)
_register(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor", _gated_activation, _fake_gated_activation
)
_register(
    "gated_activation_backward(Tensor gradient, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _gated_activation_backward,
    _fake_gated_activation_backward,
)
_register(
    "target_losses_(Tensor(a!) before, Tensor(b!) unknown, Tensor logits, Tensor label, Tensor share,"
    " float kl_factor, float scale, bool wanted) -> (Tensor, Tensor, Tensor)",
    _target_losses_,
    _fake_target_losses_,
)
_register(
    "stop_rule_(Tensor(a!) ended, Tensor(b!) decay, Tensor(c!) steps, Tensor(d!) losses, Tensor(e!) led,"
    " Tensor(f!) evaluations, Tensor(g!) held, Tensor(h!) done, Tensor(i!) judged, Tensor delta, Tensor edits,"
    " Tensor loss, Tensor share, float? stop_loss, int most, int margin, int moved_by) -> ()",
    _stop_rule_,
    _fake_nothing,
)
_register(
    "clamped_adam_(Tensor(a!) delta, Tensor(b!) first, Tensor(c!) second, Tensor(d!) steps, Tensor(e!) judged,"
    " Tensor done, Tensor decay, Tensor norms, Tensor edits, Tensor gradient, float learning_rate, float clamp,"
    " float tiny) -> ()",
    _clamped_adam_,
    _fake_nothing,
)

for _name, _gradients, _keep in (
    ("suffix_attention", _suffix_attention_gradients, _keep_for_backward),
    ("add_rms_norm", _gradients_of_norm, _keep_of_norm),
    ("rotate_heads", _gradients_of_rotation, _keep_of_rotation),
    ("gated_activation", _gradients_of_activation, _keep_of_activation),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _gradients, setup_context=_keep, lib=_LIBRARY)
    # Else torch would take the gradient for a constant.
    torch.library.register_autograd(f"{NAMESPACE}::{_name}_backward", _no_second_gradient, lib=_LIBRARY)

_REGISTERED = getattr(torch.ops, NAMESPACE)
second_moment_ = _REGISTERED.second_moment_
prefixed_solve = _REGISTERED.prefixed_solve
rank_update_ = _REGISTERED.rank_update_
low_rank_apply_ = _REGISTERED.low_rank_apply_
suffix_attention = _REGISTERED.suffix_attention
suffix_attention_backward = _REGISTERED.suffix_attention_backward
add_rms_norm = _REGISTERED.add_rms_norm
add_rms_norm_backward = _REGISTERED.add_rms_norm_backward
rotate_heads = _REGISTERED.rotate_heads
rotate_heads_backward = _REGISTERED.rotate_heads_backward
gated_activation = _REGISTERED.gated_activation
gated_activation_backward = _REGISTERED.gated_activation_backward
target_losses_ = _REGISTERED.target_losses_
stop_rule_ = _REGISTERED.stop_rule_
clamped_adam_ = _REGISTERED.clamped_adam_
