"""The layer in equilibrium: on images and in low precision, its guesses, losses, warnings and what it refuses."""

import math
import warnings

import pytest
import torch
from helpers.contraction import ALL, Cell
from helpers.traced import traced
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision import SkipDEQ
from skipguide.vision.skip_deq import ConvergenceWarning, jacobian_penalty, skip_loss

pytestmark = pytest.mark.numerics


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


def test_plain_iterations_keep_the_states_type_and_every_row_has_to_converge():
    """Halving towards x, from zero: a row of zeros is there already. The cell answers in half of the precision."""
    deq = SkipDEQ(lambda z, x: (z / 2 + x).float(), tol=1e-3)
    x = torch.tensor([[0.0], [1.0]], dtype=torch.double)
    z, info = deq.unroll(x, 3)
    assert z.dtype is torch.double and z.flatten().tolist() == [0.0, 1.75]
    assert info.residuals.tolist() == [0.0, pytest.approx(0.25 / 1.75)] and not info.converged
    assert deq.unroll(x, 12)[1].converged


def test_against_torchdeq_where_installed():
    torchdeq = pytest.importorskip("torchdeq")
    torch.manual_seed(0)
    cell = Cell()
    x = torch.randn(2, 3, dtype=torch.double)
    theirs = torchdeq.get_deq(f_solver="anderson", f_max_iter=200, f_tol=1e-12)
    (expected,) = theirs(lambda z: cell(z, x), torch.zeros(2, 4).double())[0]
    found, _ = SkipDEQ(cell, tol=1e-12, budget=300, state_shape=(4,))(x)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)


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


def test_a_guess_of_low_precision_does_not_keep_the_solve_there():
    torch.manual_seed(0)
    deq = SkipDEQ(lambda z, x: torch.tanh(0.5 * z + x), torch.nn.Linear(3, 3), tol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, info = deq(torch.rand(2, 3))
    assert z.dtype == info.guess.dtype == torch.float32
    assert info.converged


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
    torch.manual_seed(0)
    matrix = torch.randn(5, 5, dtype=torch.double).requires_grad_()
    z, x = torch.randn(2, 5).double(), torch.zeros(2, 5).double()
    generator = torch.Generator().manual_seed(0)
    found = jacobian_penalty(lambda z, x: z @ matrix.T + x, z, x, probes=3000, generator=generator)
    expected = matrix.square().sum() / 5  # two rows with the same Jacobian, ten elements
    assert found.item() == pytest.approx(expected.item(), rel=0.05)
    (grad,) = torch.autograd.grad(found, matrix)
    torch.testing.assert_close(grad, 2 * matrix.detach() / 5, atol=0.15, rtol=0.2)
    bent = z.clone().requires_grad_()
    found = jacobian_penalty(lambda z, x: torch.tanh(z @ matrix), bent, x)
    assert torch.autograd.grad(found, bent, allow_unused=True)[0] is None, "the equilibrium is not moved by it"
    with torch.no_grad():
        assert jacobian_penalty(lambda z, x: x, z, x.clone().requires_grad_()).item() == 0
    with pytest.raises(SkipError, match="probe"):
        jacobian_penalty(lambda z, x: z, z, x, probes=0)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": 3}, "called as f"),
        ({"init": "zero"}, "skip_reg"),
        ({"solver": "newton"}, "expected a solver"),
        ({"tol": -1}, "tol"),
        ({"budget": -1}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"backward_budget": 0}, "backward_budget"),
        ({"backward_tol": 2.0}, "tol"),
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
    for empty in ((0, 3), (2, 0)):
        with pytest.raises(SkipError, match=r"expected x \[N, \.\.\.\] of floats; got torch.float64 of shape"):
            deq(torch.zeros(empty).double())
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
    with pytest.raises(SkipError, match="steps as a whole number of at least 1"):
        deq.unroll(torch.zeros(1, 3).double(), 0)


@pytest.mark.parametrize("shape", [4, (0,), ("4",), "4"], ids=str)
def test_state_shape_is_checked_early(shape):
    with pytest.raises(SkipError, match="state_shape"):
        SkipDEQ(Cell(), state_shape=shape)


def test_too_little_memory_is_no_bad_input():
    """It stays torch's own error, which callers catch to try a smaller batch."""

    def full(*_):
        raise torch.OutOfMemoryError

    for deq in (SkipDEQ(full), SkipDEQ(torch.add, full)):
        with pytest.raises(torch.OutOfMemoryError):
            deq(torch.zeros(1, 2))


@pytest.mark.parametrize("solver", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.double])
def test_converged_means_the_same_in_every_dtype(solver, dtype):
    """A residual of 200 has no square in float16, and one of 1e-4 has none either."""
    for size in (400.0, 2e-3) if dtype.itemsize == 2 else (1e20, 400.0, 2e-3, 1e-30):
        x = torch.full((1, 4), size, dtype=dtype)
        with torch.no_grad():
            z, info = SkipDEQ(lambda z, x: 0.5 * z + x, solver=solver, tol=1e-2, budget=200)(x)
        assert info.converged and info.evaluations > 1, (size, info)
        assert z.dtype is dtype and info.residuals.dtype is torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(z.double() / size, torch.full((1, 4), 2.0).double(), atol=0.05, rtol=0)
        measured = (0.5 * z + x - z).double().norm() / (0.5 * z + x).double().norm()
        assert info.residual == pytest.approx(float(measured), rel=1e-3, abs=1e-9) and measured <= 1e-2


def test_small_steps_of_float16_are_not_taken_for_none():
    z, info = SkipDEQ(lambda z, x: 0.9 * z + 0.001 * x, solver="picard", budget=200)(torch.ones(1, 4).half())
    assert info.converged and info.residual > 0
    torch.testing.assert_close(z.float(), torch.full((1, 4), 0.01), atol=2e-4, rtol=0)


def test_losses_in_float16_do_not_overflow():
    z, guess = torch.full((1, 2), 300.0).half(), torch.zeros(1, 2).half()
    assert skip_loss(z, guess, "mse").item() == 90000
    weight = torch.full((1,), 300.0).half()
    found = jacobian_penalty(lambda z, x: weight * z, z, z)
    assert torch.isfinite(found) and found > 0


def test_an_unconverged_residual_is_that_of_what_is_returned():
    """Plain steps go past the end, so that a correction may be worse than the point before it, or better."""

    def cell(z, x):
        return z + torch.sin(3 * z) - 1.2 + x

    x = torch.zeros(4, 1, dtype=torch.double)
    guess = torch.tensor([[0.1], [0.3], [0.5], [0.9]], dtype=torch.double)
    for budget in (2, 3, 5, 8):
        with pytest.warns(ConvergenceWarning):
            z, info = SkipDEQ(cell, lambda _: guess, solver="picard", tol=1e-6, budget=budget)(x)
        value = cell(z, x)
        torch.testing.assert_close(info.residuals, ((value - z) / value).abs()[:, 0])
    with pytest.warns(ConvergenceWarning):
        info = SkipDEQ(cell, lambda _: guess, tol=1e-6, budget=1)(x)[1]
    assert math.isnan(info.residual), "a correction that nothing measured"


def test_tracing_exporting_and_functional_transforms_are_refused():
    deq = SkipDEQ(lambda z, x: torch.tanh(0.5 * z + x))
    x = torch.ones(2, 3)
    with pytest.raises(SkipError, match="export the cell"):
        traced(lambda x: deq(x)[0], x)
    with pytest.raises(SkipError, match=r"transforms of torch\.func"):
        torch.func.vmap(lambda x: deq(x[None])[0])(x)
    with pytest.raises(SkipError, match=r"transforms of torch\.func"):
        torch.func.grad(lambda x: deq(x)[0].sum())(x)
    with pytest.raises(Exception, match="export the cell"):
        torch.export.export(deq, (x,))


def test_an_input_of_another_dtype_gets_a_hint_about_dtypes():
    layer = nn.Linear(3, 3)
    with pytest.raises(SkipError, match=r"convert one of them, x\.float\(\)"):
        SkipDEQ(lambda z, x: torch.tanh(layer(z) + x))(torch.ones(2, 3).double())
