"""The Triton kernels in triton's interpreter, and the choice of a backend.

The interpreter has to be asked for before triton is imported, and would then hold for every test of the process; so
the kernels' own tests (interpreted_kernels.py) run in a process of theirs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import broken_interpreter
from rome_fast import kernels

pytest.importorskip("triton", reason="the kernels extra is not installed")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    lean = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **lean, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(broken_interpreter() is not None, reason=str(broken_interpreter()))
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_agree_with_float64_in_the_interpreter(which: str) -> None:
    here = Path(__file__).parent
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        f"--rootdir={here.parent}",
        str(here / "interpreted_kernels.py"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_nothing_heavy_is_imported_before_triton_is_chosen() -> None:
    code = """
import sys, torch
before = set(sys.modules)
from rome_fast import kernels
total = kernels.second_moment_(torch.zeros(2, 2), torch.eye(2))
assert total.tolist() == [[1, 0], [0, 1]], total
print(sorted(name for name in set(sys.modules) - before if name.startswith(("triton", "transformers"))))
"""
    done = run("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


def test_a_machine_without_triton_works() -> None:
    """`None` in sys.modules is Python's own way of saying that an import must fail."""
    code = """
import os, sys, torch
sys.modules["triton"] = None
from rome_fast import kernels
print(kernels.rank_update_(torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([[3.0, 4.0]])).tolist())
os.environ["ROME_FAST_KERNELS"] = "triton"
try:
    kernels.explain("cuda" if torch.cuda.is_available() else "cpu")
except RuntimeError as error:
    print(error)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[3.0, 4.0]]\nROME_FAST_KERNELS=triton: ")


def test_explain_names_a_backend_and_a_reason_for_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROME_FAST_KERNELS", raising=False)
    told = kernels.explain("cpu")
    ops = {name for name in kernels.__all__ if callable(getattr(kernels, name))} - {"Choice", "explain"}
    assert set(told) == ops
    assert told["prefixed_solve"] == ("reference", "there is no native kernel of this op")
    assert {backend for backend, _ in told.values()} <= {"reference", "native"}


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROME_FAST_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"the tensors are on cpu; .*TRITON_INTERPRET=1"):
        kernels.second_moment_(torch.zeros(2, 2), torch.eye(2))
    monkeypatch.setenv("ROME_FAST_KERNELS", "tritn")
    with pytest.raises(ValueError, match="got 'tritn', wanted one of reference, native, triton; correct"):
        kernels.second_moment_(torch.zeros(2, 2), torch.eye(2))
    monkeypatch.setenv("ROME_FAST_KERNELS", "reference")
    assert set(kernels.explain("cpu").values()) >= {("reference", "ROME_FAST_KERNELS=reference")}


def test_a_refused_argument_leaves_the_target_alone() -> None:
    total = torch.zeros(3, 3)
    with pytest.raises(TypeError, match=r"x: got dtype torch\.int64, wanted one of bfloat16"):
        kernels.second_moment_(total, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: got 2 columns, wanted 3"):
        kernels.second_moment_(total, torch.ones(2, 2))
    with pytest.raises(ValueError, match="x shares memory with total"):
        kernels.second_moment_(total, total[:2])
    with pytest.raises(ValueError, match="total: got an expanded tensor"):
        kernels.second_moment_(torch.zeros(1, 3).expand(3, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="right shares memory with weight"):
        kernels.rank_update_(total, torch.ones(3, 1), total[:1])
    with pytest.raises(ValueError, match="weight: got an expanded tensor"):
        kernels.rank_update_(torch.zeros(3, 1).expand(3, 3), torch.ones(3, 1), torch.ones(1, 3))
    with pytest.raises(ValueError, match="x shares memory with y"):
        kernels.low_rank_apply_(total, total, torch.ones(1, 3), torch.ones(1, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"inverse: got dtype torch\.float32, wanted torch\.float64 like factor"):
        kernels.prefixed_solve(
            torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), 1, torch.eye(3, dtype=torch.float64), torch.eye(3)
        )
    assert not total.any()


def test_an_inverse_with_the_factor_refines_and_the_residual_says_so() -> None:
    """C is ill-conditioned (1e5) and the inverse perturbed by 1 %: one step must square that, to about 1e-4."""
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    c = q @ torch.diag(torch.logspace(0, -5, 12, dtype=torch.float64)) @ q.T
    factor = torch.linalg.cholesky(c)
    inverse = 1.01 * torch.linalg.inv(c)
    keys = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 1, 1, 0, 2, 1, 0])
    mean, exact, exact_gram = kernels.prefixed_solve(keys, groups, 3, factor)
    _, rough, _ = kernels.prefixed_solve(keys, groups, 3, None, inverse)
    _, fine, gram = kernels.prefixed_solve(keys, groups, 3, factor, inverse)
    # n u κ of fp64, 1e-10, beside 1e-2 and its square; G errs as its factor does.
    for solved, wanted in ((exact, 0.0), (rough, 1e-2), (fine, 1e-4)):
        residual = kernels.solve_residual(mean, solved, factor)
        assert (residual - wanted).abs().max() < 12 * 2**-53 * 1e5
    assert torch.linalg.norm(gram - exact_gram) < 1.01e-4 * torch.linalg.norm(exact_gram)
