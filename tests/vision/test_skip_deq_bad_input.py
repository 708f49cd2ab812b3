"""Wrong arguments and input of the layer are refused and named."""

import pytest
import torch
from helpers.contraction import Cell

from skipguide.errors import SkipError
from skipguide.vision import SkipDEQ


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
