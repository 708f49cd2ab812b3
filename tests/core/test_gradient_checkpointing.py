"""Gradient checkpointing: what is run again in the backward pass follows the plan of its forward pass."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skipguide import BlockSpec, Skipper, SkipPlan, register_blocks
from skipguide.active import active_plans


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Checkpointed(nn.Module):
    """Layers, each in a checkpoint, two by two, or in none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.how = None

    def forward(self, x):
        if self.how in (True, False):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=self.how)
            return x
        for layer in self.layers:
            x = layer(x)
        return x


register_blocks(Checkpointed, BlockSpec("layers", streams=("x",)))
PLANS = {"block": SkipPlan([1, 2]), "rows": SkipPlan([1], rows=[0]) | SkipPlan([3]), "empty": SkipPlan()}


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a, b):
    for mine, other in zip(a, b, strict=True):
        zero = torch.zeros(()) if mine is None or other is None else None
        if zero is not None:
            assert all(g is None or not g.any() for g in (mine, other))
        else:
            torch.testing.assert_close(mine, other)


def backward_in(where, loss):
    if where == "thread":
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join(60)
    else:
        loss.backward()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("where", ["inside", "outside", "thread", "other_plan"])
@pytest.mark.parametrize("how", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "model"])
def test_gradients_are_those_without_checkpoints(how, where, plan, whole):
    model = Checkpointed()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with Skipper(model, plan):
        model(x).square().sum().backward()
    wanted = gradients(model)
    model.zero_grad(set_to_none=True)
    model.how = None if whole else how
    with Skipper(model, plan) as skipper:
        out = checkpoint(model, x, use_reentrant=how) if whole else model(x)
        loss = out.square().sum()
        if where == "inside":
            loss.backward()
    if where == "other_plan":
        with Skipper(model, SkipPlan([0])):
            loss.backward()
    elif where != "inside":
        backward_in(where, loss)
    same(gradients(model), wanted)
    assert skipper.stats.passes == 1 and sum(skipper.stats.calls.values()) + sum(skipper.stats.skips.values()) >= 4
    assert active_plans() == () and all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("how", [True, False], ids=["reentrant", "hooks"])
def test_transformers_checkpoint_their_layers_and_sublayer_plans_are_followed(how):
    from transformers import LlamaConfig, LlamaForCausalLM

    from skipguide.llm import SublayerPlan

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).train()
    ids = torch.arange(5)[None]
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            newer = hasattr(model, "activation_checkpointing_enable")
            name = "activation_checkpointing_enable" if newer else "gradient_checkpointing_enable"
            getattr(model, name)({"use_reentrant": how})
            if how:
                model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        with SublayerPlan(attn=[1], mlp=[2]).apply(model):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append(gradients(model))
    same(*found)
