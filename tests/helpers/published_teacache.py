"""TeaCache as its authors publish it: a forward for the model's class, and its state in attributes there.

What counts for guidance is as in the published scripts (ali-vilab/TeaCache): which attributes there are, that they are
set on the class and then written on the instance, when a step is answered, and that no block runs then. How far a step
is from the last is taken from the model's input here, and all other work is left to the stock forward.
"""

import torch
from diffusers import LTXVideoTransformer3DModel
from helpers.stateful_forward import _Residual

STOCK = LTXVideoTransformer3DModel.forward
STATE = {
    "cnt": 0,
    "accumulated_rel_l1_distance": 0,
    "previous_modulated_input": None,
    "previous_residual": None,
}


def teacache_forward(self, hidden_states, *args, **kwargs):
    computes = True
    if self.enable_teacache:
        if self.cnt == 0 or self.cnt == self.num_steps - 1:
            self.accumulated_rel_l1_distance = 0
        else:
            before = self.previous_modulated_input
            self.accumulated_rel_l1_distance += ((hidden_states - before).abs().mean() / before.abs().mean()).item()
            computes = self.accumulated_rel_l1_distance >= self.rel_l1_thresh
            if computes:
                self.accumulated_rel_l1_distance = 0
        self.previous_modulated_input = hidden_states
        self.cnt = 0 if self.cnt + 1 == self.num_steps else self.cnt + 1
    return _computed(self, hidden_states, args, kwargs) if computes else _answered(self, hidden_states, args, kwargs)


def _answered(model, hidden_states, args, kwargs):
    blocks = model.transformer_blocks
    model.transformer_blocks = torch.nn.ModuleList([_Residual({"residual": model.previous_residual}, 1)])
    try:
        return STOCK(model, hidden_states, *args, **kwargs)
    finally:
        model.transformer_blocks = blocks


def _computed(model, hidden_states, args, kwargs):
    entered = []

    def enter(module, args, kwargs):
        entered.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def leave(module, args, kwargs, out):
        model.previous_residual = out - entered[0]

    first, last = model.transformer_blocks[0], model.transformer_blocks[-1]
    hooks = [
        first.register_forward_pre_hook(enter, with_kwargs=True),
        last.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        return STOCK(model, hidden_states, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def publish(monkeypatch, threshold, steps, **more):
    """Put it on the class of LTX-Video's model, as the script does, until the test is over."""
    values = {"enable_teacache": True, "num_steps": steps, "rel_l1_thresh": threshold, **STATE, **more}
    for name, value in values.items():
        monkeypatch.setattr(LTXVideoTransformer3DModel, name, value, raising=False)
    monkeypatch.setattr(LTXVideoTransformer3DModel, "forward", teacache_forward)
