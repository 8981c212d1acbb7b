"""Every Triton kernel against float64, in the interpreter; run by test_kernels_triton.py in a process of its own.

What the interpreter cannot show: bf16 on the matrix unit. It multiplies bf16 as integers, so the kernels upcast there
(products of bf16 are exact in fp32 either way), and it truncates when it stores bf16 (one unit in the last place).
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rome_fast.kernels import configs, reference
from rome_fast.kernels.low_rank_apply import low_rank_apply_triton_
from rome_fast.kernels.rank_update import rank_update_triton_
from rome_fast.kernels.second_moment import second_moment_triton_
from rome_fast.kernels.solve import apply_inverse_triton, prefixed_solve_triton
from rome_fast.kernels.suffix import suffix_attention_backward_triton, suffix_attention_triton
from torch import Tensor

from rome_fast import kernels
from test_layer_ops import ACTIVATIONS, EPS
from test_layer_ops import CASES as LAYER_CASES
from test_layer_ops import assert_as_right_as as assert_layer_op_as_right_as
from test_layer_ops import with_gradients as layer_op_with_gradients
from test_step_ops import SIZES as LOSS_SIZES
from test_step_ops import Edits, check_faults, check_losses, judged_by, moved_by
from test_suffix_attention import ALL_AT_ONCE, CASES, arguments, assert_as_right_as, with_gradients

assert os.environ.get("TRITON_INTERPRET") == "1", "run these through test_kernels_triton.py"

NAN = math.nan
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# What takes the way of bfloat16 but for the type itself, and as long as that: `make acceptance` asks for it.
SELDOM_F16 = pytest.param(F16, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the code allocates is full of NaN, so that an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two tiles across, no more: the interpreter runs one program after another."""
    architecture = getattr(request.node, "callspec", None) and request.node.callspec.params.get("architecture")
    monkeypatch.setattr(configs, "SUPER_TILE", 512 if architecture else 128)
    monkeypatch.setattr(configs, "ADD_BLOCK", (64, 128))
    monkeypatch.setattr(configs, "RANK_UPDATE_BLOCK", (16, 64))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def blank(d: int, dtype: torch.dtype = F64) -> Tensor:
    """A total whose upper triangle, undefined by contract, is poisoned."""
    return torch.zeros(d, d, dtype=dtype).masked_fill(torch.ones(d, d).triu(1).bool(), NAN)


def size(exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(exact))


def error(got: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.matrix_norm(got.double() - exact))


def rounding_of_the_oracle(dtype: torch.dtype) -> float:
    """For fp64 the oracle is one more result in the same dtype, and torch's may agree with it to the bit."""
    return 64 * torch.finfo(F64).eps if dtype == F64 else 0.0


@pytest.mark.parametrize("dtype", [BF16, SELDOM_F16, F32])
@pytest.mark.parametrize(
    ("architecture", "n", "d"),
    [
        (configs.OTHER, 1, 1),
        (configs.OTHER, 77, 65),
        (configs.OTHER, 17, 130),  # several groups of tiles
        (80, 130, 129),
        (90, 70, 272),  # descriptors; d a multiple of 16, so that 16-bit rows are read in place
        (90, 65, 257),
    ],
)
def test_second_moment(architecture: int, n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(n, d, generator=generator).to(dtype)
    total = second_moment_triton_(blank(d), x, None, architecture=architecture)
    assert total.triu(1).isnan().sum() == d * (d - 1) // 2, "the upper triangle was written"
    exact = x.double().T @ x.double()
    assert torch.equal(kernels.mirror_lower_(total), total.T)
    # Twice the error of torch in fp32; plus, for a single token where that can be 0, two roundings of each product.
    floor = 2**-23 * size(exact) if n == 1 else 0.0
    assert error(total, exact) <= 2 * error(x.float().T @ x.float(), exact) + floor


def test_second_moment_with_three_products_is_close_but_not_fp32(generator: torch.Generator) -> None:
    x = torch.randn(200, 64, generator=generator)
    exact = x.double().T @ x.double()
    fast = kernels.mirror_lower_(second_moment_triton_(blank(64), x, None, products=3))
    full = kernels.mirror_lower_(second_moment_triton_(blank(64), x, None, products=6))
    # Two pieces hold 16 bits, so each factor is off by up to 2⁻¹⁷ and the products by 2⁻¹⁶.
    assert 1e-7 * size(exact) < error(fast, exact) < 2**-16 * size(exact)
    # With all pieces, that of fp32: a chain of 200 rows.
    assert error(full, exact) < 2 * error(x.T @ x, exact)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("architecture", [configs.OTHER, 90])
def test_second_moment_never_reads_masked_rows(
    architecture: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    d = 48
    x = torch.randn(67, d, generator=generator).to(dtype)
    keep = torch.rand(134, generator=generator)[::2] > 0.4
    kept = x[keep]
    poisoned = x.masked_fill(~keep[:, None], NAN)
    total = second_moment_triton_(blank(d), poisoned, keep, architecture=architecture)
    exact = kept.double().T @ kept.double()
    assert error(kernels.mirror_lower_(total), exact) <= 2 * error(kept.float().T @ kept.float(), exact)
    nothing = second_moment_triton_(blank(d), poisoned, torch.zeros_like(keep), architecture=architecture)
    assert not nothing.tril().any()


def test_second_moment_of_no_rows_or_columns_changes_nothing() -> None:
    assert torch.equal(second_moment_triton_(torch.ones(3, 3), torch.empty(0, 3), None), torch.ones(3, 3))
    assert second_moment_triton_(torch.empty(0, 0), torch.empty(4, 0), None).shape == (0, 0)


@pytest.mark.parametrize("architecture", [configs.OTHER, 90])
def test_second_moment_of_strided_views(architecture: int, generator: torch.Generator) -> None:
    wide = torch.full((60, 160), NAN, dtype=F16)
    repeated = torch.randn(1, 80, generator=generator).to(F16).expand(60, 80)
    for x in (wide[::2, 3:83], wide.T[40:120, 5:50], wide[:, 16:96:2], repeated):
        if x is not repeated:
            x.copy_(torch.randn(x.shape, generator=generator).to(F16))
        d = x.shape[1]
        store = blank(2 * d)
        total = store[::2, ::2].T  # strided as well, and transposed
        total.fill_(1.0)
        second_moment_triton_(total, x, None, architecture=architecture)
        exact = x.double().T @ x.double() + 1
        plain = x.float().T @ x.float() + 1
        assert error(kernels.mirror_lower_(total.clone()), exact) <= 2 * error(plain, exact)
        assert store[1::2, 1::2].triu(1).isnan().sum() == d * (d - 1) // 2
        wide.fill_(NAN)


@pytest.mark.parametrize("architecture", [configs.OTHER, pytest.param(80, marks=pytest.mark.slow), 90])
def test_second_moment_in_partial_sums(
    architecture: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several splits per launch and several launches give the sum of all tokens, the same to the bit every time."""
    monkeypatch.setattr(configs, "CHAIN_TOKENS", 32)
    monkeypatch.setattr(configs, "SPLIT_TOKENS", 32)
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", 3 * 4 * configs.SUPER_TILE**2)  # three splits of one group
    x = torch.randn(133, 40, generator=generator)
    exact = x.double().T @ x.double()
    first = second_moment_triton_(blank(40), x, None, architecture=architecture)
    again = second_moment_triton_(blank(40), x, None, architecture=architecture)
    assert torch.equal(first.tril(), again.tril())
    assert error(kernels.mirror_lower_(first), exact) <= 2 * error(x.T @ x, exact)


def test_second_moment_error_over_many_calls(generator: torch.Generator) -> None:
    """An fp64 total keeps the error of a single call, an fp32 total gathers one rounding per call, as torch's does.

    15 calls show it; the 1,000 of test_kernels_reference.py would take minutes, at up to a second each.
    """
    x = torch.rand(120, 16, generator=generator).to(BF16)
    narrow, wide, plain = blank(16, F32), blank(16), torch.zeros(16, 16)
    for part in x.split(8):
        second_moment_triton_(narrow, part, None)
        second_moment_triton_(wide, part, None)
        plain += part.float().T @ part.float()
    exact = x.double().T @ x.double()
    assert error(kernels.mirror_lower_(wide), exact) < 2**-25 * size(exact) < error(plain, exact)
    assert error(kernels.mirror_lower_(narrow), exact) <= 2 * error(plain, exact)


def test_second_moment_of_fp32_rows_over_several_calls(generator: torch.Generator) -> None:
    """The pieces of the rows add nothing to it: the bound of the op, 1e-6."""
    x = torch.rand(80, 16, generator=generator)
    total = blank(16)
    for part in x.split(16):
        second_moment_triton_(total, part, None)
    exact = x.double().T @ x.double()
    assert error(kernels.mirror_lower_(total), exact) <= 1e-6 * size(exact)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_prefixed_solve_of_one_edit_with_an_inverse(
    order: str, dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "INVERSE_BLOCK", (8, 32))
    d = 75
    a = torch.randn(d, 3 * d, generator=generator, dtype=F64)
    c = a @ a.T / (3 * d)
    inverse = torch.linalg.inv(c).to(dtype)
    if order == "columns":
        inverse = inverse.T
    keys = torch.randn(2 * d, 21, generator=generator).T[:, ::2]
    groups = torch.zeros(21, dtype=torch.int64)
    mean, solved, gram = prefixed_solve_triton(keys, groups, 1, None, inverse)
    exact_mean = keys.double().mean(0, keepdim=True)
    exact = exact_mean @ inverse.double()
    plain_mean, plain, plain_gram = reference.prefixed_solve_ref(keys, groups, 1, None, inverse)
    floor = rounding_of_the_oracle(dtype)
    assert error(mean, exact_mean) <= 2 * error(plain_mean, exact_mean) + floor * size(exact_mean)
    assert error(solved, exact) <= 2 * error(plain, exact) + floor * size(exact)
    # A single number, whose torch error may be 0 by chance: the bound of a sum of d products instead.
    products = (exact * exact_mean).abs().sum()
    assert abs(gram.double() - (exact * exact_mean).sum()) <= d * torch.finfo(dtype).eps * products
    assert plain_gram.shape == gram.shape == (1, 1)

    factor = torch.linalg.cholesky(c).to(dtype)
    mean, solved, gram = prefixed_solve_triton(keys, groups, 1, factor, 1.01 * inverse)
    residual = kernels.solve_residual(mean, solved, factor)
    # One per cent squared, beside u κ: the condition of C is about 14, and the inverse is rounded too.
    assert abs(float(residual) - 1e-4) <= 16 * torch.finfo(dtype).eps
    products = (exact * exact_mean).abs().sum()
    wanted = (exact * exact_mean).sum()
    assert abs(gram.double() - wanted) <= 1.01e-4 * wanted.abs() + d * torch.finfo(dtype).eps * products


@pytest.mark.parametrize("matrix", ["none", "factor", "inverse", "both"])
def test_prefixed_solve_of_ragged_groups(matrix: str, generator: torch.Generator) -> None:
    d, count = 37, 4
    keys = torch.randn(11, d, generator=generator).to(BF16)
    groups = torch.tensor([2, 0, 3, 0, 1, 2, 2, 0, 3, 2, 2])
    a = torch.randn(d, 3 * d, generator=generator, dtype=F64)
    c = a @ a.T / (3 * d)
    factor = torch.linalg.cholesky(c).float() if matrix in ("factor", "both") else None
    inverse = torch.linalg.inv(c).float() if matrix in ("inverse", "both") else None
    if matrix == "none":
        keys = keys.float()
    got = prefixed_solve_triton(keys, groups, count, factor, inverse)
    plain = reference.prefixed_solve_ref(keys, groups, count, factor, inverse)
    mean = torch.stack([keys.double()[groups == g].mean(0) for g in range(count)])
    solved = mean if matrix == "none" else mean @ torch.linalg.inv(c)
    for mine, theirs, exact in zip(got, plain, (mean, solved, solved @ mean.T), strict=True):
        assert error(mine, exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("d", "width", "rank"), [(1, 1, 1), (33, 129, 1), (17, 40, 3), (20, 70, 16), (5, 70, 21)])
def test_rank_update(d: int, width: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    factor = F64 if dtype == F64 else F32
    weight = torch.randn(d, width, generator=generator).to(dtype)
    left = torch.randn(d, rank, generator=generator, dtype=factor)
    right = torch.randn(rank, width, generator=generator, dtype=factor)
    exact = weight.double() + left.double() @ right.double()
    plain = reference.rank_update_ref_(weight.clone(), left, right)
    got = rank_update_triton_(weight.clone(), left, right)
    transposed = rank_update_triton_(weight.T.contiguous().T, left, right)
    assert torch.equal(got, transposed)
    if dtype == BF16:
        # The interpreter truncates instead of rounding: up to one unit in the last place, 2⁻⁷ relative.
        assert ((got.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()
    else:
        floor = torch.finfo(dtype).eps if d * width == 1 else rounding_of_the_oracle(dtype)
        assert error(got, exact) <= 2 * error(plain, exact) + floor * size(exact)


def test_rank_update_of_strided_views_leaves_the_rest_alone(generator: torch.Generator) -> None:
    store = torch.randn(40, 120, generator=generator)
    before = store.clone()
    weight = store[1::3, 2:100:2]
    left = torch.randn(6, 2 * weight.shape[0], generator=generator).T[::2, ::3]
    right = torch.randn(weight.shape[1], 2, generator=generator, dtype=F64).T
    rank_update_triton_(weight, left, right)
    before[1::3, 2:100:2] += (left.double() @ right).float()
    # Three roundings, of terms below 16.
    assert torch.allclose(store, before, rtol=0, atol=3 * 2**-24 * 16)
    assert float((left.double() @ right).abs().max()) < 16
    untouched = torch.ones(40, 120, dtype=torch.bool)
    untouched[1::3, 2:100:2] = False
    assert torch.equal(store[untouched], before[untouched])


@pytest.mark.parametrize("count", [1, 2])
def test_mean_of_bf16_keys_under_the_identity_is_rounded_once(count: int, generator: torch.Generator) -> None:
    """Without a matrix the result is bf16 like the keys; summed in bf16 it would be off by several units."""
    keys = torch.randn(40, 33, generator=generator).to(BF16)
    groups = torch.arange(40) % count
    mean, _, _ = prefixed_solve_triton(keys, groups, count, None, None)
    exact = torch.stack([keys[groups == group].double().mean(0) for group in range(count)])
    assert mean.dtype == BF16
    assert ((mean.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()


def test_rank_update_of_nothing_changes_nothing() -> None:
    assert torch.equal(rank_update_triton_(torch.ones(2, 3), torch.empty(2, 0), torch.empty(0, 3)), torch.ones(2, 3))
    assert rank_update_triton_(torch.empty(0, 3), torch.empty(0, 2), torch.ones(2, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("n", "d", "width"), [(1, 1, 1), (1, 70, 2100), (9, 1025, 33), (4, 8, 3000)])
def test_low_rank_apply(n: int, d: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    y, x, left, right = random(n, d), random(n, width), random(3, d), random(3, width)
    ids = torch.tensor([2, -1, 0, 2, 1, -5, 0, 0, 1])[:n]
    chosen = ids.clamp(min=0)
    scale = (right[chosen].double() * x.double()).sum(1, keepdim=True) * (ids >= 0).unsqueeze(1)
    exact = y.double() + left[chosen].double() * scale
    plain = reference.low_rank_apply_ref_(y.clone(), x, left, right, ids)
    got = low_rank_apply_triton_(y.clone(), x, left, right, ids)
    assert torch.equal(got[ids < 0], y[ids < 0])
    if dtype == BF16:
        # Truncated by the interpreter, as above.
        assert ((got.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-4).all()
    else:
        # Few sums, whose torch error may be small by chance: one rounding of the sum of magnitudes beside it.
        magnitude = (right[chosen].double() * x.double()).abs().sum(1, keepdim=True) * left[chosen].double().abs()
        floor = torch.finfo(dtype).eps / 2 * size(magnitude)
        assert error(got, exact) <= 2 * error(plain, exact) + floor


def test_low_rank_apply_ignores_what_unedited_rows_hold(generator: torch.Generator) -> None:
    """Strided views all round; NaN in the inputs of skipped rows and in a factor nobody uses must not spread."""
    y = torch.zeros(10, 12).T[::2, 1::3]  # (6, 3)
    x = torch.randn(6, 20, generator=generator)[:, ::2]
    left = torch.randn(3, 4, generator=generator).T
    right = torch.randn(8, 10, generator=generator)[::2]
    ids = torch.tensor([0, 9, -1, 9, 3, 9, 1, 9, -2, 9, 0, 9])[::2]
    x[1] = NAN
    right[2] = NAN
    got = low_rank_apply_triton_(y, x, left, right, ids)
    wanted = torch.zeros(6, 3)
    for row, edit in enumerate(ids.tolist()):
        if edit >= 0:
            wanted[row] = left[edit] * (right[edit] @ x[row])
    # Products of ten terms, themselves with one; all magnitudes below 64.
    assert torch.allclose(got, wanted, rtol=0, atol=2 * 12 * 2**-24 * 64)
    assert low_rank_apply_triton_(y[:0], x[:0], left, right, ids[:0]).shape == (0, 3)


# The mean of no keys is 0 / 0, which numpy, unlike a GPU, remarks on.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_an_id_out_of_range_reads_nothing_and_shows() -> None:
    """On a GPU the ids are not checked beforehand: such a read ended in foreign memory."""
    y = low_rank_apply_triton_(
        torch.zeros(4, 3), torch.ones(4, 5), torch.ones(2, 3), torch.ones(2, 5), torch.tensor([1, 2, -1, 2**40])
    )
    assert y[[0, 2]].tolist() == [[5.0] * 3, [0.0] * 3]
    assert y[[1, 3]].isnan().all()
    keys = torch.arange(15.0).view(5, 3)
    mean, _, _ = prefixed_solve_triton(keys, torch.tensor([1, 3, -1, 1, 7]), 2, None, None)
    assert mean[1].tolist() == [4.5, 5.5, 6.5]
    assert mean[0].isnan().all()


def suffix_call(a: dict[str, Any]) -> reference.SuffixCall:
    return reference.SuffixCall(*(a.get(name) for name in reference.SuffixCall._fields))


def suffix_with_gradients(a: dict[str, Any], outer: Tensor) -> list[Tensor]:
    call = suffix_call(a)
    output, total = suffix_attention_triton(call)
    return [output, *suffix_attention_backward_triton(outer, output, total, call)]


@pytest.mark.parametrize("name", CASES)
def test_suffix_attention(name: str) -> None:
    """What no row is to see is NaN in these cases, and so is all that the code allocates."""
    sizes, options = CASES[name]
    a = arguments(sizes, F32, options)
    outer = torch.randn_like(a["query"])
    assert_as_right_as(suffix_with_gradients(a, outer), a, outer, F32)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_suffix_attention_of_16_bit_queries(dtype: torch.dtype) -> None:
    sizes, options = CASES[ALL_AT_ONCE]
    a = arguments(sizes, dtype, options)
    outer = torch.randn_like(a["query"])
    # The interpreter multiplies in fp32, and loses up to a unit in the last place of what it stores as bf16.
    floor = torch.finfo(BF16).eps if dtype == BF16 else 0.0
    assert_as_right_as(suffix_with_gradients(a, outer), a, outer, F32, floor)


def test_suffix_attention_of_any_layout() -> None:
    sizes, options = CASES["groups of heads"]
    a = arguments(sizes, F32, options)
    for name in ("query", "key", "context_values", "middle_keys"):
        x = a[name]
        a[name] = torch.full((*x.shape[:3], 2 * x.shape[3]), NAN)[..., ::2].copy_(x)
    a["value"] = a["value"].contiguous()
    outer = torch.ones(()).expand(a["query"].shape)
    assert_as_right_as(suffix_with_gradients(a, outer), a, outer, F32)


def test_a_suffix_with_a_number_out_of_range_reads_nothing_and_shows() -> None:
    a = arguments((7, 2, 1, 3, 4, 3, 7, 5), F32, {})
    outer = torch.randn_like(a["query"])
    right = suffix_with_gradients(a, outer)
    wrong = [("context_index", 2**40), ("context_index", -1), ("context_seen", 8), ("context_seen", -1)]
    for row, (name, number) in enumerate([*wrong, ("middle_seen", 6), ("middle_seen", -(2**40))]):
        a[name][row] = number
    for one, two in zip(suffix_with_gradients(a, outer), right, strict=True):
        assert one[:6].isnan().all()
        assert torch.equal(one[6], two[6])


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROME_FAST_KERNELS", "triton")


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", [BF16, SELDOM_F16, F32])
@pytest.mark.parametrize("name", LAYER_CASES)
def test_layer_op(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than one, and heads of which some are none."""
    monkeypatch.setattr(configs, "GATED_BLOCK", 256)
    monkeypatch.setattr(configs, "ROTATED_BLOCK", 256)
    run, formula, leaves, others = LAYER_CASES[name](dtype)
    # The interpreter loses up to a unit in the last place of what it rounds to bf16, twice in a norm of heads.
    floor = 2 * torch.finfo(BF16).eps if dtype == BF16 else 0.0
    assert_layer_op_as_right_as(layer_op_with_gradients(run, leaves, others), formula, leaves, others, floor)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", ["norm of a sum", "rotation of normed heads", "gelu"])
def test_layer_op_of_any_layout(name: str) -> None:
    run, formula, leaves, others = LAYER_CASES[name](F32)

    def spread(x: Tensor) -> Tensor:
        return torch.full((*x.shape[:-1], 2 * x.shape[-1]), NAN)[..., ::2].copy_(x)

    views = [spread(x) for x in leaves], [spread(x) for x in others]
    assert_layer_op_as_right_as(layer_op_with_gradients(run, *views), formula, leaves, others)


@pytest.mark.usefixtures("forced")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_of_large_numbers(activation: str) -> None:
    """Where exp overflows."""
    x = torch.tensor([-3e4, -200.0, -90.0, 0.0, 90.0, 200.0, 3e4, NAN])
    right = [torch.zeros(8), torch.zeros(8)]
    right[0][4:7] = x[4:7]
    right[1][4:7] = 1
    value = kernels.gated_activation(x, torch.ones(8), activation)
    slope, _ = torch.ops.rome_fast.gated_activation_backward(torch.ones(8), x, torch.ones(8), activation)
    assert value[7].isnan()
    assert torch.equal(value[:7], right[0][:7])
    assert torch.equal(slope[[0, 1, 2, 4, 5, 6]], right[1][[0, 1, 2, 4, 5, 6]])


@pytest.mark.usefixtures("forced")
def test_a_row_wider_than_the_kernel_takes() -> None:
    wide = torch.ones(1, configs.NORM_WIDTH + 1)
    with pytest.raises(RuntimeError, match="ROME_FAST_KERNELS=triton: the kernel takes rows of 16384 at most"):
        kernels.add_rms_norm(wide, None, wide[0], EPS)
    with pytest.raises(RuntimeError, match="ROME_FAST_KERNELS=triton: there is no kernel for fp64"):
        kernels.gated_activation(wide.double(), wide.double(), "silu")


def far_apart(rows: int, columns: int, dtype: torch.dtype = F16) -> Tensor:
    """Rows whose stride still fits 32 bits, unlike the offset of the third. Only touched pages become real memory."""
    step = 2**30 + 16
    return torch.empty(step * (rows - 1) + columns, dtype=dtype).as_strided((rows, columns), (step, 1))


@pytest.fixture
def unpoisoned() -> None:
    """Filling gigabytes with NaN would make them real."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unpoisoned")
def test_addresses_past_two_to_the_31(generator: torch.Generator) -> None:
    """An offset taken in 32 bits wraps, and reads or writes somewhere else."""
    far = far_apart(3, 16)
    near = torch.randn(3, 16, generator=generator).to(F16)

    def reset() -> Tensor:
        return far.copy_(near)

    total = second_moment_triton_(blank(16), reset(), None)
    again = second_moment_triton_(blank(16), near, None)
    assert torch.equal(total.tril(), again.tril())
    masked = second_moment_triton_(blank(16), reset(), torch.tensor([False, True, True]))
    assert torch.equal(masked.tril(), second_moment_triton_(blank(16), near[1:], None).tril())

    mean, _, _ = prefixed_solve_triton(reset(), torch.tensor([0, 0, 0]), 1, torch.eye(16), None)
    # Three terms: two additions and a division.
    assert torch.allclose(mean, near.float().mean(0, keepdim=True), rtol=0, atol=3 * 2**-23 * float(near.abs().max()))

    left, right = torch.randn(3, 1, generator=generator), torch.randn(1, 16, generator=generator)
    assert torch.equal(rank_update_triton_(reset(), left, right), rank_update_triton_(near.clone(), left, right))

    y = torch.randn(3, 16, generator=generator).to(F16)
    ids = torch.tensor([2, 1, 2])
    wanted = low_rank_apply_triton_(y.clone(), near, near, near, ids)
    reset()
    assert torch.equal(low_rank_apply_triton_(y.clone(), far, far, far, ids), wanted)
    far.copy_(y)
    assert torch.equal(low_rank_apply_triton_(far, near, near, near, ids), wanted)

    reset()
    far = far.as_strided((3, 1, 1, 16), (far.stride(0), 1, 1, 1))
    near = near.view(far.shape)
    a = dict.fromkeys(("query", "key", "value", "context_keys", "context_values", "middle_keys", "middle_values"), near)
    a |= {name: torch.tensor([1, 2, 0]) for name in ("context_index", "context_seen", "middle_seen")}
    a |= {"context_seen": torch.ones(3).long(), "middle_seen": torch.ones(3).long(), "scale": 0.25}
    wanted = suffix_with_gradients(a, near)
    for name in a:
        if isinstance(a[name], Tensor) and a[name].dim() == 4:
            assert all(map(torch.equal, suffix_with_gradients(a | {name: far}, near), wanted)), name
    assert all(map(torch.equal, suffix_with_gradients(a, far), wanted))


@pytest.mark.usefixtures("unpoisoned")
def test_totals_and_inverses_past_two_to_the_31() -> None:
    store = far_apart(3, 3, F32)
    store.zero_()
    second_moment_triton_(store, torch.tensor([[1.0, 2.0, 3.0]]).half(), None)
    assert store.tril().tolist() == [[1, 0, 0], [2, 4, 0], [3, 6, 9]]
    store.copy_(torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 5.0]]))
    solved, shares = apply_inverse_triton(store, torch.tensor([1.0, 10.0, 2.0]))
    assert solved.tolist() == [12, 31, 10]
    assert float(shares.sum()) == 342


def test_the_public_ops_reach_the_kernels(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Forced onto triton, every op takes another path than the reference and says so."""
    monkeypatch.setenv("ROME_FAST_KERNELS", "triton")
    names = ("second_moment_ref_", "prefixed_solve_ref", "rank_update_ref_", "low_rank_apply_ref_")
    names += ("suffix_attention_ref", "suffix_attention_backward_ref", "add_rms_norm_ref", "rotate_heads_ref")
    for name in (*names, "gated_activation_ref"):
        monkeypatch.delattr(reference, name)
    assert kernels.explain("cpu")["second_moment_"] == ("triton", "ROME_FAST_KERNELS=triton")
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert kernels.second_moment_(torch.zeros(2, 2), x).tril().tolist() == [[10, 0], [14, 20]]
    mean, solved, gram = kernels.prefixed_solve(x, torch.tensor([0, 0]), 1, None, 2 * torch.eye(2))
    assert (mean.tolist(), solved.tolist(), gram.tolist()) == ([[2, 3]], [[4, 6]], [[26]])
    assert kernels.rank_update_(x.clone(), torch.ones(2, 1), torch.ones(1, 2)).tolist() == [[2, 3], [4, 5]]
    y = torch.zeros(2, 1)
    kernels.low_rank_apply_(y, x, torch.tensor([[2.0]]), torch.ones(1, 2), torch.tensor([-1, 0]))
    assert y.tolist() == [[0], [14]]
    ones = torch.ones(1, 1, 1, 2)
    assert kernels.add_rms_norm(x, x, torch.ones(2), 0.0)[0].tolist() == [[2, 4], [6, 8]]
    assert kernels.rotate_heads(ones, ones, 2 * ones[0], ones[0])[0].tolist() == [[[[1, 3]]]]
    assert kernels.gated_activation(x, x, "relu").tolist() == [[1, 4], [9, 16]]
    sizes, options = CASES[ALL_AT_ONCE]
    a = arguments(sizes, F32, options)
    outer = torch.randn_like(a["query"])
    got = with_gradients(lambda b: kernels.suffix_attention(**b), a, outer)
    assert_as_right_as(got, a, outer, F32)
    with pytest.raises(RuntimeError, match="ROME_FAST_KERNELS=triton: the kernel takes heads of 128 at most"):
        kernels.suffix_attention(**arguments((1, 1, 1, 1, 129, 1, 1, None), F32, {}))
    with pytest.raises(RuntimeError, match="ROME_FAST_KERNELS=triton: fp64 rows have no 16-bit pieces"):
        kernels.second_moment_(torch.zeros(2, 2), x.double())


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("sizes", LOSS_SIZES)
def test_target_losses(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more blocks than one."""
    monkeypatch.setattr(configs, "LOGITS_BLOCK", 128)
    check_losses(sizes, F32)


@pytest.mark.usefixtures("forced")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_target_losses_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "LOGITS_BLOCK", 16)
    check_faults()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("stop_loss", [None, 0.6])
def test_the_stop_rule_is_the_reference(stop_loss: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "STATE_BLOCK", 16)
    state = Edits(35, 33)
    edits = torch.cat([torch.randperm(34)[:30], torch.tensor([34, 34])])  # two free slots
    state.done[34] = state.judged[34] = True
    got, ended = judged_by(kernels.operators.stop_rule_, state, edits, stop_loss)
    wanted, over = judged_by(reference.stop_rule_ref_, state, edits, stop_loss)
    assert torch.equal(ended, over)
    wanted.losses[:, -1] = state.losses[:, -1]  # where the reference puts what has no place
    for name, one in vars(got).items():
        # A norm of 33 numbers, times the decay, added to a loss.
        torch.testing.assert_close(one, getattr(wanted, name), rtol=8 * 2**-23, atol=0, equal_nan=True)


@pytest.mark.usefixtures("forced")
def test_clamped_adam_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "STATE_BLOCK", 16)
    state = Edits(35, 33)
    edits = torch.cat([torch.randperm(34)[:30], torch.tensor([34, 34])])
    state.judged = torch.arange(35) % 5 < 4  # of the first in both columns, and of free slots' edit
    state.done[34] = True
    got, _ = moved_by(kernels.operators.clamped_adam_, state, edits)
    wanted, _ = moved_by(reference.clamped_adam_ref_, state, edits)
    assert not torch.equal(got.delta, state.delta)
    for name, one in vars(got).items():
        # Ten operations on each number; of what is taken from another one, up to a few times as large.
        torch.testing.assert_close(one, getattr(wanted, name), rtol=20 * 2**-23, atol=20 * 2**-23, equal_nan=True)
