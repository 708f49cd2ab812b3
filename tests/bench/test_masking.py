"""Hidden shares of pictures: masks to the pixel, and a classifier whose answers are known."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from skipguide import SkipError
from skipguide.bench.masking import FILLS, OURS, PROTOCOLS, hiding_masks, kept


@pytest.mark.parametrize("size", [(64, 64), (224, 160)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_masks_hide_their_share_and_grow(protocol, size):
    shares = [0.1, 0.25, 0.5, 0.9]
    masks = hiding_masks(protocol, *size, shares, seed=1)
    assert (masks.shape, masks.dtype) == ((4, *size), torch.bool)
    hidden = 1 - masks.float().mean((1, 2))
    assert hidden.tolist() == pytest.approx(shares, abs=0.02)
    assert torch.equal(masks, hiding_masks(protocol, *size, shares, seed=1))
    assert not torch.equal(masks, hiding_masks(protocol, *size, shares, seed=2))
    if protocol == "patches":
        assert all((wider <= narrower).all() for narrower, wider in pairwise(masks))
    else:
        rows, columns = (~masks[1]).any(1), (~masks[1]).any(0)
        assert int(rows.sum()) * int(columns.sum()) == int((~masks[1]).sum()), "one box"


@pytest.mark.parametrize(
    ("protocol", "shares", "expected"),
    [("holes", [0.5], "unknown protocol"), ("boxes", [0.0], "above 0 and below 1"), ("patches", [1.0], "below 1")],
)
def test_masks_that_are_none(protocol, shares, expected):
    with pytest.raises(SkipError, match=expected):
        hiding_masks(protocol, 32, 32, shares, seed=0)


class Brightness(nn.Module):
    """Class 1 for pictures that are bright on average, class 0 for dark ones."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(3, 3, 1, bias=False)
        self.same.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x):
        mean = self.same(x).mean((2, 3)).mean(1)
        return torch.stack([-mean, mean], 1)


def test_black_paint_makes_a_bright_picture_dark_and_layer_masking_does_not():
    scale = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    bright = torch.full((3, 32, 32), 0.5)  # black is -2: with a half hidden the mean is below 0
    found = kept(Brightness().eval(), bright, scale, [0.1, 0.5, 0.9], seeds=2)
    assert found["class"] == 1
    for protocol in PROTOCOLS:
        assert set(found[protocol]) == set(FILLS)
        assert found[protocol]["black"] == [1.0, 0.0, 0.0]
        for fill in (OURS, "mean", "blur"):
            assert found[protocol][fill] == [1.0, 1.0, 1.0], "what is gone has no colour; these paint its own"
