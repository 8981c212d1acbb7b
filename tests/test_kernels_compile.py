"""Every kernel, in every configuration that ships, compiled for the GPUs it ships for; no GPU needed.

`pytest -s` prints the table. What this cannot show is numbers and speed; the interpreter shows the numbers.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels extra is not installed")

from rome_fast.kernels import configs, layer, low_rank_apply, rank_update, second_moment, solve, steps, suffix
from rome_fast.kernels.reference import SuffixCall

from crosscompile import SHARED_LIMIT, Compiled, compiling_for

# The last two stand for all GPUs without a table of their own.
MATRIX_INSTRUCTION = {
    80: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    89: "mma.sync",
    120: "mma.sync",
}
SIZE = 48
"""Of the operands, which only have to be multiples of 16: sizes are run-time arguments of the kernels."""


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[Callable[[int, str, Compiled], None]]:
    lines = [f"{'GPU':7}{'kernel':36}{'variant':24}{'matrix instruction':20}{'registers':>9}{'spills':>7}{'shared':>9}"]

    def add(capability: int, variant: str, found: Compiled) -> None:
        instruction = ", ".join(found.instructions) or "-"
        lines.append(
            f"sm_{capability:<4}{found.name:36}{variant:24}{instruction:20}"
            f"{found.registers:9}{found.spills:7}{found.shared:9}"
        )

    yield add
    print("\n" + "\n".join(lines))


def check(found: Compiled, capability: int) -> None:
    assert found.spills == 0, f"{found.name} for sm_{capability} spills registers ({found.spills} instructions)"
    assert found.shared <= SHARED_LIMIT[capability], found


ROWS = {
    "bf16": (torch.bfloat16, 6),
    "fp16": (torch.float16, 6),
    "fp32-3": (torch.float32, 3),
    "fp32-6": (torch.float32, 6),
}
# bf16 and fp16 share a configuration, and so do the two parts that have no table of their own.
CASES = [(capability, rows) for capability in (80, 90, 100, 89) for rows in ("bf16", "fp32-3", "fp32-6")]
CASES += [(90, "fp16"), (120, "bf16")]


@pytest.mark.parametrize(("capability", "rows"), CASES)
def test_second_moment_uses_the_matrix_unit(
    capability: int, rows: str, table: Callable[..., None], tmp_path: Path
) -> None:
    dtype, products = ROWS[rows]
    key = capability if capability in configs.SECOND_MOMENT else configs.OTHER
    x = torch.zeros(SIZE, SIZE, dtype=dtype)
    total = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    with compiling_for(capability, second_moment, tmp_path) as found:
        second_moment.second_moment_triton_(total, x, None, products=products, architecture=key)
    split = dtype == torch.float32
    names = ["_prepare_kernel"] * split + ["_second_moment_kernel", "_add_kernel"]
    assert [kernel.name for kernel in found] == names
    for kernel in found:
        table(capability, f"{str(dtype).removeprefix('torch.')}, {products if split else 1} product(s)", kernel)
        check(kernel, capability)
        wanted = (MATRIX_INSTRUCTION[capability],) if kernel.name == "_second_moment_kernel" else ()
        assert kernel.instructions == wanted
        if wanted:
            # Loads must run ahead of the products: bulk tensor copies with descriptors, else asynchronous ones.
            tile = configs.SECOND_MOMENT[key]
            copy = "cp.async.bulk.tensor" if tile.descriptors else "cp.async.cg.shared.global"
            assert copy in kernel.ptx


def test_second_moment_with_a_mask_and_an_fp32_total(table: Callable[..., None], tmp_path: Path) -> None:
    x = torch.zeros(SIZE, SIZE + 1, dtype=torch.bfloat16)
    total = torch.zeros(SIZE + 1, SIZE + 1)
    with compiling_for(90, second_moment, tmp_path) as found:
        second_moment.second_moment_triton_(total, x, torch.ones(SIZE, dtype=torch.bool), architecture=90)
    assert [kernel.name for kernel in found] == ["_prepare_kernel", "_second_moment_kernel", "_add_kernel"]
    for kernel in found:
        table(90, "bf16, mask, odd", kernel)
        check(kernel, 90)


def run_rank_update(dtype: torch.dtype) -> None:
    for rank in (1, 40):
        weight = torch.zeros(SIZE, SIZE, dtype=dtype)
        rank_update.rank_update_triton_(weight, torch.zeros(SIZE, rank), torch.zeros(rank, SIZE))


def run_low_rank_apply(dtype: torch.dtype) -> None:
    factor = torch.zeros(3, SIZE)
    y, x = torch.zeros(SIZE, SIZE, dtype=dtype), torch.zeros(SIZE, SIZE, dtype=dtype)
    low_rank_apply.low_rank_apply_triton_(y, x, factor, factor, torch.zeros(SIZE, dtype=torch.int64))


def run_solve(dtype: torch.dtype) -> None:
    keys = torch.zeros(SIZE, SIZE, dtype=dtype)
    groups = torch.zeros(SIZE, dtype=torch.int64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    solve.group_mean_triton(keys, groups, 2, wide)
    solve.prefixed_solve_triton(keys, groups, 1, None, torch.eye(SIZE, dtype=wide))


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32), (90, torch.float64), (100, torch.bfloat16)],
    ids=["80-bf16", "90-bf16", "90-fp32", "90-fp64", "100-bf16"],
)
@pytest.mark.parametrize(
    ("module", "run", "kernels"),
    [
        (rank_update, run_rank_update, ["_rank_update_kernel"] * 2),
        (low_rank_apply, run_low_rank_apply, ["_inner_product_kernel", "_low_rank_apply_kernel"]),
        (solve, run_solve, ["_mean_kernel", "_inverse_kernel"]),
    ],
    ids=["rank_update", "low_rank_apply", "solve"],
)
def test_the_other_ops_do_not_spill(
    capability: int,
    module: object,
    run: Callable[[torch.dtype], None],
    kernels: list[str],
    dtype: torch.dtype,
    table: Callable[..., None],
    tmp_path: Path,
) -> None:
    with compiling_for(capability, module, tmp_path) as found:
        run(dtype)
    assert [kernel.name for kernel in found] == kernels
    for kernel in found:
        table(capability, str(dtype).removeprefix("torch."), kernel)
        check(kernel, capability)
        # Approximate division would make the mean less accurate than torch's.
        assert not re.search(r"div\.(full|approx)", kernel.ptx)


# Head size and heads of a group; the largest heads there are a kernel for. In fp32 there is no matrix instruction.
SUFFIXES = {
    "64, group of 8": (64, 8, torch.bfloat16),
    "128": (128, 1, torch.bfloat16),
    "256, group of 2": (256, 2, torch.bfloat16),
    "128, fp32": (128, 4, torch.float32),
}


@pytest.mark.parametrize(
    ("capability", "name"),
    [(80, "128"), *((90, name) for name in SUFFIXES), (100, "256, group of 2")],
)
def test_suffix_attention_uses_the_matrix_unit(
    capability: int, name: str, table: Callable[..., None], tmp_path: Path
) -> None:
    head_size, group, dtype = SUFFIXES[name]

    def states(heads: int, time: int) -> torch.Tensor:
        return torch.zeros(2, heads, time, head_size, dtype=dtype)

    some = torch.zeros(2, dtype=torch.int64)
    query, one = states(2 * group, 5), states(2, 5)
    # All that can be asked for, which takes the most registers.
    call = SuffixCall(query, one, one, one, one, some, some, one, one, some, 0.1, 50.0, 4, torch.zeros(2 * group))
    with compiling_for(capability, suffix, tmp_path) as found:
        output, total = suffix.suffix_attention_triton(call)
        suffix.suffix_attention_backward_triton(query, output, total, call)
    assert [kernel.name for kernel in found] == ["_suffix_attention_kernel", "_suffix_attention_backward_kernel"]
    for kernel in found:
        table(capability, name, kernel)
        check(kernel, capability)
        # With sixteen queries or thirty-two, the instruction of a single warp on every GPU.
        assert kernel.instructions == (("mma.sync",) if dtype == torch.bfloat16 else ())


def run_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(2, size, dtype=dtype), torch.zeros(size, dtype=dtype)
    layer.add_rms_norm_triton(x, x, weight, 1e-6)
    layer.add_rms_norm_backward_triton(x, x, x, weight, 1e-6)


def run_rotation(size: int, dtype: torch.dtype) -> None:
    query, key = torch.zeros(2, 3, 32, size, dtype=dtype), torch.zeros(2, 3, 8, size, dtype=dtype)
    angles, weight = torch.zeros(2, 3, size, dtype=dtype), torch.zeros(size, dtype=dtype)
    layer.rotate_heads_triton(query, key, angles, angles, weight, weight, 1e-6)
    layer.rotate_heads_backward_triton(query, key, None, None, angles, angles, None, None, 0.0)
    layer.rotate_heads_backward_triton(query, key, query, key, angles, angles, weight, weight, 1e-6)


def run_activation(activation: str, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 96, dtype=dtype)
    layer.gated_activation_triton(x, x, activation)
    layer.gated_activation_backward_triton(x, x, x, activation)


# The hidden sizes of SmolLM2 and Llama 2, and the widest; heads of two sizes; every activation, some in fp32.
LAYER_OPS = {
    **{f"norm of {size}": (run_norm, size, torch.bfloat16) for size in (576, 4096, configs.NORM_WIDTH)},
    "norm of 4096, fp32": (run_norm, 4096, torch.float32),
    **{f"heads of {size}": (run_rotation, size, torch.bfloat16) for size in (64, 128)},
    "heads of 256, fp32": (run_rotation, 256, torch.float32),
    **{name: (run_activation, name, torch.bfloat16) for name in ("silu", "gelu", "gelu_tanh", "relu")},
    "silu, fp32": (run_activation, "silu", torch.float32),
}


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *((90, name) for name in LAYER_OPS),
        *((capability, name) for capability in (80, 100) for name in ("norm of 4096", "heads of 128", "silu")),
    ],
)
def test_layer_ops_do_not_spill(capability: int, name: str, table: Callable[..., None], tmp_path: Path) -> None:
    run, argument, dtype = LAYER_OPS[name]
    with compiling_for(capability, layer, tmp_path) as found:
        run(argument, dtype)
    assert len(found) == 2 + (run is run_rotation)
    for kernel in found:
        table(capability, name, kernel)
        check(kernel, capability)


@pytest.mark.parametrize(
    ("capability", "d"), [(80, 4096), (90, 576), (90, 4096), (90, configs.NORM_WIDTH), (100, 4096)]
)
def test_ops_of_a_step_do_not_spill(capability: int, d: int, table: Callable[..., None], tmp_path: Path) -> None:
    state, number, flag = torch.zeros(3, d), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    count, one = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3)
    with compiling_for(capability, steps, tmp_path) as found:
        for wanted in (False, True):
            steps.target_losses_triton_(state[:1], flag[:1], state, number[:2], one[:2], 0.1, 1.0, wanted)
        for stop_loss in (None, 0.05):
            counters = one, count, torch.zeros(3, 9), one, number, number, flag, flag
            steps.stop_rule_triton_(flag, *counters, state, number, one, one, stop_loss, 9, 4, 6)
        steps.clamped_adam_triton_(state, state, state, count, flag, flag, one, one, number, state, 0.5, 4.0, 1e-20)
    names = ["_target_losses_kernel"] * 2 + ["_stop_rule_kernel"] * 2 + ["_clamped_adam_kernel"]
    assert [kernel.name for kernel in found] == names
    for kernel in found:
        table(capability, d, kernel)
        check(kernel, capability)
    # What is compared or computed in fp64 has constants of that.
    for kernel, number in ((found[3], 0.05), (found[4], math.log(0.9)), (found[4], math.log(0.999))):
        assert f"{struct.unpack('>Q', struct.pack('>d', number))[0]:016X}" in kernel.ptx.upper()
