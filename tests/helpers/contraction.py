"""Contracting cells, all solvers, and a budget that is enough for each."""

import torch
from torch import nn

from skipguide.vision.fixed_point import SOLVERS

ALL = sorted(SOLVERS)
# Shows that a solver gets there; the efficient ones are held to less in test_fixed_point.
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
