"""Gradients of the layer equal finite differences, a direct solve and unrolling."""

import contextlib

import pytest
import torch
from helpers.contraction import ALL, BUDGET, Cell, contraction
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision import SkipDEQ
from skipguide.vision.skip_deq.network import ConvergenceWarning

pytestmark = pytest.mark.numerics


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


@pytest.mark.parametrize("coupled", [True, False])
def test_a_coupled_solve_sees_the_whole_batch_forwards_and_backwards(coupled):
    """Rows change places in f: of a linear problem in six numbers Anderson finds the end in eight steps, if it sees
    all six at once; row by row it does not."""
    matrix, shift = contraction(size=3, gain=0.95)
    x, weight = torch.randn(2, 2, 3, dtype=torch.double)
    deq = SkipDEQ(lambda z, x: z.flip(0) @ matrix.T + shift + x, tol=1e-9, budget=9, coupled=coupled)
    with contextlib.nullcontext() if coupled else pytest.warns(ConvergenceWarning):
        z, info = deq(x.requires_grad_())
        (weight * z).sum().backward()
    assert (info.converged, info.backward_converged) == (coupled, coupled)
    assert len(info.residuals) == (1 if coupled else 2)


def test_memory_and_the_backward_settings_are_used():
    """A linear problem in five numbers ends at once for who remembers five differences, and not for who keeps one."""
    matrix, shift = contraction(gain=0.9)
    x = torch.randn(1, 5, dtype=torch.double, requires_grad=True)
    for memory, ends in ((20, True), (1, False)):
        deq = SkipDEQ(lambda z, x: z @ matrix.T + shift + x, tol=1e-9, budget=300, memory=memory)
        z, info = deq(x)
        z.square().sum().backward()
        assert info.converged and info.backward_converged
        assert (info.evaluations <= 8, info.backward_evaluations <= 8) == (ends, ends)
    assert (deq.backward_tol, deq.backward_budget) == (1e-9, 300), "those of the solve, where nothing else is said"
    assert SkipDEQ(torch.add, "skip_reg", budget=0).backward_budget == 1


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


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_gradients_of_float16_are_solved_to_the_tolerance(scale):
    """z = w z + x: dz/dx = 1 / (1 - w), with cotangents whose squares float16 does not hold."""
    weight = torch.full((1,), 0.5, dtype=torch.float16, requires_grad=True)
    x = torch.full((1, 4), 1.0, dtype=torch.float16, requires_grad=True)
    z, info = SkipDEQ(lambda z, x: weight * z + x, tol=1e-3)(x)
    (scale * z).sum().backward()
    assert info.backward_converged and info.backward_residual <= 1e-3
    torch.testing.assert_close(x.grad.float(), torch.full((1, 4), 2 * scale), rtol=1e-2, atol=0)
    torch.testing.assert_close(weight.grad.float(), torch.full((1,), 16 * scale), rtol=1e-2, atol=0)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_gradient_that_is_not_finite_passes_as_through_any_layer(coupled):
    """GradScaler looks for it after its first, too large scale, and leaves the step out."""
    layer = nn.Linear(3, 3)
    nn.init.orthogonal_(layer.weight, gain=0.5)
    x = torch.randn(2, 3, requires_grad=True)
    z, info = SkipDEQ(lambda z, x: torch.tanh(layer(z) + x), tol=1e-5, coupled=coupled)(x)
    z.backward(torch.tensor([[1.0, 1.0, 1.0], [1.0, torch.inf, 1.0]]))
    assert not torch.isfinite(layer.weight.grad).all() and not torch.isfinite(x.grad[1]).all()
    assert info.backward_converged is False and info.backward_residual == float("inf")
    if not coupled:
        expected = x.detach()[:1].requires_grad_()
        SkipDEQ(lambda z, x: torch.tanh(layer(z) + x), tol=1e-5)(expected)[0].sum().backward()
        torch.testing.assert_close(x.grad[:1], expected.grad, atol=1e-4, rtol=1e-3)


def test_a_backward_product_beyond_float16_passes_on_too():
    x = torch.full((1, 2), 1.0, dtype=torch.float16, requires_grad=True)
    weight = torch.full((1,), 0.5, dtype=torch.float16, requires_grad=True)
    z, info = SkipDEQ(lambda z, x: weight * z + x, tol=1e-2)(x)
    z.backward(torch.full((1, 2), 6e4, dtype=torch.float16))
    assert torch.isinf(x.grad).all() and info.backward_converged is False
