"""The native kernels against float64 in every instruction set of this CPU, the choice of them, and life without them.

Everything goes through the public ops with the backend forced, so that nothing can fall back unseen. NaN stands
wherever a kernel must not read, and what it must not write is compared by its bytes.
"""

import contextlib
import ctypes

import pytest
import torch
from rome_fast.kernels import explain, low_rank_apply_, native, rank_update_, reference, second_moment_

from helpers import bits

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = float("nan")
U = 2.0**-24  # of one rounding in fp32

built = pytest.mark.skipif(native.obstacle() is not None, reason=str(native.obstacle()))


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("ROME_FAST_KERNELS", "native")


def instruction_sets():
    """Those of this CPU; its best one stays selected."""
    if native.obstacle():
        return ["generic"]
    best, found = native.instruction_set(), []
    for name in ("generic", "avx2", "avx512"):
        with contextlib.suppress(ValueError):
            native.select(name)
            found.append(name)
    native.select(best)
    return found


@pytest.fixture(params=instruction_sets())
def instruction_set(request, forced):
    best = native.instruction_set()
    native.select(request.param)
    yield request.param
    native.select(best)


@pytest.fixture
def threads():
    """A function that sets the number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def blank(d, dtype=F64):
    """A total of zeros whose upper triangle, which is not defined, is NaN."""
    return torch.zeros(d, d, dtype=dtype).masked_fill(torch.ones(d, d).triu(1).bool(), NAN)


def exact_moment(x):
    """Lower triangle of XᵀX, and of the sum of the sizes of its terms, in float64."""
    return (x.double().T @ x.double()).tril(), (x.double().abs().T @ x.double().abs()).tril()


# second_moment_


@built
@pytest.mark.parametrize("total_dtype", [F32, F64])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("n", "d"), [(0, 3), (1, 1), (1, 25), (13, 24), (255, 23), (257, 49), (1025, 97), (2500, 31), (60, 401)]
)
def test_second_moment_errs_no_more_than_torch(n, d, dtype, total_dtype, instruction_set):
    x = torch.randn(n, d).to(dtype)
    total = blank(d, total_dtype)
    upper = bits(total[total.isnan()])
    assert second_moment_(total, x) is total
    assert torch.equal(bits(total[torch.ones(d, d).triu(1).bool()]), upper)
    wanted, size = exact_moment(x)
    error = total.double().tril().nan_to_num(0) - wanted
    # A chain of 128, its sum with up to seven more, and one rounding of a total in fp32 per 1,024 rows.
    roundings = min(n, 128) + 9 + (n // 1024 + 1 if total_dtype == F32 else 0)
    assert bool((error.abs() <= roundings * U * size).all())
    plain = reference.second_moment_ref_(torch.zeros(d, d, dtype=total_dtype), x, None).double().tril() - wanted
    # Seen: at most 1.3 times the error of torch.
    assert float(error.norm()) <= 2 * float(plain.norm())


@built
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_second_moment_reads_no_masked_row_and_nothing_between_rows(dtype, instruction_set):
    big = torch.full((2300, 40), NAN, dtype=dtype)
    mask = torch.rand(1150) < 0.9
    mask[64:128] = False
    x = big[::2, 5:34]
    x[mask] = torch.randn(int(mask.sum()), 29).to(dtype)
    total = blank(29)
    second_moment_(total, x, mask)
    wanted, size = exact_moment(x[mask])
    assert bool(((total.tril().nan_to_num(0) - wanted).abs() <= 137 * U * size).all())
    assert bool(total[mask.new_ones(29, 29).triu(1)].isnan().all())
    before = bits(total)
    second_moment_(total, x, torch.zeros(1150, dtype=torch.bool))
    assert torch.equal(bits(total), before)


@built
@pytest.mark.parametrize("view", ["every second entry", "expanded"])
def test_second_moment_with_a_mask_that_is_a_view(view, forced):
    x = torch.randn(12, 5)
    mask = torch.rand(24) < 0.5
    mask = mask[::2] if view == "every second entry" else torch.tensor(True).expand(12)
    wanted, size = exact_moment(x[mask])
    assert bool(((second_moment_(torch.zeros(5, 5, dtype=F64), x, mask).tril() - wanted).abs() <= 16 * U * size).all())


@built
def test_second_moment_carries_infinity_and_nan(forced):
    x = torch.ones(3, 26)
    x[1, 2], x[2, 25] = float("inf"), NAN
    total = second_moment_(torch.zeros(26, 26, dtype=F64), x).tril()
    assert total[2, 1] == float("inf")
    assert bool(total[25].isnan().all())
    assert total[24, 23] == 3


@built
def test_second_moment_into_a_part_of_a_larger_tensor_leaves_the_rest(forced):
    big = torch.full((60, 70), NAN, dtype=F64)
    inside = torch.zeros(60, 70, dtype=torch.bool)
    inside[::2, 20:50] = torch.ones(30, 30).tril().bool()
    big[inside] = 1
    x = torch.randn(9, 30)
    second_moment_(big[::2, 20:50], x)
    wanted, size = exact_moment(x)
    assert bool(((big[::2, 20:50] - 1 - wanted).tril().nan_to_num(0).abs() <= 13 * U * (1 + size)).all())
    assert bool(big[~inside].isnan().all())
    assert bool(big[inside].isfinite().all())


@built
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("d", [7, 500, 700])  # enough work for one, three and seven threads
def test_second_moment_is_the_same_to_the_bit_for_every_number_of_threads(d, dtype, forced, threads):
    x, mask = torch.randn(1300, d).to(dtype), torch.rand(1300) < 0.8
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(bits(second_moment_(blank(d), x, mask)))
    assert all(torch.equal(result, results[0]) for result in results)


# rank_update_


def assert_rank_update(got, before, left, right):
    """The nearest number of the weight's dtype to a sum that carries rank + 1 roundings in fp32."""
    wanted = before.double() + left.double() @ right.double()
    error = (left.shape[1] + 1) * U * (before.double().abs() + left.double().abs() @ right.double().abs())
    assert bool((got >= (wanted - error).to(got.dtype)).all())
    assert bool((got <= (wanted + error).to(got.dtype)).all())
    plain = reference.rank_update_ref_(before.clone(), left, right).double() - wanted
    assert float((got.double() - wanted).norm()) <= 2 * float(plain.norm())


@built
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("d", "width", "rank"),
    [(0, 4, 1), (3, 0, 1), (1, 1, 1), (5, 9, 1), (9, 5, 3), (33, 517, 7), (7, 4101, 1), (6, 40, 128)],
)
def test_rank_update_rounds_once(d, width, rank, dtype, instruction_set):
    before = torch.randn(d, width).to(dtype)
    # fp64 factors that are not contiguous are as good as any.
    left, right = torch.randn(rank, d, dtype=F64).T, torch.randn(rank, 2 * width)[:, ::2]
    weight = before.clone()
    assert rank_update_(weight, left, right) is weight
    assert_rank_update(weight, before, left, right)


@built
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("transposed", [False, True])
def test_rank_update_of_a_part_of_a_larger_tensor_leaves_the_rest(dtype, transposed, forced):
    big = torch.randn(30, 50).to(dtype)
    before = big.clone()
    weight = big[::3, 7:40]
    weight, unchanged = (weight.T, before[::3, 7:40].T) if transposed else (weight, before[::3, 7:40])
    left, right = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
    rank_update_(weight, left, right)
    assert_rank_update(weight, unchanged, left, right)
    assert not torch.equal(weight, unchanged)
    big[::3, 7:40] = before[::3, 7:40]
    assert torch.equal(bits(big), bits(before))


@built
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_rank_update_keeps_every_value_of_the_dtype(dtype, instruction_set):
    """Subnormal numbers and infinities too; NaN stays NaN."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    weight = every.clone()
    rank_update_(weight, torch.zeros(256, 1), torch.zeros(1, 256))
    assert torch.equal(weight.isnan(), every.isnan())
    assert bool((weight == every)[~every.isnan()].all())


@built
@pytest.mark.parametrize("rank", [1, 5])
def test_rank_update_is_the_same_to_the_bit_for_every_number_of_threads(rank, forced, threads):
    before = torch.randn(523, 4500).to(BF16)  # enough for eight threads
    left, right = torch.randn(523, rank), torch.randn(rank, 4500)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(bits(rank_update_(before.clone(), left, right)))
    assert all(torch.equal(result, results[0]) for result in results)


# What the kernels do not take


REFUSED = {
    "fp64 rows": (second_moment_, lambda: (torch.zeros(3, 3), torch.ones(2, 3, dtype=F64)), "fp64 rows"),
    "columns of x": (second_moment_, lambda: (torch.zeros(3, 3), torch.ones(3, 2).T), "not adjacent in memory"),
    "columns of total": (
        second_moment_,
        lambda: (torch.zeros(3, 6)[:, ::2], torch.ones(2, 3)),
        "not adjacent in memory",
    ),
    "fp32 weight": (rank_update_, lambda: (torch.zeros(2, 3), torch.ones(2, 1), torch.ones(1, 3)), "torch is faster"),
    "rank": (
        rank_update_,
        lambda: (torch.zeros(2, 3, dtype=BF16), torch.ones(2, 129), torch.ones(129, 3)),
        "a GEMM is as fast beyond rank 128",
    ),
    "strided weight": (
        rank_update_,
        lambda: (torch.zeros(4, 6, dtype=BF16)[::2, ::2], torch.ones(2, 1), torch.ones(1, 3)),
        "neither the rows nor the columns",
    ),
    "gradient": (
        rank_update_,
        lambda: (torch.zeros(2, 3, dtype=BF16), torch.ones(2, 1, requires_grad=True), torch.ones(1, 3)),
        "autograd has to record the call",
    ),
}


@built
@pytest.mark.parametrize(("op", "arguments", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_kernel_does_not_take_goes_to_the_reference(op, arguments, reason, monkeypatch):
    monkeypatch.setenv("ROME_FAST_KERNELS", "reference")
    wanted = op(*arguments()).detach().clone()
    assert bool(wanted.any())
    monkeypatch.delenv("ROME_FAST_KERNELS")
    assert torch.equal(op(*arguments()), wanted)
    monkeypatch.setenv("ROME_FAST_KERNELS", "native")
    given = arguments()
    with pytest.raises(RuntimeError, match=f"ROME_FAST_KERNELS=native: .*{reason}.*; unset ROME_FAST_KERNELS"):
        op(*given)
    assert not given[0].any()


@built
def test_aliasing_is_refused(forced):
    total, weight = torch.randn(4, 4), torch.randn(4, 4).to(BF16)
    storage = torch.randn(64)
    before = bits(total), bits(weight), bits(storage)
    with pytest.raises(ValueError, match="x shares memory with total; pass a copy"):
        second_moment_(total, total[:2])
    with pytest.raises(ValueError, match="total: got an expanded tensor"):
        second_moment_(torch.zeros(1, 3).expand(3, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="right shares memory with weight; pass a copy"):
        rank_update_(storage.view(BF16)[:12].view(3, 4), torch.ones(3, 1), storage[60:].view(1, 4))
    with pytest.raises(ValueError, match="weight: got an expanded tensor"):
        rank_update_(weight[:1].expand(3, 4), torch.ones(3, 1), torch.ones(1, 4))
    assert all(torch.equal(bits(now), then) for now, then in zip((total, weight, storage), before, strict=True))


@built
def test_autograd_notices_what_the_kernel_wrote(forced):
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, dtype=BF16)
    y = (x * weight).sum()
    rank_update_(weight, torch.ones(2, 1), torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        assert rank_update_(torch.zeros(1, 1, dtype=BF16), torch.ones(1, 1), torch.ones(1, 1)).item() == 1


# The choice


@built
def test_explain_says_what_the_kernels_take_and_use(monkeypatch):
    monkeypatch.delenv("ROME_FAST_KERNELS", raising=False)
    best = native.instruction_set()
    told = explain("cpu")
    assert told["rank_update_"] == (
        "native",
        f"bf16 and fp16 weights, up to rank 128, on a CPU with {best} instructions",
    )
    assert told["low_rank_apply_"] == ("reference", "there is no native kernel of this op")
    native.select("generic")
    try:
        assert explain("cpu")["second_moment_"][0] == "reference"
        assert "faster on a CPU without AVX2" in explain("cpu")["second_moment_"].why
    finally:
        native.select(best)
    if best != "generic":
        assert explain("cpu")["second_moment_"].backend == "native"
    assert explain("meta")["second_moment_"] == ("reference", "the tensors are on meta")


@built
def test_forcing_leaves_ops_without_a_kernel_on_the_reference(forced):
    assert explain("cpu")["rank_update_"] == ("native", "ROME_FAST_KERNELS=native")
    assert explain("cpu")["prefixed_solve"].backend == "reference"
    y = low_rank_apply_(torch.zeros(1, 2), torch.ones(1, 3), torch.ones(1, 2), torch.ones(1, 3), torch.tensor([0]))
    assert y.tolist() == [[3, 3]]
    with pytest.raises(RuntimeError, match="ROME_FAST_KERNELS=native: the tensors are on meta"):
        explain("meta")


@pytest.fixture
def absent(request, tmp_path, monkeypatch):
    """A machine without the library: none at all, a file that is none, or one of another version."""
    native._load.cache_clear()
    if request.param == "another version":
        monkeypatch.setattr(native, "VERSION", -1)
    else:
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "library.so")
    if request.param == "not a library":
        native.LIBRARY.write_bytes(b"nothing that could be loaded")
    yield
    native._load.cache_clear()


@pytest.mark.parametrize(
    ("absent", "reason"),
    [
        ("none", "not built; reinstall with cmake and a C\\+\\+17 compiler"),
        ("not a library", "cannot be loaded"),
        pytest.param("another version", "are of version 1, not -1; reinstall", marks=built),
    ],
    indirect=["absent"],
)
def test_without_the_library_the_reference_works_and_says_why(absent, reason, monkeypatch):
    monkeypatch.delenv("ROME_FAST_KERNELS", raising=False)
    assert explain("cpu")["second_moment_"].backend == "reference"
    total = second_moment_(torch.zeros(2, 2), torch.tensor([[1.0, 2.0]]))
    assert total.tolist() == [[1, 2], [2, 4]]
    monkeypatch.setenv("ROME_FAST_KERNELS", "native")
    with pytest.raises(RuntimeError, match=f"ROME_FAST_KERNELS=native: the native kernels .*{reason}"):
        second_moment_(total, torch.tensor([[1.0, 2.0]]))
    assert total.tolist() == [[1, 2], [2, 4]]


@built
def test_want_of_memory_is_an_error_and_leaves_the_target(forced, monkeypatch):
    class Full:
        rome_fast_second_moment = rome_fast_rank_update = staticmethod(lambda *_: 1)

    monkeypatch.setattr(native, "_library", Full)
    total, weight = torch.zeros(3, 3), torch.zeros(2, 2, dtype=BF16)
    with pytest.raises(MemoryError, match="no memory for 5 packed rows of 3 columns"):
        native.second_moment_native_(total, torch.ones(5, 3), None)
    with pytest.raises(MemoryError, match="no memory for strips of 1 rows"):
        native.rank_update_native_(weight, torch.ones(2, 1), torch.ones(1, 2))
    assert not total.any()
    assert not weight.any()


@built
def test_an_unknown_instruction_set_is_refused():
    best = native.instruction_set()
    with pytest.raises(ValueError, match="got 'mmx', wanted one of 'generic'"):
        native.select("mmx")
    assert native.instruction_set() == best
    assert ctypes.CDLL(str(native.LIBRARY)).rome_fast_native_version() == native.VERSION
