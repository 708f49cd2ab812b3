"""Layer masking's ablation by partial convolution: what a window saw is weighed, its bias is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skipguide.vision import masked_forward


class Biased(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, **settings)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": (0, 2), "groups": 2}])
@pytest.mark.parametrize("crop", [False, True])
@torch.no_grad()
def test_a_bias_is_added_after_the_weighing(settings, crop):
    torch.manual_seed(0)
    model, x = Biased(**settings), torch.randn(2, 4, 16, 20)
    keep = torch.zeros(1, 1, 16, 20, dtype=torch.bool)
    keep[..., 3:9, 4:12] = True
    conv = model.conv
    window = torch.full((1, 1, 3, 3), 1 / 9)
    share = F.conv2d(keep.float(), window, None, conv.stride, conv.padding, conv.dilation)
    known = share > 0
    plain = F.conv2d(x * keep, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    values = (plain / share.clamp_min(1e-9) + conv.bias[:, None, None]) * known
    forward = masked_forward(model, "partial", crop=crop)
    for _ in range(2):
        torch.testing.assert_close(forward(keep, x), values.sum((2, 3)) / known.sum())
