"""A forward that keeps state between calls, as TeaCache is published: put in place of the model's own."""

import types

from torch import nn


class _Residual(nn.Module):
    """Stands for all blocks: adds what they added the last time."""

    def __init__(self, state, returns):
        super().__init__()
        self.state, self.returns = state, returns

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        hidden_states = hidden_states + self.state["residual"]
        return hidden_states if self.returns == 1 else (encoder_hidden_states, hidden_states)


class _Pass(_Residual):
    """Stands for the blocks of a first stack, whose share is in the residual of the last one."""

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        return encoder_hidden_states, hidden_states


def keep_state(model, stacks, threshold=0.2):
    """Make a model answer from its last call where its input has changed little since the blocks last ran.

    Returns:
        what it keeps, with the number of calls and of those that it answered.
    """
    state = {"calls": 0, "answered": 0, "before": None, "residual": None, "moved": 0.0}
    joint = len(stacks) > 1
    first, last = getattr(model, stacks[0])[0], getattr(model, stacks[-1])[-1]

    def hidden(out):
        return out[1] if joint else out

    def entered(module, args, kwargs):
        state["entered"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def left(module, args, kwargs, out):
        state["residual"] = hidden(out) - state["entered"]

    first.register_forward_pre_hook(entered, with_kwargs=True)
    last.register_forward_hook(left, with_kwargs=True)
    original = model.forward

    def forward(self, hidden_states, *args, **kwargs):
        state["calls"] += 1
        before, state["before"] = state["before"], hidden_states
        if before is not None:
            state["moved"] += float((hidden_states[:1] - before[:1]).abs().mean() / before[:1].abs().mean())
        if before is None or state["moved"] > threshold:
            state["moved"] = 0.0
            return original(hidden_states, *args, **kwargs)
        state["answered"] += 1
        blocks = {name: getattr(self, name) for name in stacks}
        for name in stacks[:-1]:
            setattr(self, name, nn.ModuleList([_Pass(state, 2)]))
        setattr(self, stacks[-1], nn.ModuleList([_Residual(state, 2 if joint else 1)]))
        try:
            return original(hidden_states, *args, **kwargs)
        finally:
            for name, own in blocks.items():
                setattr(self, name, own)

    model.forward = types.MethodType(forward, model)
    return state


def forget(model):
    """Take the forward off again."""
    del model.forward
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
