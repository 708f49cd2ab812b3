"""Layer masking: windows at the edge of what is computed, against the rule written out position by position."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skipguide import SkipError
from skipguide.vision import masked_forward


class Padded(nn.Module):
    """A convolution with a padding of its own, as TensorFlow's "same", then the mean of the positions."""

    def __init__(self, kernel, dilation, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, kernel, stride, dilation=dilation)
        total = (kernel - 1) * dilation
        self.pads = (total // 2 - 1, total - total // 2 + 1, total // 2, total - total // 2)

    def forward(self, x):
        return self.conv(F.pad(x, self.pads)).mean((2, 3))


def filled(x, keep, rounds):
    """Hidden positions become the mean of the known ones around them, ring by ring."""
    known = keep.to(x)
    x = x * known
    for _ in range(rounds):
        sums, count = (9 * F.avg_pool2d(v, 3, 1, 1) for v in (x, known))
        x = x + (1 - known) * sums / (count + 1e-5)
        known = (count > 0.5).to(x)
    return x


def seen(keep, pads, conv):
    window = torch.ones(1, 1, *conv.kernel_size, dtype=conv.weight.dtype)
    padded = F.pad(keep.to(window), pads)
    return F.conv2d(padded, window, None, conv.stride, 0, conv.dilation) > 0.5


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(3, 3, 1), (3, 2, 2), (4, 2, 1)])
@torch.no_grad()
def test_a_dilated_convolution_after_a_padding_of_its_own(kernel, dilation, stride, crop):
    torch.manual_seed(0)
    model, x = Padded(kernel, dilation, stride).double(), torch.randn(2, 3, 20, 26).double()
    keep = torch.zeros(1, 1, 20, 26, dtype=torch.bool)
    keep[..., 6:13, 5:17] = True
    after = seen(keep, model.pads, model.conv)
    values = model.conv(F.pad(filled(x, keep, (kernel - 1) * dilation), model.pads)) * after
    forward = masked_forward(model, crop=crop)
    for _ in range(2):
        torch.testing.assert_close(forward(keep, x), values.sum((2, 3)) / after.sum(), rtol=1e-5, atol=1e-6)


def test_a_dilation_that_no_module_names_is_refused():
    class Bare(Padded):
        def forward(self, x):
            return F.conv2d(F.pad(x, (4, 4, 4, 4)), self.conv.weight, dilation=4).mean((2, 3))

    keep = torch.zeros(1, 1, 20, 20)
    keep[..., 5:9, 5:9] = 1
    with pytest.raises(SkipError, match="dilation"):
        masked_forward(Bare(3, 1))(keep, torch.randn(1, 3, 20, 20))


class Pools(nn.Module):
    """Poolings whose last windows reach over the edge, on values of both signs."""

    def __init__(self, pools):
        super().__init__()
        self.pools = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), *pools)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.pools(x).mean((2, 3)))


AVERAGES = [
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(2, 2, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
]


@pytest.mark.parametrize("first", AVERAGES, ids=str)
@pytest.mark.parametrize("second", AVERAGES, ids=str)
@torch.no_grad()
def test_averages_are_the_same_when_only_a_part_is_computed(first, second):
    """A pooling of a cut-out input divides by its whole window, and its last window is cut off by the edge."""
    torch.manual_seed(0)
    model, x = Pools([first, second]).double().eval(), torch.randn(3, 3, 24, 25).double()
    for _ in range(8):
        keep = torch.zeros(3, 24, 25, dtype=torch.bool)
        for row in range(3):
            top, left = torch.randint(16, (2,)).tolist()
            keep[row, top : top + 6, left : left + 6] = True
        cut, uncut = masked_forward(model), masked_forward(model, crop=False)
        for _ in range(2):
            torch.testing.assert_close(cut(keep, x), uncut(keep, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_nothing_visible_is_the_bias_after_a_maximum_of_both_signs(dtype):
    torch.manual_seed(0)
    model = Pools([nn.MaxPool2d(2, 2, 1, dilation=2), nn.Conv2d(4, 4, 3, padding=1)]).to(dtype).eval()
    model.pools[-1].weight *= 100  # of what is lower than any maximum, the next convolution would make infinity
    forward = masked_forward(model)
    for _ in range(2):
        found = forward(torch.zeros(1, 20, 33), torch.randn(3, 3, 20, 33, dtype=dtype))
        assert torch.equal(found, model.fc.bias.expand(3, -1))
