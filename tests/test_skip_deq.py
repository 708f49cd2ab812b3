"""The layer as a whole: on images, in low precision, against torchdeq."""

import pytest
import torch
from contraction import Cell
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


def test_against_torchdeq_where_installed():
    torchdeq = pytest.importorskip("torchdeq")
    torch.manual_seed(0)
    cell = Cell()
    x = torch.randn(2, 3, dtype=torch.double)
    theirs = torchdeq.get_deq(f_solver="anderson", f_max_iter=200, f_tol=1e-12)
    (expected,) = theirs(lambda z: cell(z, x), torch.zeros(2, 4).double())[0]
    found, _ = SkipDEQ(cell, tol=1e-12, budget=300, state_shape=(4,))(x)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
