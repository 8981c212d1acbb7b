"""Every op on a GPU: the tests of the reference, run there, and what only larger sizes and a GPU show.

`make gpu` runs them and writes a row for each; without a GPU all of them are skipped as one.
"""

import pytest
import torch
from rome_fast.kernels import (
    add_rms_norm,
    configs,
    explain,
    faster,
    gated_activation,
    low_rank_apply_,
    mirror_lower_,
    operators,
    prefixed_solve,
    rank_update_,
    reference,
    rotate_heads,
    second_moment_,
    suffix_attention,
)

from helpers import bits, relative_error
from op_cases import matrix_unit_error, suffix_attention_case

# Collected here a second time, hence imported and not used: these make their tensors on the default device, which is
# the GPU here.
from test_kernels_reference import (  # noqa: F401
    test_low_rank_apply,
    test_low_rank_apply_does_not_read_rows_without_an_edit,
    test_low_rank_apply_with_factors_of_another_dtype_and_views,
    test_low_rank_apply_without_any_edit_changes_nothing,
    test_mirror_lower_takes_the_lower_triangle,
    test_prefixed_solve,
    test_prefixed_solve_in_float64_is_exact_to_its_last_digits,
    test_prefixed_solve_leaves_its_arguments,
    test_prefixed_solve_of_strided_keys_and_factor,
    test_prefixed_solve_with_the_identity,
    test_rank_update,
    test_rank_update_of_a_strided_view_leaves_the_rest,
    test_rank_update_of_a_transposed_weight,
    test_rank_update_refuses_factors_that_share_the_weights_memory,
    test_rank_update_rounds_once,
    test_second_moment,
    test_second_moment_into_a_part_of_a_larger_tensor_leaves_the_rest,
    test_second_moment_of_a_mask_that_keeps_nothing_changes_nothing,
    test_second_moment_of_a_strided_view,
    test_second_moment_reads_nothing_of_masked_rows,
    test_second_moment_refuses_rows_that_share_the_totals_memory,
    test_second_moment_sums_many_calls_in_the_dtype_of_total,
)
from test_layer_ops import assert_as_right_as as assert_layer_op_as_right_as
from test_layer_ops import (  # noqa: F401
    norm_case,
    rotation_case,
    test_a_gradient_of_one_of_two_results,
    test_layer_op,
    test_layer_op_has_the_gradient_of_its_differences,
    test_layer_op_of_any_layout,
    test_layer_ops_of_nothing,
    test_what_is_no_number_stays_one,
)
from test_layer_ops import with_gradients as layer_op_with_gradients
from test_step_ops import Edits, check_faults, check_losses, judged_by, moved_by
from test_suffix_attention import (
    arguments,
    assert_as_right_as,
    call,
    test_a_row_that_is_no_number_spoils_no_other,  # noqa: F401
    test_a_row_with_a_number_out_of_range_is_nan,  # noqa: F401
    test_a_window_of_one_shows_a_query_its_own_position,  # noqa: F401
    test_suffix_attention,  # noqa: F401
    test_suffix_attention_has_the_gradient_of_its_differences,  # noqa: F401
    test_suffix_attention_in_every_dtype,  # noqa: F401
    test_suffix_attention_of_any_layout,  # noqa: F401
    test_suffix_attention_of_nothing,  # noqa: F401
    test_two_runs_are_equal_to_the_bit,  # noqa: F401
    with_gradients,
)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    """Tensors are made on the GPU; freed memory there is full of NaN, so that what nobody wrote cannot pass."""
    monkeypatch.delenv("ROME_FAST_KERNELS", raising=False)
    monkeypatch.setattr(faster, "MEASURED", {})  # our kernels, at any size
    with torch.device("cuda"):
        torch.manual_seed(0)
        freed = [torch.full((size,), NAN) for size in (1 << 26, 1 << 18, 1 << 18)]
        del freed
        yield
    torch.cuda.synchronize()


def test_the_ops_run_on_triton():
    """Else the rest of this file would test torch."""
    pytest.importorskip("triton", reason="the kernels extra is not installed")
    told = explain("cuda")
    assert {told[op].backend for op in ("second_moment_", "rank_update_", "low_rank_apply_")} == {"triton"}
    assert {told[op].backend for op in ("prefixed_solve", "suffix_attention")} == {"triton"}
    assert {told[op].backend for op in ("add_rms_norm", "rotate_heads", "gated_activation")} == {"triton"}


def as_right_as(got, plain, exact, floor=0.0):
    """The error of `got` may be twice that of plain torch."""
    limit = 2 * relative_error(plain, exact) + floor
    error = relative_error(got, exact)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


@pytest.fixture
def library(monkeypatch):
    """The library does what it can do, at any size."""
    names = ("second_moment_", "prefixed_solve", "low_rank_apply_")
    always = {name: {1: faster.Milliseconds(ours=1.0, library=0.5)} for name in names}
    monkeypatch.setattr(faster, "MEASURED", {configs.architecture(torch.device("cuda")): always})


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", HALVES)
def test_the_library_in_the_place_of_the_kernels(dtype):
    x, mask = torch.randn(20_001, 576).to(dtype), torch.rand(20_001) > 0.3
    total = torch.zeros(576, 576)
    second_moment_(total, x.masked_fill(~mask.unsqueeze(1), NAN), mask)
    kept = x[mask]
    exact = kept.double().T @ kept.double()
    as_right_as(total, kept.float().T @ kept.float(), exact, matrix_unit_error(20_001))

    keys, a = torch.randn(21, 576), torch.randn(576, 3 * 576)
    inverse = torch.linalg.inv((a @ a.T).double() / 1728 + torch.eye(576))
    _, solved, _ = prefixed_solve(keys, torch.zeros(21, dtype=torch.int64), 1, None, inverse.float())
    exact = keys.double().mean(0) @ inverse.float().double()
    as_right_as(solved[0], keys.mean(0) @ inverse.float(), exact, torch.finfo(torch.float32).eps)

    y, x, left, right = (torch.randn(*s).to(dtype) for s in ((300, 64), (300, 96), (5, 64), (5, 96)))
    ids = torch.arange(300) % 7 - 1
    got = y.clone()
    low_rank_apply_(got, x, left, right, ids)
    at = ids.clamp(0, 4)

    def formula(wide):
        scale = (right[at].to(wide) * x.to(wide)).sum(1, keepdim=True)
        return y.to(wide) + left[at].to(wide) * scale

    real = (ids >= 0) & (ids < 5)
    as_right_as(got[real], formula(torch.float32).to(dtype)[real], formula(torch.float64)[real])
    assert torch.equal(got[ids < 0], y[ids < 0])
    assert got[ids == 5].isnan().all()


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("layout", ["plain", "sliced"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(("n", "d"), [(3000, 1536), (20_001, 1111), (513, 3072)])
def test_second_moment_of_many_tokens(n, d, dtype, layout, masked):
    wide = torch.full((n, d + 24), NAN).to(dtype)
    x = wide[:, 8 : 8 + d] if layout == "sliced" else torch.empty(n, d, dtype=dtype)
    x.copy_(torch.randn(n, d))
    mask = torch.rand(n) < 0.7 if masked else None
    kept = x if mask is None else x[mask]
    if mask is not None:
        x[~mask] = NAN
    exact = kept.double().T @ kept.double()
    total = second_moment_(torch.zeros(d, d, dtype=torch.float64), x, mask)
    again = second_moment_(torch.zeros(d, d, dtype=torch.float64), x, mask)
    assert torch.equal(total.tril(), again.tril()), "two runs differ"
    as_right_as(mirror_lower_(total), kept.float().T @ kept.float(), exact, matrix_unit_error(n))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("d", "d_ff", "rank"), [(4096, 1111, 1), (576, 1536, 16), (1001, 3000, 5)])
def test_rank_update_of_large_weights(d, d_ff, rank, dtype):
    before = torch.randn(d, d_ff).to(dtype)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = torch.randn(d, rank, dtype=factor), torch.randn(rank, d_ff, dtype=factor)
    exact = before.double() + left.double() @ right.double()
    wide = torch.promote_types(dtype, torch.float32)
    plain = (before.to(wide) + left @ right).to(dtype)
    # In float64 the oracle is one more result of the same dtype.
    floor = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else 0.0
    as_right_as(rank_update_(before.clone(), left, right), plain, exact, floor)
    transposed = before.T.contiguous().T
    as_right_as(rank_update_(transposed, left, right), plain, exact, floor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "m", "d", "d_ff"), [(1, 1, 4096, 11008), (700, 9, 577, 3001), (4000, 64, 576, 1536)])
def test_low_rank_apply_to_many_rows(n, m, d, d_ff, dtype):
    before, x = torch.randn(n, d).to(dtype), torch.randn(n, d_ff).to(dtype)
    left, right = torch.randn(m, d).to(dtype), (torch.randn(m, d_ff) / d_ff**0.5).to(dtype)
    ids = torch.randint(-1, m, (n,))
    ids[0] = m - 1
    at, known = ids.clamp(min=0), (ids >= 0).unsqueeze(1)
    scale = (right[at].double() * x.double()).sum(1, keepdim=True)
    exact = torch.where(known, before.double() + left[at].double() * scale, before.double())
    wide = torch.promote_types(dtype, torch.float32)
    scale = (right[at].to(wide) * x.to(wide)).sum(1, keepdim=True)
    plain = torch.where(known, before.to(wide) + left[at].to(wide) * scale, before.to(wide)).to(dtype)
    got = low_rank_apply_(before.clone(), x, left, right, ids)
    assert torch.equal(bits(got[ids < 0]), bits(before[ids < 0]))
    floor = 64 * torch.finfo(dtype).eps if dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    as_right_as(got, plain, exact, floor)


@pytest.mark.parametrize("edits", [1, 5])
@pytest.mark.parametrize("matrix", ["factor", "inverse", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefixed_solve_of_long_keys(dtype, matrix, edits):
    d, n = 1537, 21 * edits
    root = torch.randn(d, 3 * d, dtype=torch.float64)
    exact_factor = torch.linalg.cholesky(root @ root.T / (3 * d))
    factor = exact_factor.to(dtype) if matrix != "inverse" else None
    inverse = torch.cholesky_inverse(exact_factor).to(dtype) if matrix != "factor" else None
    keys = torch.randn(n, d)
    groups = torch.arange(n) % edits
    mean = torch.stack([keys.double()[groups == g].mean(0) for g in range(edits)])
    exact = torch.cholesky_solve(mean.T, exact_factor).T
    solved_plain = (
        mean.to(dtype) @ inverse
        if inverse is not None
        else torch.cholesky_solve(mean.to(dtype).T, exact_factor.to(dtype)).T
    )
    got_mean, solved, gram = prefixed_solve(keys, groups, edits, factor, inverse)
    eps = torch.finfo(dtype).eps
    # No more than n additions and a division.
    assert relative_error(got_mean, mean) <= n * eps
    # The condition is about 14, which the rounding of the matrix itself is multiplied by.
    as_right_as(solved, solved_plain, exact, 16 * eps)
    as_right_as(gram, solved_plain @ mean.to(dtype).T, exact @ mean.T, 16 * eps)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size"), [(9, 3, 64), (32, 32, 128), (8, 4, 256), (8, 1, 256), (71, 1, 64), (12, 12, 80)]
)
def test_suffix_attention_of_the_heads_of_models(heads, kv_heads, head_size, dtype):
    """SmolLM2, Llama 2, Gemma 2, Gemma, Falcon and Phi-2; with all that scores can be asked for."""
    a = arguments(
        (3, heads, kv_heads, 5, head_size, 2, 19, 11), dtype, {"soft_cap": 20.0, "window": 25, "slopes": True}
    )
    outer = torch.randn_like(a["query"])
    assert_as_right_as(with_gradients(call, a, outer), a, outer, dtype)


@pytest.mark.parametrize("d", [576, 4096])
def test_suffix_attention_of_a_batch_of_edits(d):
    case = suffix_attention_case(16, d, 2 * d, torch.bfloat16, torch.device("cuda"))
    assert all(case.check().values()), case.errors


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        *(lambda dtype, d=d: norm_case((50, 7), d, True, dtype) for d in (576, 4096, 5120, 8192, 16384)),
        lambda dtype: rotation_case((50, 7, 32, 8, 128, 128), True, dtype),
        lambda dtype: rotation_case((50, 7, 9, 3, 64, 64), False, dtype),
    ],
)
def test_layer_ops_of_the_sizes_of_models(case, dtype):
    run, formula, leaves, others = case(dtype)
    got = layer_op_with_gradients(run, leaves, others)
    assert_layer_op_as_right_as(got, formula, leaves, others)


def test_an_op_does_not_wait_for_the_gpu():
    """A check that reads an index tensor would; torch says so in this mode."""
    y, x = torch.zeros(4, 3), torch.ones(4, 5)
    keys, groups, ids = torch.ones(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([0, -1, 1, 1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        low_rank_apply_(y, x, torch.ones(2, 3), torch.ones(2, 5), ids)
        prefixed_solve(keys, groups, 2, None)
        second_moment_(torch.zeros(3, 3), keys, ids >= 0)
        rank_update_(y, torch.ones(4, 1), torch.ones(1, 3))
        states = torch.ones(4, 1, 1, 3, requires_grad=True)
        past = torch.ones(2, 1, 5, 3)
        suffix_attention(states, states, states, past, past, groups, groups, scale=1.0).sum().backward()
        _, normed = add_rms_norm(states, states, keys[0], 1e-6)
        turned, _ = rotate_heads(states, states, states.detach()[:, :, 0, :2], states.detach()[:, :, 0, :2])
        gated_activation(normed, turned, "silu").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_id_out_of_range_spoils_its_row_and_no_other():
    y, x = torch.zeros(4, 3), torch.ones(4, 5)
    low_rank_apply_(y, x, torch.ones(2, 3), torch.ones(2, 5), torch.tensor([0, 2, -1, 1 << 40]))
    assert y[[0, 2]].tolist() == [[5.0] * 3, [0.0] * 3]
    assert bool(y[[1, 3]].isnan().all())
    mean, _, _ = prefixed_solve(torch.ones(3, 3), torch.tensor([0, 7, -1]), 2, None)
    assert mean[0].tolist() == [1.0] * 3
    assert bool(mean[1].isnan().all())


@pytest.mark.parametrize("sizes", [(40, 8, 32_000), (3, 1, 128_256), (0, 1, 5), (2, 0, 49_153)])
def test_target_losses_of_vocabularies(sizes):
    check_losses(sizes, torch.float32)


def test_a_row_of_logits_that_is_no_number_spoils_itself_alone():
    check_faults()


def step_by_step(run, edits, *others):
    """What an op of a step makes of the same state as its reference, in the same dtype."""
    state = Edits(300, 4096)
    state.judged = torch.arange(300) % 5 < 4 if run is moved_by else state.judged
    state.done[299] = state.judged[299] = True  # of free slots
    op = operators.stop_rule_ if run is judged_by else operators.clamped_adam_
    plain = reference.stop_rule_ref_ if run is judged_by else reference.clamped_adam_ref_
    return (*run(op, state, edits, *others), *run(plain, state, edits, *others))


@pytest.mark.parametrize("stop_loss", [None, 0.6])
def test_the_stop_rule_of_many_edits(stop_loss):
    edits = torch.cat([torch.randperm(299)[:200], torch.tensor([299, 299])])
    got, ended, wanted, over = step_by_step(judged_by, edits, stop_loss)
    assert torch.equal(ended, over)
    got.losses[:, -1] = wanted.losses[:, -1]  # where the reference puts what has no place
    for name, one in vars(got).items():
        # A norm of 4096 numbers, summed in another order: as random errors 64 roundings, of which the root halves each.
        torch.testing.assert_close(one, getattr(wanted, name), rtol=40 * 2**-23, atol=0, equal_nan=True)


def test_clamped_adam_of_many_edits():
    edits = torch.cat([torch.randperm(299)[:200], torch.tensor([299, 299])])
    got, _, wanted, _ = step_by_step(moved_by, edits)
    for name, one in vars(got).items():
        # Ten operations on each number and the norm of all; of what is taken from another one, a few times as large.
        torch.testing.assert_close(one, getattr(wanted, name), rtol=60 * 2**-23, atol=60 * 2**-23, equal_nan=True)
