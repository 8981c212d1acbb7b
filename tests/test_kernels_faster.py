"""Which sizes are left to the library on a GPU, and that what the library is given comes out as the op promises."""

import csv
from pathlib import Path

import pytest
import torch
from rome_fast.kernels import backends, configs, faster, library, operators

from helpers import relative_error
from test_kernels_reference import assert_second_moment, symmetric

GPU = torch.device("cuda")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of the architecture that was measured, as far as choosing goes."""
    monkeypatch.delenv("ROME_FAST_KERNELS", raising=False)
    monkeypatch.setattr(backends, "_triton_obstacle", lambda _device: None)
    monkeypatch.setattr(configs, "architecture", lambda _device: 90)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("op", ["second_moment_", "prefixed_solve", "low_rank_apply_"])
def test_a_size_takes_what_was_faster_at_the_nearest_one(op):
    # Between 1536 and 4096 the border is at √(1536 · 4096), 2508.3.
    chosen = {size: backends.choose(op, GPU, size=size).backend for size in (1, 576, 2508, 2509, 4096, 28672)}
    assert chosen == {1: "library", 576: "library", 2508: "library", 2509: "triton", 4096: "triton", 28672: "triton"}
    assert backends.choose(op, GPU, size=576).why == "as measured at a size like 576, on compute capability 9.0"
    # Not said to be something that the library could do.
    assert backends.choose(op, GPU).backend == "triton"


@pytest.mark.usefixtures("hopper")
def test_other_ops_and_architectures_and_whoever_forces_one_are_not_asked(monkeypatch):
    assert backends.choose("rank_update_", GPU, size=576).backend == "triton"
    for forced in ("triton", "reference"):
        monkeypatch.setenv("ROME_FAST_KERNELS", forced)
        assert backends.choose("second_moment_", GPU, size=576).backend == forced
    monkeypatch.delenv("ROME_FAST_KERNELS")
    assert backends.choose("second_moment_", torch.device("cpu"), size=576).backend != "library"
    assert backends.choose("second_moment_", GPU, size=576, no_triton="fp64").backend == "reference"
    for other in (80, 100, configs.OTHER):
        monkeypatch.setattr(configs, "architecture", lambda _device, other=other: other)
        assert backends.choose("second_moment_", GPU, size=576).backend == "triton"


def test_the_table_is_that_of_the_measurements(results):
    """Each entry against the row of its file, as far as it is written out."""
    ways = {
        "second_moment_": ("bfloat16", "fp32 total", "full GEMM, fp32 result, add"),
        "prefixed_solve": ("float32", "one edit, inverse", "mean, inverse @ k"),
        "low_rank_apply_": ("bfloat16", "64 edits", "gather, bmm"),
    }
    for op, sizes in faster.MEASURED[90].items():
        dtype, variant, provider = ways[op]
        for size, (ours, theirs) in sizes.items():
            of = {
                row["provider"]: float(row["ms"])
                for row in results
                if (row["op"], row["dtype"], row["variant"], row["d_ff"]) == (op, dtype, variant, str(size))
            }
            assert ours == pytest.approx(of["rome_fast"], rel=1e-3, abs=5e-5)
            assert theirs == pytest.approx(of[provider], rel=1e-3, abs=5e-5)


@pytest.fixture
def results():
    file = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_ops.csv"
    with file.open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    if {row["commit"] for row in rows} != {"a54236d"}:
        pytest.skip("the file is of another run")
    return rows


@pytest.fixture
def by_library(monkeypatch):
    """Every op that can be left to the library is, and nothing is of another size than its own."""
    asked = []

    def choose(op, _device, *, size=None, **_):
        asked.append(op)
        return backends.Choice("reference" if size is None else "library", "")

    monkeypatch.setattr(operators, "choose", choose)
    monkeypatch.setattr(library, "WIDE_RESULTS", True)
    return asked


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_second_moment(dtype, masked, monkeypatch):
    """In parts, the last of them smaller; what is masked is not read."""
    monkeypatch.setattr(configs, "CHAIN_TOKENS", 16)
    monkeypatch.setattr(operators.reference, "second_moment_ref_", None)
    x, mask = torch.randn(45, 12).to(dtype), torch.arange(45) % 3 > 0
    total, before = symmetric(12, torch.float32)
    rows = x.masked_fill(~mask.unsqueeze(1), torch.nan) if masked else x
    operators.second_moment_(total, rows, mask if masked else None)
    assert_second_moment(total.tril() + total.tril(-1).T, before, x, mask if masked else None)


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("with_factor", [False, True])
def test_prefixed_solve_of_one_edit(with_factor, monkeypatch):
    monkeypatch.setattr(operators.reference, "prefixed_solve_ref", None)
    keys, a = torch.randn(7, 20).to(torch.bfloat16), torch.randn(20, 60, dtype=torch.float64)
    matrix = a @ a.T / 60 + torch.eye(20)
    factor = torch.linalg.cholesky(matrix).float() if with_factor else None
    groups = torch.zeros(7, dtype=torch.int64)
    mean, solved, gram = operators.prefixed_solve(keys, groups, 1, factor, torch.linalg.inv(matrix).float())
    wanted = keys.double().mean(0)
    exact = torch.linalg.solve(matrix, wanted)
    # Sums of 7, of 20 and of 20 terms, of a matrix with a condition of ten or so.
    bound = 100 * 20 * torch.finfo(torch.float32).eps
    assert relative_error(mean[0], wanted) <= bound
    assert relative_error(solved[0], exact) <= bound
    assert float(gram) == pytest.approx(float(exact @ wanted), rel=bound)


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("dtype", HALVES)
def test_low_rank_apply(dtype, monkeypatch):
    """A row without an edit keeps what it has, read or not; one whose id is too large becomes NaN."""
    monkeypatch.setattr(operators.reference, "low_rank_apply_ref_", None)
    y, x, left, right = (torch.randn(s).to(dtype) for s in ((9, 6), (9, 11), (3, 6), (3, 11)))
    ids = torch.tensor([0, 2, -1, 1, 3, 2, -5, 0, 1])
    x[2] = y[6] = torch.nan
    got = y.clone()
    operators.low_rank_apply_(got, x, left, right, ids)
    edited = [0, 1, 3, 5, 7, 8]
    at = ids[edited]
    scale = (right[at].double() * x[edited].double()).sum(1, keepdim=True)
    exact = y[edited].double() + left[at].double() * scale
    # Rounded once; 11 products, 10 additions, one product and one addition in fp32, of which some may cancel.
    slack = torch.finfo(torch.float32).eps * 13 * (right[at].double().abs() * x[edited].double().abs()).sum(1)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + slack.unsqueeze(1) * (1 + left[at].double().abs())
    assert ((got[edited].double() - exact).abs() <= bound).all()
    assert torch.equal(got[2], y[2])
    assert got[[4, 6]].isnan().all()


@pytest.mark.usefixtures("by_library")
def test_what_the_library_has_no_way_for_is_not_given_to_it():
    """Rows in fp32, several edits, a factor alone, tensors of several dtypes, no edits at all."""
    x = torch.randn(4, 5)
    total = torch.zeros(5, 5)
    operators.second_moment_(total, x, None)
    assert relative_error(total, x.double().T @ x.double()) <= 1e-6
    keys, groups = torch.randn(4, 5), torch.tensor([0, 1, 0, 1])
    _, solved, _ = operators.prefixed_solve(keys, groups, 2, None, torch.eye(5))
    assert solved.shape == (2, 5)
    half = torch.bfloat16
    for left, right in ((torch.ones(1, 2), torch.ones(1, 5)), (torch.ones(0, 2).to(half), torch.ones(0, 5).to(half))):
        y = torch.zeros(4, 2).to(half)
        operators.low_rank_apply_(y, x.to(half), left, right, torch.full((4,), -1))
        assert not y.any()
