"""pytest-benchmark suite of the five ops at small sizes, beside what they replace: `make bench`.

A provider whose result is wrong is not timed but fails. At these sizes the figures show the cost of a call, and whether
a change made it dearer; speed at the sizes of real models is what `make gpu` is for.
"""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from op_cases import Case, cases

SIZES = {"d_ff": 256, "tokens": 512, "rows": 64}
CPU = torch.device("cpu")


def all_cases() -> Iterator[Case]:
    return cases(SIZES["d_ff"], CPU, tokens=SIZES["tokens"], rows=SIZES["rows"])


NAMES = [
    (number, provider, f"{case.op} {case.variant} {str(case.dtype).removeprefix('torch.')}")
    for number, case in enumerate(all_cases())
    for provider in case.runs
]


@pytest.mark.parametrize(("number", "provider", "name"), NAMES, ids=[f"{name}: {p}" for _, p, name in NAMES])
def test_op(benchmark: BenchmarkFixture, number: int, provider: str, name: str) -> None:
    case = next(case for index, case in enumerate(all_cases()) if index == number)
    assert case.check()[provider], f"relative error {case.errors[provider]:.2e}"
    benchmark.group = name
    benchmark.extra_info.update(case.sizes, dtype=str(case.dtype), threads=torch.get_num_threads())
    benchmark.pedantic(case.runs[provider], rounds=30, iterations=1, warmup_rounds=2)
