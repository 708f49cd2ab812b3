"""A tiny SkipNet whose gates decide about half of the time to either side."""

import torch

from skipguide.vision import SkipNet

TINY = {"blocks": [2, 2], "widths": [6, 8], "num_classes": 4}


def tiny(gate="rnn", seed=0, **more):
    torch.manual_seed(seed)
    net = SkipNet({**TINY, **more}, gate=gate, image_size=(3, 16, 16)).eval()
    randomise(net)
    return net


def randomise(net):
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5) if "var" in name or name.endswith("weight") else value.normal_(0, 0.3)
        net.gates.sharpen(8.0)
        # about half of the decisions to either side
        logits = net(torch.randn(32, 3, 16, 16), return_routing=True, mode="open").gate_logits
        if net.gate == "rnn":
            net.gates.proj.bias -= logits.median()
        else:
            for gate, middle in zip(net.gates.gates, logits.median(0).values, strict=True):
                gate.head.bias[1] -= middle


def residue(model):
    return [(n, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()]
