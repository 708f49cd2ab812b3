"""Layer masking: painted baselines, under one interface with the other fills."""

import pytest
import torch
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision import LayerMask, masked_forward
from skipguide.vision.layer_masking import BASELINES, FILLS
from zoo import masking
from zoo.masking import close

model, images, keep = masking.model, masking.images, masking.keep


@torch.no_grad()
def test_baselines_paint_hidden_pixels(model, images, keep):
    scale = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for fill_ in BASELINES:
        out = masked_forward(model, fill_, scale=scale)(keep, images)
        assert out.shape == (3, 5) and bool(torch.isfinite(out).all())
    close(masked_forward(model, "grey")(keep, images), model(images * keep))
    close(masked_forward(model, "black", scale=scale)(keep, images), model(torch.where(keep, images, -2.0)))
    mean = (images * keep).sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True)
    close(masked_forward(model, "mean")(keep, images), model(torch.where(keep, images, mean)))
    for fill_ in ("black", "grey", "mean", "noise"):
        forward = masked_forward(model, fill_)
        assert torch.equal(forward(keep, images), forward(keep, images.masked_fill(~keep, 9.0))), fill_
    blur = masked_forward(model, "blur")  # sees hidden pixels, and says so
    assert not torch.equal(blur(keep, images), blur(keep, images.masked_fill(~keep, 9.0)))


def test_paints_of_other_channels_name_what_they_need(keep):
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(2, 1, 64, 64)
    with LayerMask(keep[:1], "black").apply(grey), pytest.raises(SkipError, match=r"masked_forward\(\.\.\., scale="):
        grey(x)
    assert masked_forward(grey, "black", scale=((0.5,), (0.5,)))(keep[:1], x).isfinite().all()


def test_every_fill_is_under_one_interface(model, images, keep):
    with torch.no_grad():
        answers = {name: masked_forward(model, name)(keep, images) for name in FILLS}
    assert len({tuple(a.flatten().tolist()) for a in answers.values()}) == len(FILLS) == 8
