"""Fixed points against direct solves, gradients against finite differences and unrolling, and every way to go wrong."""

import doctest
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import skipguide.vision.fixed_point as fixed_point_module
import skipguide.vision.skip_deq as skip_deq
from skipguide.errors import SkipError
from skipguide.vision import SkipDEQ
from skipguide.vision.fixed_point import SOLVERS, fixed_point
from skipguide.vision.skip_deq import ConvergenceWarning, jacobian_penalty, skip_loss

ALL = sorted(SOLVERS)
# A large budget shows that a solver gets there; the efficient ones are held to a small one below.
BUDGET = 1000


def contraction(size=5, gain=0.7, seed=0):
    torch.manual_seed(seed)
    matrix = nn.init.orthogonal_(torch.empty(size, size, dtype=torch.double), gain=gain)
    return matrix, torch.randn(size, dtype=torch.double)


class Cell(nn.Module):
    """tanh(W z + U x + b), with a contracting W."""

    def __init__(self, size=4, inputs=3, gain=0.6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.W = nn.Linear(size, size)
        self.U = nn.Linear(inputs, size, bias=False)
        nn.init.orthogonal_(self.W.weight, gain=gain)
        self.double()

    def forward(self, z, x):
        return torch.tanh(self.W(z) + self.U(x))


# --- the solvers


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


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("gain", [1.5, 2.0])
def test_anderson_ends_wherever_plain_iterations_do(size, gain):
    """A residual has dips where it is not zero: extrapolating alone stays in them, in 2 or 3 of each 200 problems."""
    torch.manual_seed(0)
    matrix = gain * torch.randn(200, size, size, dtype=torch.double) / size**0.5
    shift = 0.5 * torch.randn(200, size, dtype=torch.double)

    def cell(z):
        return torch.tanh(torch.einsum("nij,nj->ni", matrix, z) + shift)

    plain = fixed_point(cell, torch.zeros_like(shift), "picard", 1e-3, 60)
    found = fixed_point(cell, torch.zeros_like(shift), "anderson", 1e-3, 200)
    solvable = plain.residuals <= 1e-3
    assert solvable.sum() > 20
    assert bool((found.residuals[solvable] <= 1e-3).all())


@pytest.mark.parametrize("gain", [0.95, 1.3, 3.0])
@pytest.mark.parametrize("size", [6, 12, 18])
def test_anderson_is_patient_with_linear_problems(size, gain):
    """A rotation: its residual does not fall before the history spans the space, and then it is solved."""
    torch.manual_seed(size)
    matrix = gain * nn.init.orthogonal_(torch.empty(size, size, dtype=torch.double))
    x = torch.randn(8, size, dtype=torch.double)
    assert fixed_point(lambda z: z @ matrix.T + x, torch.zeros_like(x), "anderson", 1e-4, size + 5).converged


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


def test_stiff_problem_with_the_ode_form_ends_and_converges():
    """Rates of 1 and 200: the error tolerance follows the stop tolerance, so the residual does not stall."""
    rates = torch.tensor([1.0, 20.0, 200.0])
    for tol in (1e-1, 1e-2, 1e-3):
        found = fixed_point(lambda z: z - rates * (z - 1), torch.zeros(2, 3), "ode", tol, 4000)
        assert found.converged, (tol, found)
        assert (found.z - 1).abs().max() < 20 * tol


def test_bad_settings_and_cells():
    start = torch.zeros(1, 2)
    for arguments, message in (
        ({"solver": "newton"}, "expected a solver"),
        ({"tol": 0.0}, "tolerance"),
        ({"tol": float("nan")}, "tolerance"),
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


# --- the layer


@pytest.mark.parametrize("solver", ALL)
def test_gradcheck(solver):
    cell = Cell()
    deq = SkipDEQ(cell, solver=solver, tol=1e-12, budget=BUDGET, backward_tol=1e-13, state_shape=(4,))
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    names, tensors = zip(*cell.named_parameters(), strict=True)

    def solve(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        other = SkipDEQ(
            lambda z, x: torch.func.functional_call(cell, given, (z, x)),
            solver=solver, tol=1e-12, budget=BUDGET, backward_tol=1e-13, state_shape=(4,),
        )  # fmt: skip
        return other(x)[0]

    assert torch.autograd.gradcheck(solve, (x, *tensors), atol=1e-6, fast_mode=solver in ("ode", "picard"))
    z, info = deq(x)
    z.sum().backward()
    assert info.backward_converged
    assert info.backward_evaluations >= 1
    assert info.backward_residual <= 1e-13


@pytest.mark.parametrize("solver", ALL)
def test_equilibrium_and_gradient_equal_a_direct_linear_solve(solver):
    matrix, shift = contraction(gain=0.8)
    matrix.requires_grad_()
    shift.requires_grad_()
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    z, info = SkipDEQ(lambda z, x: z @ matrix.T + shift + x, None, solver, 1e-12, BUDGET)(x)
    direct = torch.linalg.solve(torch.eye(5).double() - matrix, (shift + x).T).T
    assert info.converged
    assert (z - direct).abs().max() < 1e-8
    weight = torch.randn(3, 5, dtype=torch.double)
    found = torch.autograd.grad((weight * z).sum(), (matrix, shift, x))
    expected = torch.autograd.grad((weight * direct).sum(), (matrix, shift, x))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-8


def test_gradient_equals_unrolling_to_the_end():
    cell = Cell()
    deq = SkipDEQ(cell, "skip_reg", tol=1e-12, budget=200, state_shape=(4,))
    x = torch.randn(2, 3, dtype=torch.double)
    implicit = torch.autograd.grad(deq(x)[0].square().sum(), list(cell.parameters()))
    unrolled = torch.autograd.grad(deq.unroll(x, 200)[0].square().sum(), list(cell.parameters()))
    for a, b in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_gradient_survives_small_cotangents_and_a_coupled_batch():
    """A batch norm couples the rows: the linear solve is then one over the batch, and its residual says so."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).double()
    cell = Cell()

    def coupled(z, x):
        return 0.2 * norm(cell(z, x) + x[:, :1])

    x = torch.randn(6, 3, dtype=torch.double)
    deq = SkipDEQ(coupled, tol=1e-12, budget=300, state_shape=(4,), coupled=True)
    z, info = deq(x)
    weight = 1e-9 * torch.randn_like(z)
    implicit = torch.autograd.grad((weight * z).sum(), list(cell.parameters()))
    unrolled = torch.autograd.grad((weight * deq.unroll(x, 100)[0]).sum(), list(cell.parameters()))
    assert info.backward_converged
    for a, b in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-16, rtol=1e-6)


def test_phantom_gradient_points_the_same_way_and_gets_closer():
    cell = Cell()
    x = torch.randn(2, 3, dtype=torch.double)
    exact_z, _ = SkipDEQ(cell, tol=1e-12, budget=200, state_shape=(4,))(x)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact_z.square().sum(), list(cell.parameters()))])
    errors = []
    for steps in (1, 4, 60):
        deq = SkipDEQ(
            cell, tol=1e-12, budget=200, state_shape=(4,), gradient="phantom", phantom_steps=steps, phantom_damping=0.8
        )
        z, info = deq(x)
        assert torch.equal(z, exact_z)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(z.square().sum(), list(cell.parameters()))])
        assert torch.cosine_similarity(grad, exact, dim=0) > 0.8
        errors.append(float((grad - exact).norm() / exact.norm()))
        assert info.backward_converged is None
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_gradients_do_not_change_the_value():
    deq = SkipDEQ(Cell(), "skip_reg", state_shape=(4,))
    x = torch.randn(5, 3, dtype=torch.double)
    z, info = deq(x)
    with torch.no_grad():
        again, silent = deq(x)
    assert torch.equal(z, again)
    assert z.requires_grad
    assert not again.requires_grad
    assert (info.evaluations, info.residual, info.converged) == (silent.evaluations, silent.residual, silent.converged)


def test_three_ways_to_guess():
    cell = Cell()
    x = torch.randn(2, 3, dtype=torch.double)
    plain = SkipDEQ(cell, state_shape=(4,))
    assert not plain(x)[1].guess.any()
    regular = SkipDEQ(cell, "skip_reg", state_shape=(4,))
    assert torch.equal(regular(x)[1].guess, cell(torch.zeros(2, 4).double(), x))
    net = nn.Linear(3, 4).double()
    learned = SkipDEQ(cell, net)
    z, info = learned(x)
    assert torch.equal(info.guess, net(x))
    assert {name.split(".")[0] for name, _ in learned.named_parameters()} == {"f", "init"}
    skip_loss(z, info.guess).backward()
    assert all(parameter.grad is not None for parameter in learned.parameters())
    solved = z.detach()
    exact = SkipDEQ(cell, lambda _: solved, tol=1e-3)(x)[1]
    assert exact.evaluations == 1, "a guess within the tolerance needs no step"


def test_budget_of_zero_is_the_guess():
    net = nn.Linear(3, 4).double()
    calls = []

    def cell(z, x):
        calls.append(1)
        return z

    deq = SkipDEQ(cell, net, budget=0)
    x = torch.randn(2, 3, dtype=torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for, hence no warning
        z, info = deq(x)
    assert torch.equal(z, net(x))
    assert not calls
    assert info.evaluations == 0
    assert not info.converged
    assert math.isnan(info.residual)
    z.sum().backward()
    assert net.weight.grad is not None
    with pytest.raises(SkipError, match="there is none"):
        SkipDEQ(cell, budget=0)


def test_training_the_guess_shortens_the_solve():
    torch.manual_seed(0)
    cell = Cell(gain=0.9)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    deq = SkipDEQ(cell, net, "picard", 1e-2, 200)
    x = torch.randn(16, 3, dtype=torch.double)
    optimizer = torch.optim.Adam(net.parameters(), 3e-2)
    counts = []
    for _ in range(60):
        with torch.no_grad():
            z, info = deq(x)
        counts.append(info.evaluations)
        optimizer.zero_grad()
        skip_loss(z, deq.guess(x)).backward()
        optimizer.step()
    assert counts[-1] < 0.8 * counts[0]


def test_losses_on_paper():
    z = torch.tensor([[1.0, -2.0]], requires_grad=True)
    guess = torch.tensor([[0.0, 2.0]], requires_grad=True)
    assert skip_loss(z, guess).item() == 2.5
    assert skip_loss(z, guess, "mse").item() == 8.5
    assert torch.autograd.grad(skip_loss(z, guess), z)[0].tolist() == [[0.5, -0.5]]
    assert torch.autograd.grad(skip_loss(z, guess, stop_gradient=True), z, allow_unused=True)[0] is None
    with pytest.raises(SkipError, match="kind"):
        skip_loss(z, guess, "l2")
    with pytest.raises(SkipError, match="shape"):
        skip_loss(z, guess[:, :1])


def test_jacobian_penalty_estimates_the_frobenius_norm():
    matrix = torch.randn(5, 5, dtype=torch.double).requires_grad_()
    z, x = torch.randn(2, 5).double(), torch.zeros(2, 5).double()
    generator = torch.Generator().manual_seed(0)
    found = jacobian_penalty(lambda z, x: z @ matrix.T + x, z, x, probes=3000, generator=generator)
    expected = matrix.square().sum() / 5  # two rows with the same Jacobian, ten elements
    assert found.item() == pytest.approx(expected.item(), rel=0.05)
    (grad,) = torch.autograd.grad(found, matrix)
    torch.testing.assert_close(grad, 2 * matrix.detach() / 5, atol=0.15, rtol=0.2)
    with torch.no_grad():
        assert jacobian_penalty(lambda z, x: x, z, x.clone().requires_grad_()).item() == 0
    with pytest.raises(SkipError, match="probe"):
        jacobian_penalty(lambda z, x: z, z, x, probes=0)


# --- never silent


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


def test_second_derivatives_are_refused():
    x = torch.randn(1, 3, dtype=torch.double, requires_grad=True)
    z, _ = SkipDEQ(Cell(), state_shape=(4,))(x)
    with pytest.raises(SkipError, match="first derivatives only"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_a_cell_that_ignores_its_state():
    weight = torch.tensor(2.0, requires_grad=True)
    z, info = SkipDEQ(lambda z, x: weight * x)(torch.ones(1, 2))
    assert info.converged
    z.sum().backward()
    assert weight.grad.item() == 2
    z, _ = SkipDEQ(lambda z, x: x)(torch.ones(1, 2))
    assert not z.requires_grad


def test_images_and_low_precision():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    conv.weight.data *= 0.3
    for dtype in (torch.float32, torch.bfloat16):
        conv.to(dtype)
        deq = SkipDEQ(lambda z, x: torch.tanh(conv(z) + x), "skip_reg", tol=2e-2)
        z, info = deq(torch.randn(3, 2, 6, 5, dtype=dtype))
        assert z.shape == (3, 2, 6, 5)
        assert z.dtype == dtype
        assert info.converged
        assert info.residuals.shape == (3,)
        z.float().sum().backward()
        assert conv.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": 3}, "called as f"),
        ({"init": "zero"}, "skip_reg"),
        ({"solver": "newton"}, "expected a solver"),
        ({"tol": -1}, "tolerance"),
        ({"budget": -1}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"backward_budget": 0}, "backward_budget"),
        ({"backward_tol": 2.0}, "tolerance"),
        ({"gradient": "exact"}, "implicit"),
        ({"phantom_steps": 0}, "phantom_steps"),
        ({"phantom_damping": 0.0}, "phantom_damping"),
        ({"memory": 0}, "memory"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(SkipError, match=message):
        SkipDEQ(**({"f": torch.add} | arguments))


def test_bad_input():
    cell = Cell()
    deq = SkipDEQ(cell, state_shape=(4,))
    with pytest.raises(SkipError, match="finite x"):
        deq(torch.full((1, 3), torch.nan).double())
    with pytest.raises(SkipError, match="floats"):
        deq(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(SkipError, match="got list"):
        deq([1.0])
    with pytest.raises(SkipError, match="expected the same"):
        SkipDEQ(lambda z, x: z[:, :1])(torch.zeros(1, 3))
    with pytest.raises(SkipError, match="one row for each"):
        SkipDEQ(cell, lambda x: x[:1])(torch.zeros(2, 3).double())
    with pytest.raises(SkipError, match="guess has NaN"):
        SkipDEQ(cell, lambda x: x / 0)(torch.zeros(2, 3).double())
    with pytest.raises(SkipError, match="starting point"):
        SkipDEQ(lambda z, x: z / 0)(torch.zeros(2, 3))
    with pytest.raises(SkipError, match="one step"):
        deq.unroll(torch.zeros(1, 3).double(), 0)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda x: x[:, :2], r"z torch.float64 \[2, 2\] on cpu .*check init"),
        (lambda x: x.new_zeros(2, 4, 1), r"z torch.float64 \[2, 4, 1\]"),
        (lambda x: x.new_zeros(2, 4, dtype=torch.long), "of floats on cpu.*int64"),
        (lambda x: x.new_zeros(2, 4, device="meta"), "where x is; got torch.float64 .* on meta"),
        (torch.nn.Linear(5, 4).double(), r"init cannot take x torch.float64 \[2, 3\].*its weights"),
        (torch.nn.Linear(3, 4), "init cannot take x torch.float64.*its weights"),
        (None, "pass state_shape"),
        ("skip_reg", "pass state_shape"),
    ],
    ids=["width", "shape", "whole numbers", "device", "weights' width", "weights' dtype", "zeros", "skip_reg"],
)
def test_a_guess_that_the_cell_cannot_take_is_named(init, message):
    x = torch.ones(2, 3).double()
    deq = SkipDEQ(Cell(), init)
    for run in (deq, lambda x: deq.unroll(x, 2)):
        with pytest.raises(SkipError, match=message):
            run(x)


def test_a_guess_that_broadcasts_is_no_state():
    deq = SkipDEQ(lambda z, x: torch.tanh(0.5 * z + x), lambda x: x[:, :1])
    for run in (deq, lambda x: deq.unroll(x, 3)):
        with pytest.raises(SkipError, match="expected the same"):
            run(torch.rand(2, 3))


@pytest.mark.parametrize("shape", [4, (0,), ("4",), "4"], ids=str)
def test_state_shape_is_checked_early(shape):
    with pytest.raises(SkipError, match="state_shape"):
        SkipDEQ(Cell(), state_shape=shape)


def test_a_guess_of_low_precision_does_not_keep_the_solve_there():
    torch.manual_seed(0)
    deq = SkipDEQ(lambda z, x: torch.tanh(0.5 * z + x), torch.nn.Linear(3, 3), tol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, info = deq(torch.rand(2, 3))
    assert z.dtype == info.guess.dtype == torch.float32
    assert info.converged


def test_against_torchdeq_where_installed():
    torchdeq = pytest.importorskip("torchdeq")
    cell = Cell()
    x = torch.randn(2, 3, dtype=torch.double)
    theirs = torchdeq.get_deq(f_solver="anderson", f_max_iter=200, f_tol=1e-12)
    (expected,) = theirs(lambda z: cell(z, x), torch.zeros(2, 4).double())[0]
    found, _ = SkipDEQ(cell, tol=1e-12, budget=300, state_shape=(4,))(x)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("module", [skip_deq, fixed_point_module], ids=lambda m: m.__name__)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
