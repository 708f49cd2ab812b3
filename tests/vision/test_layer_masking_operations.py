"""Layer masking: functions and gathered rows carry their masks; windows against the rule written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skipguide import SkipError
from skipguide.vision import LayerMask, masked_forward
from zoo import masking

images, keep = masking.images, masking.keep


class Functional(nn.Module):
    """Adds, concatenations and pools as functions, in several spellings."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, dilation=2, padding=2)
        self.c, self.fc = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2), nn.Linear(16, 3)

    def forward(self, x):
        x = torch.nn.functional.silu(self.a(x))
        y = torch.cat((x, x + self.b(x)), dim=1)
        y = F.pad(y, (1, 0, 1, 0))
        y = F.max_pool2d(y, 2, ceil_mode=True)
        u, v = torch.split(self.c(y), 4, 1)
        y = torch.cat([u * torch.sigmoid(v.mean((2, 3), keepdim=True)), v], 1)
        y = F.avg_pool2d(y, 3, 2, 1)
        return self.fc(torch.cat((y.mean(dim=(-1, -2)), torch.flatten(F.adaptive_max_pool2d(y, 1), 1)), 1))


class Rows(nn.Module):
    """A stem for every row and a block for some of them; `dense` gives the same without taking rows apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)


def check_rows(model, images, masks):
    """Under masks, rows give what the dense form gives, also with a plan; what is hidden has no influence."""
    with LayerMask(masks).apply(model.eval()) as applied:
        for _ in range(2):
            torch.testing.assert_close(model(images), model(images, dense=True), rtol=1e-5, atol=1e-6)
        assert torch.equal(model(images), model(images.masked_fill(~masks, float("nan"))))
    return applied.stats


@torch.no_grad()
def test_functions_are_seen_too(images, keep):
    torch.manual_seed(0)
    model = Functional().eval()
    forward, uncut = masked_forward(model), masked_forward(model, crop=False)
    first = forward(keep, images)
    assert torch.equal(first, forward(keep, images.masked_fill(~keep, float("nan"))))
    torch.testing.assert_close(uncut(keep, images), first, rtol=1e-5, atol=1e-6)
    small = keep[2:]
    torch.testing.assert_close(forward(small, images), uncut(small, images), rtol=1e-5, atol=1e-6)
    assert forward.stats.computed < 0.5
    assert torch.equal(forward(torch.ones(1, 64, 64), images), model(images))


@torch.no_grad()
def test_a_model_that_decides_by_value(images, keep):
    """Rows gathered and scattered again carry their masks; such a model gets no plan, and is exact."""

    class ByValue(Rows):
        def forward(self, x, dense=False):
            x = F.relu(self.stem(x))
            run = x.mean((1, 2, 3)) > x.mean((1, 2, 3)).median()
            if dense:
                return torch.where(run.view(-1, 1, 1, 1), F.relu(x + self.block(x)), x).mean((2, 3))
            rows = run.nonzero()[:, 0]
            if len(rows):
                out = x.clone()
                if len(rows) % 2:
                    x = out.index_copy(0, rows, F.relu(x[rows] + self.block(x.index_select(0, rows))))
                else:
                    out[rows] = F.relu(x[rows] + self.block(x[rows]))
                    x = out
            return x.mean((2, 3))

    model = ByValue()
    for some, masks in ((images, keep), (images[[0, 1, 2, 0, 1]], keep[[0, 1, 2, 1, 0]])):
        assert check_rows(model, some, masks).planned <= 2  # at most the dense form


@torch.no_grad()
def test_rows_put_side_by_side_keep_their_masks(images, keep):
    """`cat` of rows, as a network with several heads or a router writes it."""

    class Joined(Rows):
        def forward(self, x, dense=False):
            x = F.relu(self.stem(x))
            runs = torch.tensor([True, False, True]).view(-1, 1, 1, 1)
            if dense:
                return torch.where(runs, F.relu(x + self.block(x)), x).mean((2, 3))
            ran = torch.cat([x[:1], x[2:]])
            ran = F.relu(ran + self.block(ran))
            return torch.cat([ran[:1], x[1:2], ran[1:]]).mean((2, 3))

    model = Joined()
    for masks in (keep, keep[:1]):
        check_rows(model, images, masks)


@torch.no_grad()
def test_rows_taken_apart_keep_their_masks(images, keep):
    class Apart(Rows):
        def forward(self, x, dense=False):
            x = F.relu(self.stem(x))
            runs = torch.tensor([True, False, True]).view(-1, 1, 1, 1)
            if dense:
                x = torch.where(runs, F.relu(self.block(x)), x)
            else:
                first, rest, last = x.split_with_sizes([1, 1, 1])
                ran = F.relu(self.block(torch.cat([first, last]))).split(1)
                x = torch.cat([ran[0], rest, ran[1]])
            return self.block(x).mean((2, 3))

    model = Apart()
    for masks in (keep, keep[:1]):
        check_rows(model, images, masks)


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
