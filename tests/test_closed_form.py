"""The closed form of edits whose keys cannot all be told apart, against eigenvectors of their Gram matrix."""

import math

import pytest
import torch

from helpers import relative_error, rounding
from rome_fast.methods import close

D, D_FF = 12, 40
# How near the search for the floor of singular values comes: 40 halvings of a factor of 1e6.
SEARCHED = math.log(1e6) / 2**40


def allowed(keys, left=None):
    """What is solved in fp64 is off by, relatively: the condition of a Gram matrix is that of both of its factors."""
    left = keys if left is None else left
    return rounding(torch.float64, D_FF, float(torch.linalg.cond(keys) * torch.linalg.cond(left)))


def keys_and_residuals(count, own, seed=0):
    """Keys (count, D_FF) that share most of a direction, and residuals (count, D), in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(D_FF, generator=generator, dtype=torch.float64)
    keys = shared + own * torch.randn(count, D_FF, generator=generator, dtype=torch.float64)
    return keys, torch.randn(count, D, generator=generator, dtype=torch.float64)


def independent_norm(keys, residuals):
    """‖Δ‖ of edits with nothing in common, C = I: of Δᵢ = r kᵀ / (k · k) each."""
    return float((residuals.norm(dim=1) / keys.norm(dim=1)).norm())


def dense(factors):
    return factors.left @ factors.right


def test_equality_while_the_update_is_not_larger_than_what_is_harmless():
    keys, residuals = keys_and_residuals(5, 0.05)
    exact = close(keys, keys, residuals)
    wanted = residuals.T @ torch.linalg.pinv(keys.T)
    assert exact.joint_norm > 2 * independent_norm(keys, residuals)
    assert relative_error(dense(exact), wanted) < allowed(keys)
    assert exact.joint_norm == pytest.approx(float(wanted.norm()), rel=allowed(keys))
    same = close(keys, keys, residuals, harmless=1.001 * exact.joint_norm)
    assert torch.equal(dense(same), dense(exact))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_larger_one_is_held_in_the_directions_that_tell_keys_apart(share):
    """One floor for the Gram matrix's eigenvalues, as low as the limit on ‖Δ‖ allows; equality above it."""
    keys, residuals = keys_and_residuals(6, 0.05)
    exact = close(keys, keys, residuals)
    most = max(share * exact.joint_norm, independent_norm(keys, residuals))
    held = close(keys, keys, residuals, harmless=share * exact.joint_norm)
    assert held.joint_norm == pytest.approx(most, rel=SEARCHED + allowed(keys))
    assert float(dense(held).norm()) == pytest.approx(most, rel=SEARCHED + allowed(keys))

    units = keys / keys.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(units @ units.T)
    # Δ = Xᵀ units, with V Xᵀ the coefficients along the eigenvectors, wanted / eigenvalue where nothing is held.
    wanted = vectors.T @ (residuals / keys.norm(dim=1, keepdim=True))
    found = vectors.T @ (held.left.T * keys.norm(dim=1, keepdim=True))
    divisors = (wanted * wanted).sum(1) / (wanted * found).sum(1)
    assert relative_error(found, wanted / divisors[:, None]) < allowed(keys)
    torch.testing.assert_close(divisors, values.clamp(min=float(divisors.min())), rtol=allowed(keys), atol=0)
    assert float(divisors.min()) > 1.01 * float(values.min())
    missed = (keys @ dense(held).T - residuals).norm(dim=1) / residuals.norm(dim=1)
    torch.testing.assert_close(held.missed, missed, rtol=0, atol=allowed(keys))


def test_one_key_twice_is_met_halfway_whatever_is_harmless():
    keys, residuals = keys_and_residuals(4, 1.0)
    keys[3], residuals[3] = keys[0], -2 * residuals[0]
    for harmless in (math.inf, 0.0):
        factors = close(keys, keys, residuals, harmless=harmless)
        added = keys @ dense(factors).T
        assert factors.condition > 1e6
        assert relative_error(added[0], -residuals[0] / 2) < allowed(keys[:3])
        assert relative_error(added[1:3], residuals[1:3]) < allowed(keys[:3])


def test_a_single_edit_is_never_held():
    keys, residuals = keys_and_residuals(1, 1.0)
    factors = close(keys, keys / 1000, residuals, harmless=0.0)
    assert torch.equal(dense(factors), dense(close(keys, keys / 1000, residuals)))
    assert relative_error(keys / 1000 @ dense(factors).T, residuals) < allowed(keys)


def test_keys_on_both_sides_may_differ():
    """As in the released ROME: the Gram matrix is not symmetric then."""
    keys, residuals = keys_and_residuals(6, 0.1)
    left = keys + 0.02 * keys_and_residuals(6, 1.0, seed=1)[0]
    exact = close(left, keys, residuals)
    assert relative_error(keys @ dense(exact).T, residuals) < allowed(keys, left)
    held = close(left, keys, residuals, harmless=0.5 * exact.joint_norm)
    independent = float(exact.update_norms.norm())
    assert held.joint_norm == pytest.approx(
        max(independent, 0.5 * exact.joint_norm), rel=SEARCHED + allowed(keys, left)
    )
    assert held.joint_norm < 0.95 * exact.joint_norm


@pytest.fixture
def large(monkeypatch):
    """Edits are taken for so many that singular values would take too long, and products for as large."""
    monkeypatch.setattr("rome_fast.methods.closed_form._SMALL", 0)
    monkeypatch.setattr("rome_fast.methods.closed_form._BLOCK", 3)
    monkeypatch.setattr("rome_fast.methods.closed_form._TOGETHER", 2)


@pytest.mark.parametrize(("columns", "own"), [(1, 0.5), (2, 0.5), (1, 0.02)])
def test_many_edits_are_closed_as_few_are(columns, own, request):
    keys, residuals = keys_and_residuals(10, own)
    left = keys + 0.1 * keys_and_residuals(10, own, seed=1)[0]
    arguments = {"columns": columns, "penalty": 0.1}
    few = close(left, keys, residuals, **arguments)
    request.getfixturevalue("large")
    many = close(left, keys, residuals, **arguments)
    bound = allowed(keys, left)
    assert relative_error(dense(many), dense(few)) < bound
    for name in ("update_norms", "missed", "denominators", "numerator_norms"):
        assert getattr(many, name) == pytest.approx(getattr(few, name), rel=bound, abs=bound)
    assert many.joint_norm == pytest.approx(few.joint_norm, rel=bound)
    assert float(dense(many).norm()) == pytest.approx(many.joint_norm, rel=bound)
    # Four vectors find both ends of ten singular values within 5 % in twelve steps, from within.
    assert 0.95 * few.condition < many.condition <= few.condition * (1 + bound)


@pytest.mark.usefixtures("large")
def test_dependent_keys_are_found_among_many_edits_as_well():
    keys, residuals = keys_and_residuals(9, 0.5)
    both = close(torch.cat([keys, keys[:1]]), torch.cat([keys, keys[:1]]), torch.cat([residuals, -residuals[:1]]))
    assert both.condition > 1e6
    alone = close(keys, keys, torch.cat([0 * residuals[:1], residuals[1:]]))
    assert relative_error(dense(both), dense(alone)) < allowed(keys)
    assert both.missed[0] == pytest.approx(1, rel=allowed(keys))
