"""The ops as torch operators: named in a profile, one step of a compiled graph, and true to their schema."""

import statistics
import time

import pytest
import torch
from rome_fast.kernels import (
    add_rms_norm,
    gated_activation,
    low_rank_apply_,
    operators,
    prefixed_solve,
    rank_update_,
    rotate_heads,
    second_moment_,
    suffix_attention,
)
from torch.profiler import ProfilerActivity, profile

OPS = torch.ops.rome_fast


def positions_first(x):
    """The same (rows, heads, time, size), with a position's heads side by side in memory."""
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def step_samples():
    """Of the ops of a step of the search."""
    wide, number, flag = torch.rand(4, 6), torch.arange(3), torch.zeros(3, dtype=torch.bool)

    def state():
        return torch.rand(4), torch.rand(4, 1).double(), torch.rand(4, 9), torch.rand(4)

    def whole():
        return torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)

    def flags():
        return torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)

    logits = torch.rand(3, 6)
    decay, steps, *_ = state()
    done, judged = flags()
    adam = (wide.clone(), torch.rand(4, 6), torch.rand(4, 6), steps, judged, done, decay, torch.rand(4))
    return [
        (OPS.target_losses_, (torch.rand(1, 6), flag[:1].clone(), logits, number[:2], torch.rand(2), 0.1, 2.0, True)),
        (OPS.target_losses_, (torch.rand(1, 6), ~flag[:1], logits, number[:2], torch.rand(2), 0.1, 2.0, False)),
        (
            OPS.stop_rule_,
            (flag.clone(), *state(), *whole(), *flags(), wide, number, torch.rand(3), torch.ones(3), None, 8, 0, 6),
        ),
        (
            OPS.stop_rule_,
            (flag.clone(), *state(), *whole(), *flags(), wide, number, torch.rand(3), torch.ones(3), 0.5, 8, 0, 6),
        ),
        (OPS.clamped_adam_, (*adam, number, torch.rand(3, 6), 0.5, 4.0, 1e-20)),
    ]


def samples():
    """Arguments of every op: (operator, arguments)."""
    factor = torch.linalg.cholesky(torch.eye(5) * 2 + 0.3)
    suffix = [torch.randn(s, requires_grad=True) for s in ((3, 4, 2, 6), (3, 2, 2, 6), (3, 2, 2, 6))]
    places = torch.tensor([0, 1, 1])
    contexts, middle, none = torch.randn(2, 2, 5, 6), torch.randn(3, 2, 1, 6), torch.empty(0)
    nothing = (contexts, contexts, places, places * 4, None, None, None, 0.5, None, None, None)
    everything = (contexts, contexts, places, places * 4, middle, middle, places, 0.5, 2.0, 3, torch.rand(4))
    outer = torch.randn(3, 2, 4, 6).transpose(1, 2)
    keys, groups = torch.randn(7, 5), torch.tensor([1, 0, 1, 1, 2, 0, 1])
    bf16 = torch.bfloat16
    x, update = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randn(2, 3, 4, 6, requires_grad=True)
    query, key, angles, weight = x.detach(), update.detach()[:, :, :2], torch.randn(2, 3, 4), torch.randn(6)
    return [
        (OPS.second_moment_, (torch.zeros(5, 5), torch.randn(7, 5), None)),
        (OPS.second_moment_, (torch.zeros(5, 5).double(), torch.randn(7, 5).to(bf16), torch.arange(7) % 2 > 0)),
        (OPS.prefixed_solve, (keys, groups, 3, None, None)),
        (OPS.prefixed_solve, (keys.to(bf16), groups, 3, factor, None)),
        (OPS.prefixed_solve, (keys[:, :5], groups, 3, factor.double(), torch.eye(5).double())),
        (OPS.rank_update_, (torch.zeros(4, 6).to(bf16), torch.randn(4, 2), torch.randn(2, 6))),
        (OPS.rank_update_, (torch.zeros(6, 4).T, torch.randn(4, 1), torch.randn(1, 6))),
        (
            OPS.low_rank_apply_,
            (torch.zeros(4, 3), torch.randn(4, 5), torch.randn(2, 3), torch.randn(2, 5), torch.tensor([0, -1, 1, 1])),
        ),
        (OPS.suffix_attention, (*suffix, *nothing)),
        (OPS.suffix_attention, (*map(positions_first, suffix), *everything)),
        (OPS.suffix_attention_backward, (outer, outer, none, *(x.detach() for x in suffix), *everything)),
        (OPS.add_rms_norm, (x, None, weight, 1e-3)),
        (OPS.add_rms_norm, (positions_first(x), positions_first(update), weight, 1e-3)),
        (OPS.add_rms_norm_backward, (query, query, query.transpose(0, 1).contiguous().transpose(0, 1), weight, 1e-3)),
        (OPS.rotate_heads, (x, update, angles, angles, None, None, 0.0)),
        (OPS.rotate_heads, (x, positions_first(key), angles, angles, weight, weight, 1e-3)),
        (OPS.rotate_heads_backward, (query, key, query, key, angles, angles, weight, weight, 1e-3)),
        (OPS.gated_activation, (x, update, "gelu_tanh")),
        (OPS.gated_activation_backward, (query, query, query.transpose(1, 2).contiguous().transpose(1, 2), "silu")),
        *step_samples(),
    ]


@pytest.mark.parametrize("number", range(24))
def test_an_operator_is_true_to_its_schema_and_its_fake(number):
    operator, arguments = samples()[number]
    results = torch.library.opcheck(operator.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def call_all():
    second_moment_(torch.zeros(3, 3), torch.ones(5, 3))
    prefixed_solve(torch.ones(4, 3), torch.tensor([0, 1, 1, 0]), 2, torch.eye(3))
    rank_update_(torch.ones(3, 5), torch.ones(3, 2), torch.ones(2, 5))
    low_rank_apply_(torch.ones(4, 3), torch.ones(4, 5), torch.ones(2, 3), torch.ones(2, 5), torch.tensor([0, -1, 1, 1]))
    one, zero = torch.ones(1, 1, 1, 2, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    suffix_attention(one, one, one, one.detach(), one.detach(), zero, zero, scale=1.0).sum().backward()
    add_rms_norm(one, one, torch.ones(2), 0.0)[1].sum().backward()
    rotate_heads(one, one, torch.ones(1, 1, 2), torch.ones(1, 1, 2))[0].sum().backward()
    gated_activation(one, one, "silu").sum().backward()


def test_a_profile_names_the_ops():
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call_all()
    names = {event.name for event in found.events()}
    wanted = {"second_moment_", "prefixed_solve", "rank_update_", "low_rank_apply_"}
    ours = ("suffix_attention", "add_rms_norm", "rotate_heads", "gated_activation")
    wanted |= {*ours, *(f"{name}_backward" for name in ours)}
    assert {f"rome_fast::{name}" for name in wanted} <= names


def test_a_compiled_function_takes_an_op_as_one_step():
    """With the checks in front, which must not break the graph."""
    steps = []

    def backend(graph, _inputs):
        steps.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def arguments():
        torch.manual_seed(3)
        floats = [torch.randn(s) for s in ((3, 3), (4, 3), (4, 5))]
        more = [torch.randn(s) for s in ((4, 5), (4, 3), (3, 5))]
        return [*floats, torch.tensor([0, 1, 1, 0]), *more, torch.tensor([2, -1, 0, 1])]

    def run(total, x, keys, groups, weight, left, right, ids):
        second_moment_(total, x, x[:, 0] > 0)
        mean, solved, _ = prefixed_solve(keys, groups, 2, None)
        rank_update_(weight, left, right)
        low_rank_apply_(x, weight, total, right, ids)
        states = x.view(2, 2, 1, 3)
        out = suffix_attention(states, states, states, states, states, groups[:2], groups[2:], scale=0.5, window=2)
        _, normed = add_rms_norm(weight, weight, right[0], 1.0)
        turned, _ = rotate_heads(states, states, states[:, :, 0, :2], states[:, :, 0, :2])
        return mean + solved + out.sum() + turned.sum() + gated_activation(normed, weight, "gelu").sum()

    plain, traced = arguments(), arguments()
    wanted = run(*plain)
    got = torch.compile(run, backend=backend, fullgraph=True)(*traced)
    assert torch.equal(got, wanted)
    for one, two in zip(plain, traced, strict=True):
        assert torch.equal(one, two)
    once = ("second_moment_", "prefixed_solve", "rank_update_", "low_rank_apply_", "suffix_attention")
    for name in (*once, "add_rms_norm", "rotate_heads", "gated_activation"):
        assert steps.count(f"rome_fast.{name}") == 1


def test_an_operator_costs_little_over_a_plain_call():
    """Half of what torch.library.custom_op would, by medians of interleaved runs; a seventh when this was written."""

    @torch.library.custom_op("rome_fast_tests::rank_update_", mutates_args=("weight",))
    def custom(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        operators._rank_update_(weight, left, right)

    weight, left, right = torch.zeros(2, 2), torch.ones(2, 1), torch.ones(1, 2)
    times = {operators._rank_update_: [], OPS.rank_update_: [], custom: []}
    for _ in range(400):
        for run, taken in times.items():
            start = time.perf_counter()
            run(weight, left, right)
            taken.append(time.perf_counter() - start)
    plain, named, usual = map(statistics.median, times.values())
    assert named - plain < 0.5 * (usual - plain)
