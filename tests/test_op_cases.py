"""What the GPU benchmark times of every op is checked before, by a check that notices what is wrong."""

import os

import pytest
import torch

import op_cases

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", range(13))
def test_every_case_is_right_and_notices_what_is_wrong(number):
    for index, case in enumerate(op_cases.cases(70, CPU, tokens=130, rows=64)):
        if index != number:
            continue
        assert all(case.check().values()), case.errors
        assert case.flops > 0
        assert case.moved_bytes > 0
        ours = case.runs[op_cases.OURS]
        for wrong in (1.01, float("nan")):
            case.runs[op_cases.OURS] = lambda wrong=wrong, ours=ours: ours() * wrong
            assert not case.check()[op_cases.OURS]
        return
    pytest.fail(f"there is no case {number}")


def test_our_kernel_is_timed_beside_the_library_that_is_faster(monkeypatch):
    """What the op does by itself, and forced; shown by what is in the environment meanwhile."""
    seen = []
    monkeypatch.delenv("ROME_FAST_KERNELS", raising=False)
    run = op_cases._forced(lambda: seen.append(os.environ.get("ROME_FAST_KERNELS")))
    run()
    assert seen == ["triton"]
    assert "ROME_FAST_KERNELS" not in os.environ
    for case in op_cases.cases(70, CPU, tokens=130, rows=64):
        assert op_cases.OWN_KERNEL not in case.runs
