"""Guesses of the layer: three ways to one, a better one shortens the solve, one that does not fit is named."""

import math
import warnings

import pytest
import torch
from helpers.contraction import Cell
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision import SkipDEQ
from skipguide.vision.skip_deq.network import skip_loss


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
