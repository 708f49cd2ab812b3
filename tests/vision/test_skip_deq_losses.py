"""The skip loss and the penalty on the Jacobian, on paper."""

import pytest
import torch

from skipguide.errors import SkipError
from skipguide.vision.skip_deq.network import jacobian_penalty, skip_loss


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
