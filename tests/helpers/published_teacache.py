"""TeaCache as its authors publish it: a forward for the model's class, and its state in attributes there.

What counts for guidance is as in the published scripts (ali-vilab/TeaCache): which attributes there are, that they are
set on the class and then written on the instance, when a step is answered, and that no block runs then. How far a step
is from the last is taken from the model's input here, and all other work is left to the stock forward.
"""

import torch
from diffusers import CogVideoXTransformer3DModel, FluxTransformer2DModel, LTXVideoTransformer3DModel

# class -> the lists of blocks, and which of a block's results is the video's and which the text's
MODELS = {
    LTXVideoTransformer3DModel: (("transformer_blocks",), None, None),
    FluxTransformer2DModel: (("transformer_blocks", "single_transformer_blocks"), 1, 0),
    CogVideoXTransformer3DModel: (("transformer_blocks",), 0, 1),
}
STOCK = {model: model.forward for model in MODELS}
STATE = {
    "cnt": 0,
    "accumulated_rel_l1_distance": 0,
    "previous_modulated_input": None,
    "previous_residual": None,
}
TEXT_STATE = {"previous_residual_encoder": None}  # of CogVideoX only


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


class _Residuals(torch.nn.Module):
    """Stands for all blocks: adds what they added the last time."""

    def __init__(self, model):
        super().__init__()
        _, self.video, self.text = MODELS[type(model)]
        self.moved = model.previous_residual, getattr(model, "previous_residual_encoder", None)

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        moved, moved_text = self.moved
        hidden_states = hidden_states + moved
        if self.video is None:
            return hidden_states
        if moved_text is not None:
            encoder_hidden_states = encoder_hidden_states + moved_text
        out = {self.video: hidden_states, self.text: encoder_hidden_states}
        return out[0], out[1]


def _answered(model, hidden_states, args, kwargs):
    names = MODELS[type(model)][0]
    blocks = {name: getattr(model, name) for name in names}
    try:
        for name in names:
            setattr(model, name, torch.nn.ModuleList([_Residuals(model)] if name == names[0] else []))
        return STOCK[type(model)](model, hidden_states, *args, **kwargs)
    finally:
        for name, own in blocks.items():
            setattr(model, name, own)


def _computed(model, hidden_states, args, kwargs):
    names, video, text = MODELS[type(model)]
    entered = []

    def enter(module, args, kwargs):
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        entered.extend((given["hidden_states"], given.get("encoder_hidden_states")))

    def leave(module, args, kwargs, out):
        model.previous_residual = (out if video is None else out[video]) - entered[0]
        if hasattr(model, "previous_residual_encoder"):
            model.previous_residual_encoder = out[text] - entered[1]

    first, last = getattr(model, names[0])[0], getattr(model, names[-1])[-1]
    hooks = [
        first.register_forward_pre_hook(enter, with_kwargs=True),
        last.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        return STOCK[type(model)](model, hidden_states, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def publish(monkeypatch, threshold, steps, model=LTXVideoTransformer3DModel, **more):
    """Put it on a model's class, as the script does, until the test is over."""
    state = STATE | (TEXT_STATE if model is CogVideoXTransformer3DModel else {})
    values = {"enable_teacache": True, "num_steps": steps, "rel_l1_thresh": threshold, **state, **more}
    for name, value in values.items():
        monkeypatch.setattr(model, name, value, raising=False)
    monkeypatch.setattr(model, "forward", teacache_forward)
