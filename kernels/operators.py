"""The ops as torch operators, `torch.ops.rome_fast.…`: each picks a backend and runs it on arguments taken as valid.

As operators they carry a name in a profile, and torch.compile takes each as one step instead of breaking its graph.
Registered by hand: `torch.library.custom_op` costs 45 µs a call, this 6 µs (torch 2.13, one CPU thread). They have no
gradient. What they change comes first in the schema and is not returned, which torch asks of operators.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import native, reference
from .backends import choose, launching_on

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

_REGISTERED = getattr(torch.ops, NAMESPACE)
second_moment_ = _REGISTERED.second_moment_
prefixed_solve = _REGISTERED.prefixed_solve
rank_update_ = _REGISTERED.rank_update_
low_rank_apply_ = _REGISTERED.low_rank_apply_
