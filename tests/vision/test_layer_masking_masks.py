"""Layer masking: what masks are made of, which are none, and painted baselines under the same interface."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skipguide.errors import SkipError
from skipguide.vision import LayerMask, masked_forward
from skipguide.vision.layer_masking import BASELINES, FILLS
from skipguide.vision.layer_masking import fill as filling
from skipguide.vision.layer_masking.fill import fill, fill_frame, fill_weights
from skipguide.vision.layer_masking.masks import grow, rectangle_of, windows
from zoo import masking
from zoo.masking import close

keep = masking.keep


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_windows_of_masks_are_poolings(seed):
    g = torch.Generator().manual_seed(seed)

    def some(low, high, count=2):
        return tuple(int(v) for v in torch.randint(low, high, (count,), generator=g))

    kernel, stride, dilation = some(1, 6), some(1, 4), some(1, 3)
    size = [k * d + e for k, d, e in zip(kernel, dilation, some(0, 9), strict=True)]
    mask = torch.rand(2, 1, *size, generator=g) > 0.7
    wanted = F.max_pool2d(mask.float(), kernel, stride, 0, dilation) > 0
    assert torch.equal(windows(mask, kernel, stride, dilation), wanted)
    by = some(0, 4, 1)[0]
    assert torch.equal(grow(mask, by), F.max_pool2d(mask.float(), 2 * by + 1, 1, by) > 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_a_rectangle_is_filled_from_its_frame(seed):
    g = torch.Generator().manual_seed(seed)
    height, width = (int(v) for v in torch.randint(1, 6, (2,), generator=g))
    pads = [int(v) for v in torch.randint(0, 5, (4,), generator=g)]
    x = torch.randn(2, 3, height, width, generator=g)
    around = (pads[2], pads[3], pads[0], pads[1])
    mask = F.pad(torch.ones(1, 1, height, width, dtype=torch.bool), around)
    seen = (pads[0], pads[0] + height, pads[2], pads[2] + width)
    assert rectangle_of(mask) == seen
    weights = fill_weights(mask, 3)
    torch.testing.assert_close(fill_frame(x, pads, weights), fill(F.pad(x, around), weights), rtol=1e-5, atol=1e-6)
    holed = mask.clone()
    holed[..., seen[0] + height // 2, seen[2] + width // 2] = False
    if height > 2 and width > 2:
        assert rectangle_of(holed) is None
    assert rectangle_of(torch.zeros_like(mask)) is None


def test_settings_round_trip(keep):
    mask = LayerMask(keep, "zeros", crop=False)
    assert LayerMask.from_dict(mask.to_dict()) == mask
    odd = LayerMask(torch.rand(2, 5, 7) > 0.5)
    assert LayerMask.from_dict(odd.to_dict()) == odd and odd != mask
    with pytest.raises(SkipError, match="unknown keys"):
        LayerMask.from_dict(mask.to_dict() | {"more": 1})
    damaged = [{"keep": "AAAA"}, {"keep": "%"}, {"keep": None}, {"shape": "abc"}, {"shape": [1, 1, 9, 9]}]
    for change in damaged:
        with pytest.raises(SkipError, match="it is damaged"):
            LayerMask.from_dict(mask.to_dict() | change)
    with pytest.raises(SkipError, match="it is damaged"):
        LayerMask.from_dict({k: v for k, v in mask.to_dict().items() if k != "fill"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_mask_on_cuda_equals_the_one_that_is_read_back(keep):
    mask = LayerMask(keep.cuda())
    assert LayerMask.from_dict(mask.to_dict()) == mask == LayerMask(keep)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.rand(1, 64, 64), "soft mask"),
        (255 * torch.eye(64, dtype=torch.uint8)[None], r"from 0 to 255\): threshold it \(keep > 127.5\)"),
        (torch.ones(1, 64, 64), "keep.bool"),
        (torch.ones(1, 64, 64, dtype=torch.uint8), "keep.bool"),
        (torch.ones(64, 64, dtype=torch.bool), "shape"),
        (torch.ones(1, 3, 64, 64, dtype=torch.bool), "shape"),
        (torch.ones(0, 64, 64, dtype=torch.bool), "shape"),
        ([[True]], "pass a tensor"),
        (None, "pass a tensor"),
    ],
)
def test_masks_that_are_none(mask, words):
    with pytest.raises(SkipError, match=words):
        LayerMask(mask)


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


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 70, 56, 56), (1, 1, 1, 4), (2, 3, 5, 2), (1, 2, 4, 1)])
@pytest.mark.parametrize("rows", [1, 2])
def test_filling_part_by_part_is_filling(shape, rows, monkeypatch):
    """A large activation goes through the cache in parts, which changes nothing; hidden values are not read."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    mask = torch.rand(rows if shape[0] > 1 else 1, 1, *shape[2:], generator=g) > 0.6
    for rounds in (1, 2, 3):
        weights = [w.float() for w in filling.fill_weights(mask, rounds)]
        expected = filling._fill_whole(x * mask, weights)
        for part in (2**20, 3000):
            monkeypatch.setattr(filling, "PART", part)
            found = filling.fill(x, weights, mask.float())
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(filling.fill(x + 7 * ~mask, weights, mask.float()), found)
            turned = (x * mask).transpose(2, 3).contiguous().transpose(2, 3)
            torch.testing.assert_close(filling.fill(turned, weights), expected, atol=1e-5, rtol=1e-5)
            learning = x.clone().requires_grad_()
            filled = filling.fill(learning, weights, mask.float())
            torch.testing.assert_close(filled, expected, atol=1e-5, rtol=1e-5)
            (grad,) = torch.autograd.grad(filled.sum(), learning)
            assert torch.equal(grad, mask.float().expand(shape).contiguous()), "through what is visible only"


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 2, 2), (5, 1, "same")])
@torch.no_grad()
def test_depthwise_convolutions_of_filled_parts_are_those_of_the_whole(kernel, stride, padding, monkeypatch):
    torch.manual_seed(0)
    middle = nn.Conv2d(40, 40, kernel, stride, padding, groups=40)
    model = nn.Sequential(nn.Conv2d(3, 40, 1), nn.ReLU6(), middle, nn.ReLU(), nn.Conv2d(40, 4, 1)).eval()
    images = torch.randn(2, 3, 24, 30)
    cells = torch.rand(2, 1, 4, 5) > 0.5
    box = torch.zeros(1, 1, 24, 30, dtype=torch.bool)
    box[..., 4:13, 9:20] = True
    for keep in (cells.repeat_interleave(6, 2).repeat_interleave(6, 3), box, ~box):
        for crop in (True, False):
            forward = masked_forward(model, crop=crop)
            expected = forward(keep, images)
            with monkeypatch.context() as patch:
                patch.setattr(filling, "PART", 3000)
                found = forward(keep, images)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
                assert torch.equal(forward(keep, images.masked_fill(~keep, 9.0)), found)
