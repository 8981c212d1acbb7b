"""Every op against its definition in float64, in every dtype, and every argument it must refuse.

All of it twice: on the reference, and on what is chosen by itself on this machine.
A bound is written as the rounding errors that the op's docstring allows: u = eps / 2 for each rounding, and one
rounding per addition of a sum.
"""

import pytest
import torch
from rome_fast.kernels import low_rank_apply_, mirror_lower_, prefixed_solve, rank_update_, second_moment_

from helpers import bits, relative_error

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
NAN = float("nan")


@pytest.fixture(autouse=True, params=["reference", ""], ids=["reference", "chosen"])
def backend(request, monkeypatch):
    monkeypatch.setenv("ROME_FAST_KERNELS", request.param)


def eps(dtype):
    return torch.finfo(dtype).eps


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def symmetric(d, dtype):
    """What stands in `total` before a call: the upper triangle is not defined, so NaN must do no harm there."""
    start = torch.randn(d, d).to(dtype)
    return start + torch.full_like(start, NAN).triu(1), start.tril() + start.tril(-1).T


def assert_within(got, wanted, bound):
    """|got - wanted| <= bound everywhere; in float64."""
    error = (got.double() - wanted).abs()
    assert bool((error <= bound).all()), f"worst excess {float((error - bound).max()):.2e}"


# second_moment_ and mirror_lower_


def assert_second_moment(total, before, x, mask=None):
    rows = x.double() if mask is None else x.double()[mask]
    wanted = before.double() + rows.T @ rows
    inner, outer = eps(wide(x.dtype)) / 2, eps(total.dtype) / 2
    sums = rows.abs().T @ rows.abs()
    # n products and n - 1 additions in the inner dtype, its rounding to the outer one, one addition there.
    bound = (len(rows) + 2) * inner * sums + 2 * outer * (before.double().abs() + sums)
    if x.dtype == total.dtype:
        # The sum may also run inside the accumulator.
        bound += (len(rows) + 2) * outer * (sums + before.double().abs())
    assert_within(total, wanted, bound)


@pytest.mark.parametrize("total_dtype", WIDE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (1, 5), (17, 7), (130, 33)])
def test_second_moment(n, d, dtype, total_dtype):
    total, before = symmetric(d, total_dtype)
    x = torch.randn(n, d).to(dtype)
    assert second_moment_(total, x) is total
    assert mirror_lower_(total) is total
    assert torch.equal(total, total.T)
    assert_second_moment(total, before, x)


@pytest.mark.parametrize("dtype", FLOATS)
def test_second_moment_reads_nothing_of_masked_rows(dtype):
    total, before = symmetric(9, torch.float64)
    x = torch.randn(23, 9).to(dtype)
    mask = torch.rand(23) < 0.6
    clean = x.clone()
    x[~mask] = NAN
    second_moment_(total, x, mask)
    assert_second_moment(mirror_lower_(total), before, clean, mask)


def test_second_moment_of_a_mask_that_keeps_nothing_changes_nothing():
    total, before = symmetric(4, torch.float32)
    second_moment_(total, torch.randn(6, 4), torch.zeros(6, dtype=torch.bool))
    assert torch.equal(mirror_lower_(total), before)


@pytest.mark.parametrize("total_dtype", WIDE)
@pytest.mark.parametrize(
    "view",
    [lambda big: big[::2, 3:11], lambda big: big[:8].T, lambda big: big[:, 1::5], lambda big: big[:1].expand(7, -1)],
    ids=["rows and a slice", "transposed", "columns", "expanded"],
)
def test_second_moment_of_a_strided_view(view, total_dtype):
    x = view(torch.randn(20, 40))
    total, before = symmetric(x.shape[1], total_dtype)
    assert_second_moment(mirror_lower_(second_moment_(total, x)), before, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_second_moment_into_a_part_of_a_larger_tensor_leaves_the_rest(transposed):
    big = torch.full((12, 12), 7.0, dtype=torch.float64)
    total = big[2:10:2, 3:11:2]
    total = total.T if transposed else total
    total.zero_()
    x = torch.randn(5, 4)
    assert_second_moment(mirror_lower_(second_moment_(total, x)), torch.zeros(4, 4), x)
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[2:10:2, 3:11:2] = True
    assert bool((big[~inside] == 7).all())


def test_second_moment_sums_many_calls_in_the_dtype_of_total():
    """A million rows of fp16 products would lose everything small if the sum were kept in fp32."""
    total = torch.zeros(1, 1, dtype=torch.float64)
    total += 2.0**26
    for _ in range(10):
        second_moment_(total, torch.ones(1, 1, dtype=torch.float16))
    assert total.item() == 2.0**26 + 10


def relative_error_of_moment(total, wanted):
    return float((total.double() - wanted).tril().norm() / wanted.tril().norm())


@pytest.mark.parametrize("calls", ["different", "alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moment_of_a_million_rows_in_a_thousand_calls(dtype, calls):
    """The op's promise, 1e-6. Positive terms, whose roundings do not cancel within a call; in calls that are alike, nor
    from call to call: there an fp32 total fails, as documented.

    n roundings of a growing sum, each 0.4 u of it on average, make 0.4 u √(n/3) where they are independent: 4e-7 for
    1,000 rows in the worst order, a single chain. That is an fp64 total's error where calls are alike; where they
    differ it is √1000 times less. A thousand additions to an fp32 total add 4e-7 where calls differ. Where they are
    alike, an entry is rounded the same way for a whole binade: some 500 times 0.3 · 2u of it, 1e-5.
    """
    totals = {total_dtype: torch.zeros(64, 64, dtype=total_dtype) for total_dtype in WIDE}
    wanted = torch.zeros(64, 64, dtype=torch.float64)
    x = torch.rand(1000, 64).to(dtype)
    for _ in range(1000):
        if calls == "different":
            x = torch.rand(1000, 64).to(dtype)
            wanted.addmm_(x.double().T, x.double())
        for total in totals.values():
            second_moment_(total, x)
    if calls == "alike":
        wanted = 1000 * (x.double().T @ x.double())
    assert relative_error_of_moment(totals[torch.float64], wanted) <= 1e-6
    assert (relative_error_of_moment(totals[torch.float32], wanted) <= 1e-6) == (calls == "different")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moment_of_many_rows_in_one_call(dtype):
    """The op's promise, 1e-6, holds within a call as well. In any order, 8,192 rows err by 0.4 u √(8192/3), 1.3e-6, and
    64 such parts, whose errors differ, by an eighth of it."""
    x = torch.rand(1 << 19, 32).to(dtype)
    wanted = sum(part.double().T @ part.double() for part in x.split(8192))
    assert relative_error_of_moment(second_moment_(torch.zeros(32, 32, dtype=torch.float64), x), wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_moment_leaves_fp32_after_8192_rows(dtype):
    """Whole numbers, 8,192 of whose products stay below 2²⁴: fp32 sums them without any rounding, in whatever order.
    With the 1 in `total`, the sum of all is an odd number above 2²⁷, which no fp32 number is."""
    x = torch.randint(0, 23, (1 << 19, 8)).mul_(2).add_(1).to(dtype)
    wanted = sum(part.double().T @ part.double() for part in x.split(8192)) + 1
    got = mirror_lower_(second_moment_(torch.ones(8, 8, dtype=torch.float64), x))
    assert torch.equal(got, wanted)
    assert bool((wanted > 2.0**27).all())
    assert bool((wanted.float().double() != wanted).any())


def test_mirror_lower_takes_the_lower_triangle():
    total = torch.tensor([[1.0, NAN, NAN], [2.0, 3.0, NAN], [4.0, 5.0, 6.0]])
    assert mirror_lower_(total).tolist() == [[1, 2, 4], [2, 3, 5], [4, 5, 6]]
    assert mirror_lower_(torch.empty(0, 0)).shape == (0, 0)


# prefixed_solve


def spd(d):
    """(C, its lower Cholesky factor) in float64, condition about 30."""
    root = torch.randn(d, d, dtype=torch.float64) / d**0.5
    c = root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)
    return c, torch.linalg.cholesky(c)


def assert_prefixed_solve(keys, groups, count, c, result, dtype):
    """Against the mean of plain indexing and the explicit inverse."""
    mean = torch.stack([keys.double()[groups == g].mean(0) for g in range(count)])
    inverse = torch.linalg.inv(c)
    # Backward stable: relative error of condition · dimension · u, with room for the mean's own n additions.
    allowed = (float(torch.linalg.cond(c)) * keys.shape[1] + len(keys)) * eps(dtype)
    for got, wanted in zip(result, (mean, mean @ inverse, mean @ inverse @ mean.T), strict=True):
        assert got.dtype == dtype
        assert got.shape == wanted.shape
        assert float((got.double() - wanted).norm()) <= allowed * float(wanted.norm())


@pytest.mark.parametrize("factor_dtype", WIDE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("d", "groups"),
    [
        (1, [0]),
        (5, [0]),
        (9, [0, 0, 0]),
        (9, [2, 0, 1]),
        (13, [1, 0, 2, 1, 1, 0, 1, 3, 1]),
    ],
    ids=["one number", "one key", "one edit", "single keys, unordered", "ragged, unordered"],
)
def test_prefixed_solve(d, groups, dtype, factor_dtype):
    keys, groups = torch.randn(len(groups), d).to(dtype), torch.tensor(groups)
    count = int(groups.max()) + 1
    factor = spd(d)[1].to(factor_dtype)
    exact = factor.double() @ factor.double().T
    assert_prefixed_solve(keys, groups, count, exact, prefixed_solve(keys, groups, count, factor), factor_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_prefixed_solve_with_the_identity(dtype):
    keys, groups = torch.randn(7, 11).to(dtype), torch.tensor([1, 0, 1, 1, 2, 0, 1])
    result = prefixed_solve(keys, groups, 3, None)
    assert_prefixed_solve(keys, groups, 3, torch.eye(11, dtype=torch.float64), result, dtype)


def test_prefixed_solve_in_float64_is_exact_to_its_last_digits():
    keys, groups = torch.randn(40, 33, dtype=torch.float64), torch.randint(0, 4, (40,))
    groups[:4] = torch.arange(4)
    c, factor = spd(33)
    mean, solved, gram = prefixed_solve(keys, groups, 4, factor)
    wanted = torch.stack([keys[groups == g].mean(0) for g in range(4)])
    # Means of at most 40 keys; u κ of two triangular solves, and of the inverse that they are compared with.
    assert relative_error(mean, wanted) <= 40 * eps(torch.float64) / 2
    allowed = 4 * float(torch.linalg.cond(c)) * eps(torch.float64) / 2
    assert relative_error(solved, wanted @ torch.linalg.inv(c)) <= allowed
    assert relative_error(gram, wanted @ torch.linalg.inv(c) @ wanted.T) <= allowed


def test_prefixed_solve_of_strided_keys_and_factor():
    keys = torch.randn(30, 14, dtype=torch.float64)[::3, 1::2]
    c, factor = spd(7)
    # A factor that is stored as its own transpose.
    result = prefixed_solve(keys, torch.arange(10) % 3, 3, factor.T.contiguous().T)
    assert_prefixed_solve(keys, torch.arange(10) % 3, 3, c, result, torch.float64)


def test_prefixed_solve_leaves_its_arguments():
    keys, (_, factor) = torch.randn(4, 6, dtype=torch.float64), spd(6)
    before = bits(keys), bits(factor)
    mean, solved, _ = prefixed_solve(keys, torch.arange(4), 4, None)
    mean.zero_(), solved.zero_()
    prefixed_solve(keys, torch.arange(4), 4, factor)
    assert torch.equal(bits(keys), before[0])
    assert torch.equal(bits(factor), before[1])


# rank_update_


def assert_rank_update(got, weight, left, right):
    """One rounding to the weight's dtype of a sum whose terms were rounded in the wider one."""
    terms = left.double().abs() @ right.double().abs() + weight.double().abs()
    wanted = weight.double() + left.double() @ right.double()
    inner = (left.shape[1] + 3) * eps(wide(weight.dtype)) / 2 * terms
    outer = eps(weight.dtype) / 2 * wanted.abs() + torch.finfo(weight.dtype).smallest_normal * eps(weight.dtype)
    assert_within(got, wanted, outer + 2 * inner)


@pytest.mark.parametrize("factor_dtype", WIDE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("d", "d_ff", "r"), [(1, 1, 1), (5, 9, 1), (9, 5, 3), (33, 17, 8), (3, 4, 0), (0, 4, 1)])
def test_rank_update(d, d_ff, r, dtype, factor_dtype):
    before = torch.randn(d, d_ff).to(dtype)
    left, right = torch.randn(d, r).to(factor_dtype), torch.randn(r, d_ff).to(factor_dtype)
    weight = before.clone()
    assert rank_update_(weight, left, right) is weight
    assert_rank_update(weight, before, left, right)
    if r == 0:
        assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rank_update_of_a_transposed_weight(dtype, r):
    """GPT-2 stores the transpose of (d, d_ff)."""
    before = torch.randn(9, 5).to(dtype)
    left, right = torch.randn(5, r), torch.randn(r, 9)
    stored = before.clone()
    rank_update_(stored.T, left, right)
    assert stored.is_contiguous()
    assert_rank_update(stored.T, before.T, left, right)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rank_update_of_a_strided_view_leaves_the_rest(dtype):
    big = torch.randn(12, 15).to(dtype)
    before = big.clone()
    left, right = torch.randn(16, 2)[::4], torch.randn(5, 2).T
    rank_update_(big[::3, 1::3], left, right)
    assert_rank_update(big[::3, 1::3], before[::3, 1::3], left, right)
    big[::3, 1::3] = before[::3, 1::3]
    assert torch.equal(bits(big), bits(before))


def test_rank_update_rounds_once():
    """bf16 has a step of 2⁻⁷ at 1: 1 + 6 · 2⁻¹⁰ rounds up to 1 + 2⁻⁷, whereas added one by one all six are lost."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    rank_update_(weight, torch.full((1, 6), 2.0**-5), torch.full((6, 1), 2.0**-5))
    assert weight.item() == 1 + 2.0**-7


# low_rank_apply_


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m", "d", "d_ff"), [(0, 2, 3, 4), (1, 1, 1, 1), (19, 4, 7, 11)])
def test_low_rank_apply(n, m, d, d_ff, dtype):
    before, x = torch.randn(n, d).to(dtype), torch.randn(n, d_ff).to(dtype)
    left, right = torch.randn(m, d).to(dtype), torch.randn(m, d_ff).to(dtype)
    ids = torch.randint(-1, m, (n,))
    y = before.clone()
    assert low_rank_apply_(y, x, left, right, ids) is y

    for row, edit in enumerate(ids.tolist()):
        if edit < 0:
            assert torch.equal(bits(y[row]), bits(before[row]))
            continue
        key, u, r = x[row].double(), right[edit].double(), left[edit].double()
        wanted = before[row].double() + r * (u @ key)
        terms = before[row].double().abs() + r.abs() * (u.abs() @ key.abs())
        inner = (d_ff + 3) * eps(wide(dtype)) / 2 * terms
        assert_within(y[row], wanted, 2 * inner + eps(dtype) / 2 * wanted.abs() + torch.finfo(dtype).tiny)


def test_low_rank_apply_does_not_read_rows_without_an_edit():
    y, x = torch.full((3, 2), NAN), torch.full((3, 4), NAN)
    y[1], x[1] = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    low_rank_apply_(y, x, torch.tensor([[10.0, 100.0]]), torch.ones(1, 4), torch.tensor([-1, 0, -7]))
    assert y[1].tolist() == [101, 1002]
    assert bool(y[[0, 2]].isnan().all())


def test_low_rank_apply_without_any_edit_changes_nothing():
    y = torch.randn(3, 2)
    before = bits(y)
    low_rank_apply_(y, torch.randn(3, 4), torch.empty(0, 2), torch.empty(0, 4), torch.full((3,), -1))
    assert torch.equal(bits(y), before)


def test_low_rank_apply_with_factors_of_another_dtype_and_views():
    before = torch.randn(6, 8).to(torch.bfloat16)[:, ::2]
    y, x = before.clone(), torch.randn(5, 6).T
    left, right, ids = torch.randn(4, 2, dtype=torch.float64).T, torch.randn(2, 5), torch.tensor([0, 1, 1, -1, 0, 1])
    low_rank_apply_(y, x, left, right, ids)
    wanted = before.double() + (ids >= 0)[:, None] * left[ids] * (right.double()[ids] * x.double()).sum(1)[:, None]
    # One rounding to bf16, of terms that were rounded in fp32, five of them in a product.
    terms = before.double().abs() + left[ids].abs() * (right.double()[ids] * x.double()).abs().sum(1)[:, None]
    assert_within(y, wanted, eps(torch.bfloat16) / 2 * wanted.abs() + (5 + 3) * eps(torch.float32) / 2 * terms)


# What each op refuses. Every case is (change of valid arguments, error, message); the first argument is the target.

VALID = {
    second_moment_: lambda: {"total": torch.ones(3, 3), "x": torch.ones(5, 3), "mask": torch.ones(5).bool()},
    mirror_lower_: lambda: {"total": torch.ones(3, 3)},
    prefixed_solve: lambda: {
        "keys": torch.ones(4, 3),
        "groups": torch.tensor([0, 1, 1, 0]),
        "count": 2,
        "factor": torch.eye(3),
    },
    rank_update_: lambda: {"weight": torch.ones(3, 5), "left": torch.ones(3, 2), "right": torch.ones(2, 5)},
    low_rank_apply_: lambda: {
        "y": torch.ones(4, 3),
        "x": torch.ones(4, 5),
        "left": torch.ones(2, 3),
        "right": torch.ones(2, 5),
        "ids": torch.tensor([0, -1, 1, 1]),
    },
}

REFUSED = [
    (second_moment_, {"total": torch.ones(3, 3).bfloat16()}, TypeError, r"total: got dtype torch.bfloat16, wanted"),
    (second_moment_, {"total": torch.ones(3, 4)}, ValueError, r"total: got 3 rows .*wanted 4"),
    (second_moment_, {"total": torch.ones(9)}, ValueError, r"total: got shape \(9,\), wanted 2 dim"),
    (second_moment_, {"x": torch.ones(5, 3).long()}, TypeError, r"x: got dtype torch.int64, wanted"),
    (second_moment_, {"x": torch.ones(5, 4)}, ValueError, r"x: got 4 columns, wanted 3"),
    (second_moment_, {"x": torch.ones(1, 5, 3)}, ValueError, r"x: got shape \(1, 5, 3\), wanted 2 dim"),
    (second_moment_, {"x": torch.ones(5, 3, device="meta")}, ValueError, r"x: got device meta, wanted cpu"),
    (second_moment_, {"x": [[1.0, 2.0, 3.0]]}, TypeError, r"x: got list, wanted a torch.Tensor"),
    (second_moment_, {"mask": torch.ones(5)}, TypeError, r"mask: got dtype torch.float32, wanted one of bool"),
    (second_moment_, {"mask": torch.ones(4).bool()}, ValueError, r"mask: got 4 entries, wanted 5"),
    (mirror_lower_, {"total": torch.ones(3, 2)}, ValueError, r"total: got 3 rows .*wanted 2"),
    (mirror_lower_, {"total": torch.ones(3, 3).half()}, TypeError, r"total: got dtype torch.float16"),
    (prefixed_solve, {"keys": torch.ones(4, 3).int()}, TypeError, r"keys: got dtype torch.int32"),
    (prefixed_solve, {"groups": torch.zeros(4).int()}, TypeError, r"groups: got dtype torch.int32, wanted one of int"),
    (prefixed_solve, {"groups": torch.tensor([0, 1, 1])}, ValueError, r"groups: got 3 entries, wanted 4"),
    (prefixed_solve, {"count": 3}, ValueError, r"groups: wanted every id of 0 .. 2 .*got \[0, 1\]"),
    (prefixed_solve, {"groups": torch.tensor([0, 2, 2, 0])}, ValueError, r"every id of 0 .. 1 .*got \[0, 2\]"),
    (prefixed_solve, {"groups": torch.tensor([0, 1, -1, 0])}, ValueError, r"every id of 0 .. 1 .*got \[-1, 0, 1\]"),
    (
        prefixed_solve,
        {"keys": torch.ones(0, 3), "groups": torch.zeros(0).long(), "count": 0},
        ValueError,
        "count: got 0, wanted at least 1",
    ),
    (prefixed_solve, {"factor": torch.eye(3).half()}, TypeError, r"factor: got dtype torch.float16"),
    (prefixed_solve, {"factor": torch.eye(4)}, ValueError, r"factor: got 4 rows, wanted 3"),
    (prefixed_solve, {"factor": torch.ones(3, 4)}, ValueError, r"factor: got 3 rows for a square matrix, wanted 4"),
    (prefixed_solve, {"factor": torch.eye(3, device="meta")}, ValueError, r"factor: got device meta, wanted cpu"),
    (rank_update_, {"weight": torch.ones(3, 5).int()}, TypeError, r"weight: got dtype torch.int32"),
    (rank_update_, {"left": torch.ones(3, 2).bfloat16()}, TypeError, r"left: got dtype torch.bfloat16, wanted"),
    (rank_update_, {"left": torch.ones(4, 2)}, ValueError, r"left: got 4 rows, wanted 3"),
    (rank_update_, {"left": torch.ones(3)}, ValueError, r"left: got shape \(3,\), wanted 2 dim"),
    (rank_update_, {"right": torch.ones(3, 5)}, ValueError, r"right: got 3 rows, wanted 2"),
    (rank_update_, {"right": torch.ones(2, 6)}, ValueError, r"right: got 6 columns, wanted 5"),
    (rank_update_, {"right": torch.ones(2, 5, device="meta")}, ValueError, r"right: got device meta, wanted cpu"),
    (low_rank_apply_, {"y": torch.ones(4, 3).long()}, TypeError, r"y: got dtype torch.int64"),
    (low_rank_apply_, {"x": torch.ones(3, 5)}, ValueError, r"x: got 3 rows, wanted 4"),
    (low_rank_apply_, {"left": torch.ones(2, 4)}, ValueError, r"left: got 4 columns, wanted 3"),
    (low_rank_apply_, {"right": torch.ones(3, 5)}, ValueError, r"right: got 3 rows, wanted 2"),
    (low_rank_apply_, {"right": torch.ones(2, 4)}, ValueError, r"right: got 4 columns, wanted 5"),
    (low_rank_apply_, {"ids": torch.zeros(4).int()}, TypeError, r"ids: got dtype torch.int32"),
    (low_rank_apply_, {"ids": torch.zeros(3).long()}, ValueError, r"ids: got 3 entries, wanted 4"),
    (low_rank_apply_, {"ids": torch.tensor([0, 1, 2, 0])}, ValueError, r"ids: got 2, wanted less than the 2 edits"),
    (low_rank_apply_, {"x": torch.ones(4, 5, device="meta")}, ValueError, r"x: got device meta, wanted cpu"),
]


@pytest.mark.parametrize(
    ("op", "change", "error", "message"), REFUSED, ids=lambda v: v.__name__ if callable(v) else None
)
def test_what_an_op_refuses_leaves_its_target(op, change, error, message):
    arguments = VALID[op]()
    op(**VALID[op]())
    arguments.update(change)
    target = next(iter(arguments.values()))
    before = bits(target)
    with pytest.raises(error, match=message):
        op(**arguments)
    assert torch.equal(bits(target), before)


@pytest.mark.parametrize("name", ["left", "right"])
def test_rank_update_refuses_factors_that_share_the_weights_memory(name):
    storage = torch.randn(8, 4)
    arguments = {"weight": storage[:4], "left": torch.ones(4, 4), "right": torch.ones(4, 4)}
    arguments[name] = storage[4:]
    before = bits(storage)
    with pytest.raises(ValueError, match=f"{name} shares memory with weight; pass a copy"):
        rank_update_(**arguments)
    assert torch.equal(bits(storage), before)


def test_second_moment_refuses_rows_that_share_the_totals_memory():
    total = torch.randn(4, 4)
    before = bits(total)
    with pytest.raises(ValueError, match="x shares memory with total; pass a copy"):
        second_moment_(total, total[:2])
    assert torch.equal(bits(total), before)
