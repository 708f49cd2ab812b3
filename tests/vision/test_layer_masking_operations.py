"""Layer masking: functions, and rows that a forward gathers, joins and takes apart, carry their masks."""

import torch
import torch.nn.functional as F
from torch import nn

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
