"""Layer masking: what masks are made of, against torch's own poolings, and which are none."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.errors import SkipError
from skipguide.vision import LayerMask
from skipguide.vision.layer_masking.fill import fill, fill_frame, fill_weights
from skipguide.vision.layer_masking.masks import grow, rectangle_of, windows
from zoo import masking

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
