"""Wrong settings and input of UNet++ are refused and named."""

import pytest
import torch
from helpers.tiny_unetpp import TINY

from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus


def test_bad_input():
    model = UNetPlusPlus(**TINY).eval()
    good = torch.rand(1, 3, 16, 16)
    with pytest.raises(SkipError, match=r"\[N, 3, H, W\]; got \(1, 4, 16, 16\)"):
        model(torch.rand(1, 4, 16, 16))
    with pytest.raises(SkipError, match="got list"):
        model([good])
    with pytest.raises(SkipError, match="floats"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    bad = good.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(SkipError, match="NaN"):
        model(bad)
    for head in (0, 4, "max", True, 1.0):
        with pytest.raises(SkipError, match="expected a head out of"):
            model(good, head=head)
    with pytest.raises(SkipError, match="tolerance"):
        model(good, head="adaptive", tolerance=2)
    with pytest.raises(SkipError, match="eval"):
        UNetPlusPlus(**TINY)(good, head="adaptive")
    single = UNetPlusPlus(deep_supervision=False, **TINY).eval()
    with torch.no_grad():
        assert single(good).shape == (1, 1, 16, 16)
    for head in (1, "mean", "adaptive"):
        with pytest.raises(SkipError, match="deep_supervision=True"):
            single(good, head=head)
    with pytest.raises(SkipError, match="deep_supervision=True"):
        single.pruned(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "vit_tiny_patch16_224"}, "all have stride 16"),
        ({"encoder": "no_such_model"}, "no usable features"),
        ({"encoder": "resnet10t", "depth": 7}, "expected a depth up to 4"),
        ({"encoder": "vgg11", "full_resolution": True}, "full resolution already"),
        ({"pretrained": True}, "timm encoder"),
        ({"classes": 0}, "classes as a whole number of at least 1"),
        ({"depth": 0}, "at least 1"),
        ({"depth": 6}, "7 widths"),
        ({"in_channels": 0}, "in_channels"),
        ({"widths": (0, 8)}, "widths as a whole number of at least 1"),
        ({"nested": False}, "deep_supervision=False"),
    ],
    ids=str,
)
def test_bad_settings(arguments, message):
    with pytest.raises(SkipError, match=message), torch.device("meta"):
        UNetPlusPlus(**arguments)
