"""SkipNet: bad input is refused and named, and nothing is left."""

import pytest
import timm
import torch
from helpers.tiny_skipnet import TINY, residue, tiny
from torch import nn

from skipguide import SkipError
from skipguide.vision import SkipNet, skipnet
from skipguide.vision.skipnet import RecurrentGates


def test_bad_input_is_refused_and_nothing_is_left():
    net, x = tiny("rnn"), torch.randn(2, 3, 16, 16)
    before, wanted = residue(net), net(x)
    keep = torch.ones(2, 3, dtype=torch.bool)
    cases = [
        (lambda: net(x[0]), "images"),
        (lambda: net(x.long()), "floats"),
        (lambda: net(x[:0]), "images"),
        (lambda: net("x"), "images"),
        (lambda: net(torch.randn(2, 1, 16, 16)), "channels"),
        (lambda: net(x, return_routing=True, mode="soggy"), "unknown mode"),
        (lambda: net(x, return_routing=True, decisions=keep.float()), "bool"),
        (lambda: net(x, return_routing=True, decisions=keep[:, :2]), "shape"),
        (lambda: net(x, return_routing=True, decisions=[True]), "bool"),
        (lambda: net(x * torch.nan), "NaN"),
        (lambda: net.costs((3, 16)), "image size"),
        (lambda: net.gates.sharpen(0), "positive"),
        (lambda: skipnet("resnet38", gate="lstm"), "unknown gate"),
        (lambda: skipnet("resnet38", gate=3), "unknown gate"),
        (lambda: skipnet(net), "name"),
        (lambda: SkipNet(nn.Linear(2, 2)), "not described"),
        (lambda: SkipNet({"blocks": [1], "widths": [4]}), "two residual blocks"),
        (lambda: SkipNet({"blocks": [1, 1], "widths": [4]}), "one of each"),
        (lambda: SkipNet(TINY, pretrained=True), "pretrained"),
        (lambda: SkipNet(TINY, gate="ff1", image_size=(3, 2, 2)), "pixels a side"),
        (lambda: SkipNet(TINY, embed=0), "at least 1"),
        (lambda: SkipNet(TINY, image_size=(4, 16, 16)), "does not take images"),
    ]
    for call, words in cases:
        with pytest.raises(SkipError, match=words):
            call()
    assert residue(net) == before and torch.equal(net(x), wanted)


def test_nan_in_a_gate_is_named():
    net, x = tiny("ff2"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        net.gates.gates[1].head.bias[0] = torch.nan
    with pytest.raises(SkipError, match=r"gates \[1\] gave NaN"):
        net(x)
    net.gates = RecurrentGates(net.gates.channels)
    assert bool(torch.isfinite(net(x)).all())


def test_gates_need_maps():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(SkipError, match='use gate="rnn"'):
        SkipNet(vit, gate="ff1", image_size=(3, 32, 32))
