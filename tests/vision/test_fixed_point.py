"""Solvers reach the fixed point of a direct solve or end within the budget; wrong settings are refused."""

import math

import pytest
import torch
from helpers.contraction import ALL, BUDGET, Cell, contraction
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision.fixed_point import fixed_point

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("solver", ALL)
def test_linear_problem_against_a_direct_solve(solver):
    matrix, shift = contraction()
    x = torch.randn(3, 5, dtype=torch.double)
    found = fixed_point(lambda z: z @ matrix.T + shift + x, torch.zeros_like(x), solver, 1e-11, BUDGET)
    direct = torch.linalg.solve(torch.eye(5).double() - matrix, (shift + x).T).T
    assert found.converged
    assert (found.z - direct).abs().max() < 1e-8
    residual = (found.z @ matrix.T + shift + x - found.z).square().mean(1).sqrt()
    assert residual.max() < 1e-10


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_krylov_like_solvers_are_short_and_need_no_contraction(solver):
    """A 6-dimensional linear problem with a spectral radius of 3: a secant method ends after a dozen evaluations."""
    torch.manual_seed(3)
    matrix = 3 * nn.init.orthogonal_(torch.empty(6, 6, dtype=torch.double))
    x = torch.randn(4, 6, dtype=torch.double)
    found = fixed_point(lambda z: z @ matrix.T + x, torch.zeros_like(x), solver, 1e-10, 40)
    assert found.converged, found
    direct = torch.linalg.solve(torch.eye(6).double() - matrix, x.T).T
    torch.testing.assert_close(found.z, direct, atol=1e-8, rtol=1e-8)


def tanh_problems(size, gain, seed, rows=200):
    generator = torch.Generator().manual_seed(seed)
    matrix = gain * torch.randn(rows, size, size, dtype=torch.double, generator=generator) / size**0.5
    return matrix, 0.5 * torch.randn(rows, size, dtype=torch.double, generator=generator)


def solved(problems, solver, budget):
    matrix, shift = problems

    def cell(z):
        return torch.tanh(torch.einsum("nij,nj->ni", matrix, z) + shift)

    return fixed_point(cell, torch.zeros_like(shift), solver, 1e-3, budget)


def missed(problems, budget=60):
    """Rows that plain iteration ends and Anderson does not within three times as many evaluations."""
    solvable = solved(problems, "picard", budget).residuals <= 1e-3
    # the others only keep the search going
    problems = tuple(values[solvable] for values in problems)
    plain, found = (solved(problems, *how) for how in (("picard", budget), ("anderson", 3 * budget)))
    ended = plain.residuals <= 1e-3
    assert ended.sum() > 20 * len(solvable) / 200
    return int((found.residuals[ended] > 1e-3).sum())


@pytest.mark.parametrize("gain", [1.5, 2.0])
@pytest.mark.parametrize("size", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "seeds", [pytest.param(range(12, 36), marks=pytest.mark.slow), range(100, 106)], ids=["12 to 35", "others"]
)
def test_anderson_ends_wherever_plain_iterations_do(size, gain, seeds):
    """A residual has dips where it is not zero: extrapolating alone stays in them, in one of 1000 problems."""
    drawn = [tanh_problems(size, gain, seed) for seed in seeds]
    assert missed(tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))) == 0


@pytest.mark.parametrize(("seed", "size", "gain"), [(13, 8, 2.0), (17, 6, 1.5), (20, 4, 1.5)])
def test_problems_that_extrapolation_alone_misses(seed, size, gain):
    assert missed(tanh_problems(size, gain, seed)) == 0


@pytest.mark.parametrize("budget", [1, 4, 9, 25])
def test_anderson_ends_within_three_times_the_evaluations_for_any_budget(budget):
    for seed in range(4):
        problems = tanh_problems(5, 1.5, seed)
        ended = solved(problems, "picard", budget).residuals <= 1e-3
        found = solved(problems, "anderson", 3 * budget).residuals <= 1e-3
        assert not bool((ended & ~found).any())


def test_the_plain_orbit_in_reserve_has_the_bits_of_plain_iteration():
    """Without a fixed point no row ends, so every orbit is followed to the end."""
    matrix, _ = tanh_problems(6, 2.0, 3, rows=40)
    orbits = {}
    for solver, budget in (("picard", 30), ("anderson", 90)):
        points = orbits[solver] = []

        def cell(z, points=points):
            points.append(z.clone())
            return z + 0.5 + 0.3 * torch.sin(torch.einsum("nij,nj->ni", matrix, z))

        fixed_point(cell, torch.zeros(40, 6, dtype=torch.double), solver, 1e-300, budget)
    assert [len(points) for points in orbits.values()] == [30, 90]
    for k, point in enumerate(orbits["picard"]):
        at = k if k < 2 else 3 * k + 2
        assert torch.equal(orbits["anderson"][at], point), k + 1


def test_the_reserve_ends_with_an_orbit_that_is_not_finite():
    """Without an orbit every evaluation is Anderson's: f(z) = z^2 + 1 leaves the floats after a dozen."""
    points = []
    fixed_point(lambda z: points.append(z.clone()) or z.square() + 1, torch.ones(2, 1), "anderson", 1e-6, 60)
    orbit, reserved = torch.ones(2, 1), []
    for _ in range(12):
        reserved.append(orbit)
        orbit = orbit + (orbit.square() + 1 - orbit)
    made = [at + 1 for at, z in enumerate(points) if any(torch.equal(z, one) for one in reserved)]
    assert made[:4] == [1, 2, 9, 12] and made[-1] <= 27
    assert all(bool(torch.isfinite(z).all()) for z in points), "no evaluation is spent on an orbit that is lost"


def test_a_row_that_is_lost_goes_back_with_half_the_step():
    """From 0 a whole step leads to where the residual is a hundred times larger, half a step to the solution."""

    def cell(z):
        return torch.where(z < 0.75, 1 - z, z - 100)

    found = fixed_point(cell, torch.zeros(3, 1), "anderson", 1e-6, 3)
    assert found.converged and found.evaluations == 3 and found.z.unique().tolist() == [0.5]


@pytest.mark.parametrize("gain", [0.95, 1.3, 3.0])
@pytest.mark.parametrize("size", [6, 12, 18])
def test_anderson_is_patient_with_linear_problems(size, gain):
    """A rotation: its residual does not fall before the history spans the space, and then it is solved."""
    torch.manual_seed(size)
    matrix = gain * nn.init.orthogonal_(torch.empty(size, size, dtype=torch.double))
    x = torch.randn(8, size, dtype=torch.double)
    budget = size + 5
    budget += max(0, budget - 6) // 2  # of every three evaluations from the ninth on, one is the plain orbit's
    assert fixed_point(lambda z: z @ matrix.T + x, torch.zeros_like(x), "anderson", 1e-4, budget).converged


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ALL), st.integers(0, 10**6), st.floats(0.0, 0.9), st.sampled_from([1e-2, 1e-4, 1e-6]))
def test_convergence_is_what_it_says(solver, seed, gain, tol):
    matrix, shift = contraction(size=4, gain=gain, seed=seed)
    x = torch.randn(2, 4, dtype=torch.double)

    def cell(z):
        return torch.tanh(z @ matrix.T + shift) + x

    found = fixed_point(cell, torch.zeros_like(x), solver, tol, 3000)
    assert found.converged
    value = cell(found.z)
    relative = (value - found.z).norm(dim=1) / value.norm(dim=1)
    assert bool((relative <= tol * 1.0001).all())
    torch.testing.assert_close(relative, found.residuals, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("solver", ALL)
def test_rows_are_separate_problems(solver):
    cell = Cell()
    x = torch.randn(4, 3, dtype=torch.double)
    with torch.no_grad():
        whole = fixed_point(lambda z: cell(z, x), torch.zeros(4, 4).double(), solver, 1e-9, BUDGET)
        for row in range(4):
            one = fixed_point(
                lambda z, row=row: cell(z, x[row : row + 1]), torch.zeros(1, 4).double(), solver, 1e-9, BUDGET
            )
            torch.testing.assert_close(one.z[0], whole.z[row], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("solver", ALL)
def test_equilibrium_at_zero_and_at_the_start(solver):
    found = fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), solver, 1e-3, 200)
    assert found.converged
    assert found.z.abs().max() < 1e-2
    nothing = fixed_point(lambda z: 0.5 * z, torch.zeros(2, 3), solver, 1e-3, 200)
    assert nothing.converged
    assert nothing.evaluations == 1
    assert not nothing.z.any()


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_units_do_not_matter(solver, scale):
    matrix, shift = contraction()
    found = fixed_point(lambda z: z @ matrix.T + scale * shift, torch.zeros(1, 5).double(), solver, 1e-6, BUDGET)
    direct = torch.linalg.solve(torch.eye(5).double() - matrix, shift)
    torch.testing.assert_close(found.z[0] / scale, direct, atol=1e-4, rtol=1e-4)


def test_stiff_problem_with_the_ode_form_ends_and_converges():
    """Rates of 1 and 200: the error tolerance follows the stop tolerance, so the residual does not stall."""
    rates = torch.tensor([1.0, 20.0, 200.0])
    for tol in (1e-1, 1e-2, 1e-3):
        found = fixed_point(lambda z: z - rates * (z - 1), torch.zeros(2, 3), "ode", tol, 4000)
        assert found.converged, (tol, found)
        assert (found.z - 1).abs().max() < 20 * tol


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
