"""Every search ends within its budget with its best point; wrong settings and cells are refused."""

import math

import pytest
import torch
from helpers.contraction import ALL

from skipguide.errors import SkipError
from skipguide.vision.fixed_point import fixed_point


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 30])
@pytest.mark.parametrize(
    "cell",
    [
        lambda z: 3 * z.square() + 1,  # no real equilibrium
        lambda z: 2 * z + 1e3 * torch.sin(40 * z) + 1,
        lambda z: torch.where(z.abs() > 5, torch.nan, z.square() + z + 1),
        lambda z: z + 1,
        lambda z: torch.exp(4 * z) + 1,
    ],
    ids=["square", "wild", "nan", "drift", "overflow"],
)
def test_every_search_ends_with_its_best_point(solver, budget, cell):
    count = 0
    seen = []

    def counted(z):
        nonlocal count
        count += 1
        value = cell(z)
        seen.append((value - z).square().mean(1).sqrt())
        return value

    found = fixed_point(counted, torch.zeros(2, 3), solver, 1e-6, budget)
    assert found.evaluations == count <= budget
    assert torch.isfinite(found.z).all()
    assert not found.converged
    sizes = torch.stack(seen).nan_to_num(nan=math.inf)
    if sizes[-1, 0] > sizes.min(0).values[0]:  # it got worse again: the best point itself is returned
        again = (cell(found.z) - found.z).square().mean(1).sqrt()
        torch.testing.assert_close(again, sizes.min(0).values)


def test_divergence_returns_the_start_and_not_the_huge_last_point():
    found = fixed_point(lambda z: 2 * z + 1, torch.zeros(1, 2), "picard", 1e-3, 20)
    assert not found.converged
    assert not found.z.any()


def test_one_evaluation_is_one_correction():
    found = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 2), "picard", 1e-6, 1)
    assert found.z.tolist() == [[1.0, 1.0]]
    assert fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 2), "picard", 1e-6, 2).z.tolist() == [[1.5, 1.5]]


def test_bad_settings_and_cells():
    start = torch.zeros(1, 2)
    for arguments, message in (
        ({"solver": "newton"}, "expected a solver"),
        ({"tol": 0.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"budget": 0}, "at least one evaluation"),
        ({"budget": -1}, "budget"),
        ({"budget": 2.5}, "budget"),
        ({"memory": 0}, "memory"),
    ):
        with pytest.raises(SkipError, match=message):
            fixed_point(torch.cos, start, **arguments)
    with pytest.raises(SkipError, match="NaN or infinity at its starting point"):
        fixed_point(lambda z: z / 0, start)
    with pytest.raises(SkipError, match="expected the same"):
        fixed_point(lambda z: z[:, :1], start)
    with pytest.raises(SkipError, match="floats"):
        fixed_point(torch.cos, torch.zeros(1, 2, dtype=torch.long))
