"""One module at several places, looped depth, lists that change: refused in a sentence, or what was meant."""

import pytest
import torch
from torch import nn

from skipguide import (
    BlockSpec,
    LostGateError,
    Prefix,
    SkipError,
    Skipper,
    SkipPlan,
    capture,
    register_blocks,
    resume,
)
from skipguide.router import Router


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        one, two = Layer(), Layer()
        self.layers = nn.ModuleList([one, two, one, one])
        self.rounds = 1

    def forward(self, x):
        for _ in range(self.rounds):
            for layer in self.layers:
                x = layer(x)
        return x


class Looped(Shared):
    def __init__(self, rounds=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.rounds = rounds


register_blocks(Shared, BlockSpec("layers", streams=("x",)))
X = torch.randn(2, 4)


def test_a_layer_that_stands_at_several_places():
    model = Shared()
    for layer in (0, 2, 3):
        with pytest.raises(SkipError, match=r"one module with layers 0, 2, 3 of Shared.*name all of these layers"):
            Skipper(model, SkipPlan([layer]))
    for capturing in (capture(model, Prefix(1)), None):
        if capturing is None:
            with pytest.raises(SkipError, match="cannot be told apart"):
                capture(model, Prefix(2))
    with Skipper(model, SkipPlan([1])) as skipper:
        one = model(X)
    apart = model.layers[0]
    assert torch.equal(one, apart(apart(apart(X)))) and skipper.stats.skipped_fraction == 0.25
    with Skipper(model, SkipPlan([0, 2, 3])) as skipper:
        assert torch.equal(model(X), model.layers[1](X))
    assert skipper.stats.skipped_fraction == 0.75
    with pytest.raises(SkipError, match="one module at several places"):
        Router(model)


def test_looped_depth():
    for plan in (SkipPlan([1]), SkipPlan([1], rows=[0])):
        with (
            pytest.raises(SkipError, match=r"layers\.1 of Looped runs more than once in a pass"),
            Skipper(model := Looped(), plan),
        ):
            model(X)
    with pytest.raises(SkipError, match="more than once in a pass"), capture(model, Prefix(1)):
        model(X)
    with Skipper(model, SkipPlan()):
        assert torch.equal(model(X), model.forward(X)), "nothing is left out: nothing to tell apart"
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("change", [lambda m: m.append(Layer()), lambda m: m.pop(2)], ids=["grew", "shrank"])
def test_a_list_of_blocks_that_changed(change):
    model = Looped(rounds=1)
    with (
        pytest.raises(LostGateError, match=r"layers of Looped has \d modules now, and had 3"),
        Skipper(model, SkipPlan([1])),
    ):
        change(model.layers)
        model(X)


def test_a_prefix_of_another_model_and_rows_that_are_not_there():
    model, other, prefix = Looped(1), Looped(1), Prefix(1)
    with capture(model, prefix):
        full = model(X)
    with pytest.raises(SkipError, match="captured from another Looped"):
        resume(other, prefix)
    with pytest.raises(SkipError, match="captured from another Looped"):
        resume(other, prefix.select(slice(0, 1), 2))
    with resume(model, prefix):
        assert torch.equal(model(X), full)
    for rows in (slice(2, 4), slice(5, 7), slice(1, 1), slice(0, 3), slice(0, 2, 2)):
        with pytest.raises(SkipError, match="expected some of the 2 rows"):
            prefix.select(rows, 2)
    assert prefix.select(slice(-1, None), 2).streams["x"].shape == (1, 4)
