"""A solve that did not converge says so, once."""

import warnings

import pytest
import torch
from helpers.contraction import ALL, Cell

from skipguide.vision import SkipDEQ
from skipguide.vision.skip_deq.network import ConvergenceWarning


@pytest.mark.parametrize("solver", ALL)
def test_non_convergence_is_reported_once_per_solve(solver):
    deq = SkipDEQ(lambda z, x: 3 * z.square() + 1 + x, solver=solver, budget=6)
    with pytest.warns(ConvergenceWarning, match="budget of 6") as caught, torch.no_grad():
        z, info = deq(torch.zeros(2, 3))
    assert len(caught) == 1
    assert not info.converged
    assert info.residual > deq.tol
    assert info.evaluations == 6
    assert torch.isfinite(z).all()


def test_a_long_training_warns_once():
    deq = SkipDEQ(lambda z, x: z + 1 + x, budget=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for value in (0.0, 0.5, 0.7):
            with torch.no_grad():
                deq(torch.full((1, 1), value))
    assert len(caught) == 1


def test_backward_non_convergence_is_reported():
    cell = Cell(gain=0.95)
    deq = SkipDEQ(cell, tol=1e-6, budget=300, backward_tol=1e-12, backward_budget=2, state_shape=(4,))
    z, info = deq(torch.randn(3, 3, dtype=torch.double))
    assert info.converged
    with pytest.warns(ConvergenceWarning, match="backward"):
        z.sum().backward()
    assert info.backward_converged is False
    assert info.backward_evaluations == 2
