"""Chains: rows are written in place only where nobody but the next block can see it."""

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from skipguide import BlockSpec, Prefix, Skipper, SkipPlan, capture, find_blocks, register_blocks
from skipguide.router import Router
from skipguide.sequential import find_sequentials

KEEP = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


class Block(nn.Module):
    """Adds."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x + torch.tanh(x * self.weight)


class Stem(Block):
    pass


class Stacked(nn.Module):
    def __init__(self, width=8, blocks=4):
        super().__init__()
        self.layers = nn.Sequential(Stem(width), *(Block(width) for _ in range(blocks)))

    def forward(self, x):
        return self.layers(x)


register_blocks(Stacked, BlockSpec("layers", streams=("x",), classes=("Block",)))


@pytest.fixture(params=[8, 8192], ids=["index", "slices"])
def model(request):
    torch.manual_seed(0)
    return Stacked(request.param).eval()


def rows(model):
    return torch.randn(len(KEEP), len(model.layers[0].weight))


def by_hand(model, x):
    """Every value of the stream, new each time."""
    values = [model.layers[0](x)]
    for place, block in enumerate(list(model.layers)[1:]):
        values.append(torch.where(KEEP[:, place, None], block(values[-1]), values[-1]))
    return values


def route(model, x, decide=lambda place, x: KEEP[:, place]):
    with Router(model).running(decide):
        return model(x)


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
def test_rows_go_into_the_batch_of_the_block_before(model):
    x, places = rows(model), []

    def decide(place, x):
        places.append(x.data_ptr())
        return KEEP[:, place]

    wanted, before = by_hand(model, x), x.clone()
    assert close(route(model, x, decide), wanted[-1])
    assert torch.equal(x, before)
    assert places[0] != places[1] == places[2] == places[3], "the first makes a batch, the others write into it"


@torch.no_grad()
def test_what_leaves_the_chain_stays_as_it_is(model):
    x = rows(model)
    first = route(model, x)
    copy = first.clone()
    second = route(model, first)
    assert torch.equal(first, copy) and close(second, by_hand(model, copy)[-1])


@torch.no_grad()
def test_another_plan_keeps_what_it_captured_between_the_blocks(model):
    x, prefix = rows(model), Prefix(layer=2)
    with Router(model).running(lambda place, x: KEEP[:, place]), capture(model, prefix):
        out = model(x)
    wanted = by_hand(model, x)
    assert close(out, wanted[-1])
    (captured,) = prefix.streams.values()
    assert close(captured, wanted[2])


def test_gradients_need_every_value(model):
    x = rows(model)
    (mine,) = torch.autograd.grad(route(model, x.requires_grad_()).square().sum(), x)
    (wanted,) = torch.autograd.grad(by_hand(model, x)[-1].square().sum(), x)
    assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", ["hook", "global hook", "wrapper", "loop", "slice", "mode"])
def test_whoever_looks_between_the_blocks_keeps_what_was_seen(model, way):
    x, wanted, seen = rows(model), None, []
    wanted = by_hand(model, x)
    blocks = list(model.layers)[1:]

    def note(module, args, out):
        if type(module) is Block:
            seen.append(out)

    with Router(model).running(lambda place, x: KEEP[:, place]):
        if way == "hook":
            handles = [block.register_forward_hook(note) for block in blocks]
        elif way == "global hook":
            handles = [torch.nn.modules.module.register_module_forward_hook(note)]
        elif way == "wrapper":
            for block in blocks:
                block.forward = noting(block.forward, seen)
            handles = []
        if way == "loop":
            seen.append(model.layers[0](x))
            for block in blocks:
                seen.append(block(seen[-1]))
            del seen[0]
        elif way == "slice":
            seen = [model.layers[: place + 2](x) for place in range(4)]
        elif way == "mode":
            with Noting(seen):
                model(x)
        else:
            model(x)
            for handle in handles:
                handle.remove()
    if way == "mode":
        assert any(close(value, wanted[1]) for value in seen if value.shape == x.shape)
        return
    assert len(seen) == 4
    for mine, theirs in zip(seen, wanted[1:], strict=True):
        assert close(mine, theirs)
    for block in blocks:
        block.__dict__.pop("forward", None)


def noting(forward, seen):
    def noted(x):
        seen.append(forward(x))
        return seen[-1]

    noted.__wrapped__ = forward
    return noted


class Noting(torch.overrides.TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append(out)
        return out


@torch.no_grad()
def test_a_block_that_keeps_or_returns_its_input_keeps_it(model):
    x, kept = rows(model), []

    def keeps(value):
        kept.append((value, value.clone()))
        return value

    model.layers[3].forward = keeps
    wide = KEEP.clone()
    wide[:, 2] = True  # it gets the batch itself
    out = route(model, x, lambda place, x: wide[:, place])
    (value, copy) = kept[0]
    assert torch.equal(value, copy) and not torch.equal(out, value)


@torch.no_grad()
def test_another_plan_sees_every_value(model):
    x = rows(model)
    assert [block.name for block in find_blocks(model)] == [f"layers.{place}" for place in range(1, 5)]
    with Skipper(model, SkipPlan([1])), Router(model).running(lambda place, x: KEEP[:, place]):
        both = model(x)
    without = Stacked(x.shape[1]).eval()
    without.load_state_dict(model.state_dict())
    without.layers[2] = nn.Identity()
    value = without.layers[0](x)
    for place in (0, 2, 3):
        value = torch.where(KEEP[:, place, None], without.layers[place + 1](value), value)
    assert close(both, value)


def test_chains_of_networks_that_people_use():
    def found(model):
        blocks = [block.module for block in find_blocks(model)]
        names = {module: name for name, module in model.named_modules()}
        return {names[chain]: len(inside) for chain, inside in find_sequentials(model, blocks).items()}

    with torch.device("meta"):
        assert found(models.resnet50()) == {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
        assert found(timm.create_model("resnet34")) == {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
    a, b, c = (nn.Linear(2, 2) for _ in range(3))
    assert not find_sequentials(nn.Sequential(a, b, c), [a, b]), "the last is no block, and may keep what it is given"
    assert not find_sequentials(nn.Sequential(a, a), [a]), "one block, twice"
    assert not find_sequentials(nn.ModuleList([a, b]), [a, b])

    class Recording(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    assert not find_sequentials(Recording(a, b), [a, b])
