"""What lies between the products of a layer: norm, rotation and gated activation against formulas in float64.

Gradients of the oracle are autograd's. The error may be twice that of the same formulas in the dtype itself, which
rounds after every step, and a few roundings.
"""

import math
from functools import partial

import pytest
import torch
from rome_fast.kernels import add_rms_norm, gated_activation, rotate_heads
from torch import nn

from helpers import relative_error

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
EPS = 1e-3


def norm_formula(x, update, weight, eps=EPS):
    hidden = x if update is None else x + update
    return hidden, weight * hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt()


def rotation_formula(query, key, cos, sin, query_weight=None, key_weight=None, eps=EPS):
    def turned(x, weight):
        if weight is not None:
            _, x = norm_formula(x, None, weight, eps)
        size = cos.shape[-1]
        one, two, rest = x.split([size // 2, size // 2, x.shape[-1] - size], -1)
        c, s = (t.unsqueeze(2).chunk(2, -1) for t in (cos, sin))
        return torch.cat([c[0] * one - s[0] * two, c[1] * two + s[1] * one, rest], -1)

    return turned(query, query_weight), turned(key, key_weight)


def activation_formula(gate, up, activation):
    act = {
        "silu": lambda x: x / (1 + (-x).exp()),
        "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: x * (x > 0),
    }[activation]
    return act(gate) * up


def norm_case(rows, d, updated, dtype, seed=0):
    """(op, formula, tensors with a gradient, others)"""
    torch.manual_seed(seed)
    leaves = [torch.randn(*rows, d).to(dtype) for _ in range(1 + updated)]
    weight = (1 + 0.3 * torch.randn(d)).to(dtype)

    def run(function, *tensors):
        *states, w = tensors
        return function(states[0], states[1] if updated else None, w, EPS)

    return partial(run, add_rms_norm), partial(run, norm_formula), leaves, [weight]


def rotation_case(sizes, normed, dtype, seed=0):
    rows, time, heads, kv_heads, size, rotated = sizes
    torch.manual_seed(seed)
    leaves = [torch.randn(rows, time, h, size).to(dtype) for h in (heads, kv_heads)]
    # No angles: the halves of a rotation that is none differ, and so does a mistake in them.
    others = [torch.randn(rows, time, rotated).to(dtype) for _ in range(2)]
    others += [(1 + 0.3 * torch.randn(size)).to(dtype) for _ in range(2 * normed)]

    def run(function, *tensors):
        return function(*tensors, eps=EPS)

    return partial(run, rotate_heads), partial(run, rotation_formula), leaves, others


def activation_case(shape, activation, dtype, seed=0):
    torch.manual_seed(seed)
    leaves = [(2 * torch.randn(*shape)).to(dtype) for _ in range(2)]
    formula = partial(activation_formula, activation=activation)
    return partial(gated_activation, activation=activation), formula, leaves, []


CASES = {
    "norm": partial(norm_case, (3, 5), 48, False),
    "norm of a sum": partial(norm_case, (3, 5), 48, True),
    "norm of an odd row": partial(norm_case, (7,), 33, True),
    "norm of one number": partial(norm_case, (2,), 1, True),
    "rotation": partial(rotation_case, (2, 3, 4, 2, 8, 8), False),
    "rotation of a part": partial(rotation_case, (2, 3, 3, 1, 10, 6), False),
    "rotation of normed heads": partial(rotation_case, (2, 3, 6, 2, 16, 16), True),
    "rotation of a part of normed heads": partial(rotation_case, (1, 2, 5, 5, 20, 8), True),
    "rotation of many heads": partial(rotation_case, (1, 2, 37, 3, 64, 64), True),
    **{name: partial(activation_case, (3, 5, 37), name) for name in ACTIVATIONS},
}


def outers_of(results):
    """Gradients of results, the same whatever their dtype."""
    return [torch.linspace(-1, 2, x.numel()).view(x.shape).sin() for x in results]


def with_gradients(run, leaves, others, dtype=None):
    """Results, and the gradients of the leaves."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    results = run(*leaves, *(x.to(dtype or x.dtype) for x in others))
    results = results if isinstance(results, tuple) else (results,)
    outers = [x.to(result) for x, result in zip(outers_of(results), results, strict=True)]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, outers)]


def assert_as_right_as(got, formula, leaves, others, floor=0.0):
    dtype = leaves[0].dtype
    exact = with_gradients(formula, leaves, others, torch.float64)
    plain = with_gradients(formula, leaves, others)
    # Of a few numbers the formula may be right by chance; in float64 it is one more result in the same dtype.
    floor += (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    for number, (one, usual, true) in enumerate(zip(got, plain, exact, strict=True)):
        assert one.dtype == dtype
        assert one.shape == true.shape
        error, limit = relative_error(one, true), 2 * relative_error(usual, true) + floor
        assert error <= limit, f"result {number}: relative error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_layer_op(name, dtype):
    run, formula, leaves, others = CASES[name](dtype)
    assert_as_right_as(with_gradients(run, leaves, others), formula, leaves, others)


@pytest.mark.parametrize("name", ["norm of a sum", "rotation of a part of normed heads", *ACTIVATIONS])
def test_layer_op_has_the_gradient_of_its_differences(name):
    run, _, leaves, others = CASES[name](torch.float64)
    assert torch.autograd.gradcheck(lambda *x: run(*x, *others), [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("name", ["norm of a sum", "rotation of normed heads", "gelu"])
def test_layer_op_of_any_layout(name):
    run, formula, leaves, others = CASES[name](torch.float32)

    def spread(x):
        return torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)[..., ::2].copy_(x)

    views = [spread(x) for x in leaves], [spread(x) for x in others]
    assert_as_right_as(with_gradients(run, *views), formula, leaves, others)


def test_layer_ops_of_nothing():
    none = torch.empty(0, 5, requires_grad=True)
    hidden, normed = add_rms_norm(none, none, torch.ones(5), EPS)
    turned, _ = rotate_heads(torch.empty(0, 3, 2, 4), torch.empty(0, 3, 2, 4), *torch.empty(2, 0, 3, 4))
    assert (hidden.shape, normed.shape, turned.shape) == ((0, 5), (0, 5), (0, 3, 2, 4))
    assert gated_activation(none, none, "silu").shape == (0, 5)
    assert torch.autograd.grad(normed.sum(), none)[0].shape == (0, 5)


def test_a_gradient_of_one_of_two_results():
    """Of a norm the hidden states go on alone, or what is normed does."""
    run, formula, leaves, others = CASES["norm of a sum"](torch.float64)
    for which in (0, 1):
        got, wanted = (with_gradients(lambda *x, f=f, i=which: f(*x)[i], leaves, others) for f in (run, formula))
        for one, other in zip(got, wanted, strict=True):
            assert relative_error(one, other) <= 64 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_roundings_are_those_of_the_layers_of_transformers(dtype):
    """Where they round, so do we; sums in fp32 are in another order, which moves a result to its neighbour at most."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x, update = torch.randn(2, 50, 64).to(dtype)
    theirs = LlamaRMSNorm(64, EPS).to(dtype).requires_grad_(False)
    theirs.weight.copy_(1 + 0.3 * torch.randn(64))
    hidden, normed = add_rms_norm(x, update, theirs.weight, EPS)
    assert torch.equal(hidden, x + update)
    wanted = theirs(x + update)
    # In fp32 the mean has 64 terms, each with an error of a half of eps at most; 1/√ halves that.
    steps = 1 if dtype.itemsize == 2 else 32
    assert ((normed - wanted).abs() <= steps * torch.finfo(dtype).eps * 2 * wanted.abs()).all()
    assert (normed != wanted).float().mean() <= (0.01 if dtype.itemsize == 2 else 1)
    gate, up = torch.randn(2, 50, 64).to(dtype)
    assert torch.equal(gated_activation(gate, up, "silu"), nn.functional.silu(gate) * up)


def test_what_is_no_number_stays_one():
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    for result in (*add_rms_norm(x, x, torch.ones(2), EPS), gated_activation(x, x, "relu")):
        assert result[0].isnan().any()
        assert not result[1].isnan().any()


ONES = torch.ones(2, 3, 4, 6)
REFUSED = [
    (add_rms_norm, (ONES.int(), None, torch.ones(6), EPS), TypeError, "x: got dtype torch.int32"),
    (add_rms_norm, (ONES, None, torch.ones(5), EPS), ValueError, "weight: got 5 entries, wanted 6"),
    (add_rms_norm, (ONES, None, torch.ones(6).half(), EPS), TypeError, "weight: got dtype torch.float16"),
    (add_rms_norm, (ONES, ONES[0], torch.ones(6), EPS), ValueError, r"update: got shape \(3, 4, 6\), wanted 4 dim"),
    (add_rms_norm, (ONES, ONES[:1], torch.ones(6), EPS), ValueError, "update: got shape .*, wanted .* like x"),
    (add_rms_norm, (ONES, None, torch.ones(6).requires_grad_(), EPS), ValueError, "weight: wants a gradient"),
    (add_rms_norm, (ONES, None, torch.ones(6), -1.0), ValueError, "eps: got -1.0, wanted a finite number"),
    (rotate_heads, (ONES[0], ONES, ONES[:, :, 0], ONES[:, :, 0]), ValueError, "query: got shape"),
    (rotate_heads, (ONES, ONES[..., :5], ONES[:, :, 0], ONES[:, :, 0]), ValueError, "key: got 5 elements per head"),
    (rotate_heads, (ONES, ONES[:1], ONES[:, :, 0], ONES[:, :, 0]), ValueError, "key: got 1 rows, wanted 2"),
    (rotate_heads, (ONES, ONES, ONES[:, :2, 0], ONES[:, :2, 0]), ValueError, "cos: got 2 positions, wanted 3"),
    (
        rotate_heads,
        (ONES, ONES, ONES[:, :, 0, :5], ONES[:, :, 0, :5]),
        ValueError,
        "cos: got 5 entries, wanted an even",
    ),
    (rotate_heads, (ONES, ONES, ONES[:, :, 0], ONES[:, :, 0, :4]), ValueError, "sin: got shape .* like cos"),
    (
        rotate_heads,
        (ONES, ONES, ONES[:, :, 0], ONES[:, :, 0], torch.ones(6)),
        ValueError,
        "got one of them, wanted both",
    ),
    (gated_activation, (ONES, ONES[0], "silu"), ValueError, "up: got shape"),
    (gated_activation, (ONES, ONES.half(), "silu"), TypeError, "up: got dtype torch.float16"),
    (gated_activation, (ONES, ONES, "swish"), ValueError, "activation: got 'swish', wanted one of silu, gelu"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "says"), REFUSED)
def test_layer_ops_refuse(op, arguments, error, says):
    with pytest.raises(error, match=says):
        op(*arguments)
