"""The layer as a whole: on images, in low precision, against torchdeq."""

import pytest
import torch
from helpers.contraction import Cell
from torch import nn

from skipguide.vision import SkipDEQ


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
