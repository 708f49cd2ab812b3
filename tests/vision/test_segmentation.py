"""Segmentation: losses on paper, meters over a whole set, tiles without a seam, masks as pictures."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_unetpp import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import (
    ClassMeter,
    MaskMeter,
    bce_dice_loss,
    deep_supervision_loss,
    inside_of,
    overlay,
    predict_tiled,
)


def test_loss_on_paper():
    logits = torch.zeros(2, 1, 2, 2)
    target = torch.tensor([[[[1.0, 1], [0, 0]]], [[[0.0, 0], [0, 0]]]])
    # chance 1/2 everywhere: Dice is 2*1/(2+2) and (nearly) 0/(2+0)
    expected = 0.5 * math.log(2) + 1 - (0.5 + 0.0) / 2
    assert bce_dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-5)
    heads = [logits, logits + 1]
    one, two = (bce_dice_loss(head, target) for head in heads)
    torch.testing.assert_close(deep_supervision_loss(heads, target), (one + two) / 2)
    torch.testing.assert_close(deep_supervision_loss(heads, target, weights=(3, 1)), (3 * one + two) / 4)
    torch.testing.assert_close(deep_supervision_loss(logits, target), one)
    for weights in ((1,), (0, 0), (-1, 2)):
        with pytest.raises(SkipError, match="weight"):
            deep_supervision_loss(heads, target, weights=weights)
    with pytest.raises(SkipError, match="shape"):
        bce_dice_loss(logits, target[:1])


def test_the_loss_of_large_masks_in_low_precision():
    logits, target = torch.full((1, 1, 300, 300), 4.0), torch.zeros(1, 1, 300, 300)
    target[..., :150] = 1  # 90 000 pixels: more than float16 holds
    expected = bce_dice_loss(logits, target)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(bce_dice_loss(logits.to(dtype), target), expected)


def test_meters_count_over_the_set():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3, 5, 7), torch.rand(6, 3, 5, 7) > 0.6
    whole, parts = MaskMeter(3), MaskMeter(3)
    whole.update(logits, target)
    for at in (slice(0, 1), slice(1, 6)):
        parts.update(logits[at], target[at])
    assert torch.equal(whole.iou, parts.iou)
    found = logits > 0
    for c in range(3):
        both, either = int((found & target)[:, c].sum()), int((found | target)[:, c].sum())
        assert whole.iou[c].item() == pytest.approx(both / either)
        assert whole.dice[c].item() == pytest.approx(2 * both / (both + either))
    with pytest.raises(SkipError, match="NaN"):
        whole.update(logits * float("nan"), target)
    with pytest.raises(SkipError, match="expected logits"):
        whole.update(logits[:, :2], target[:, :2])
    with pytest.raises(SkipError, match="threshold"):
        MaskMeter(1, threshold=1.5)


def test_class_meter_both_ways():
    truth = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 1, 1]]])
    found = torch.tensor([[[0, 1, 1, 0]], [[1, 1, 2, 1]]])
    meter = ClassMeter(4)
    for row in range(2):
        meter.update(found[row : row + 1], truth[row : row + 1])
    # over the set: class 0 1/2; class 1 4/6; class 2 0/1; class 3 nowhere
    assert meter.mean_iou == pytest.approx((1 / 2 + 4 / 6 + 0) / 3)
    # per batch: (1/2 + 1/2)/2, then 3/4; class 2 does not occur and is forgiven
    assert meter.challenge_miou == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert meter.accuracy == pytest.approx(5 / 7)
    logits = F.one_hot(found, 4).permute(0, 3, 1, 2).float()
    again = ClassMeter(4)
    again.update(logits, truth)
    assert torch.equal(again.confusion, meter.confusion)
    assert again.challenge_miou != pytest.approx(meter.challenge_miou), "that measure depends on the batch size"
    with pytest.raises(SkipError, match=r"expected classes 0\.\.3"):
        meter.update(torch.tensor([4]), torch.tensor([0]))
    with pytest.raises(SkipError, match="shape"):
        meter.update(found[0], truth)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 8), st.integers(1, 5))
def test_tiles_join_without_a_seam(height, width, tile, overlap, batch):
    images = torch.rand(2, 3, height, width)
    overlap = min(overlap, tile // 2)
    found = predict_tiled(lambda x: x.mean(1, keepdim=True), images, tile=tile, overlap=overlap, batch=batch)
    torch.testing.assert_close(found, images.mean(1, keepdim=True))


@torch.no_grad()
def test_tiles_of_bytes_and_of_low_precision():
    bytes_ = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8)
    found = predict_tiled(lambda x: x.float() / 255, bytes_, tile=16, overlap=4)
    torch.testing.assert_close(found, bytes_.float() / 255)
    assert predict_tiled(lambda x: x.bfloat16(), bytes_, tile=16, overlap=4).dtype == torch.bfloat16
    with pytest.raises(SkipError, match=r"images \[N, C, H, W\]"):
        predict_tiled(lambda x: x, bytes_[0], tile=16, overlap=4)


def test_tiles_of_a_model():
    model = UNetPlusPlus(**TINY).eval()
    images = torch.rand(1, 3, 60, 45)
    assert torch.equal(predict_tiled(lambda x: model(x, head=1), images, tile=64, overlap=8), model(images, head=1))
    # of smaller tiles the shape alone: upsampling with aligned corners goes by the size of what it gets
    tiled = predict_tiled(lambda x: model(x, head=1), images, tile=40, overlap=20)
    assert tiled.shape == (1, 1, 60, 45)
    for overlap, tile in ((5, 8), (-1, 8), (0, 0)):
        with pytest.raises(SkipError, match="overlap"):
            predict_tiled(lambda x: x, images, tile=tile, overlap=overlap)
    for broken in (lambda x: x[..., ::2], model):
        with pytest.raises(SkipError, match="expected the model to return"):
            predict_tiled(broken, images, tile=8, overlap=4)


def test_a_mask_of_small_numbers_is_not_an_empty_one():
    square = np.zeros((4, 4), np.uint8)
    square[1:3] = 255
    assert inside_of(Image.fromarray(square)).sum() == 8
    assert inside_of(Image.fromarray(square > 0)).sum() == 8
    assert inside_of(Image.fromarray(0 * square)).sum() == 0
    for small in (square // 255, (square // 255) * 7):
        with pytest.raises(SkipError, match="expected 0 outside and 255 inside"):
            inside_of(Image.fromarray(small))


def test_overlay_paints_the_mask():
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[2:7, 3:9] = True
    picture = overlay(Image.new("L", (12, 9), 100), mask, colour=(200, 0, 0), opacity=0.5)
    assert picture.getpixel((0, 0)) == (100, 100, 100)
    assert picture.getpixel((3, 2)) == (200, 0, 0)
    assert picture.getpixel((5, 4)) == (150, 50, 50)
    with pytest.raises(SkipError, match="9x12"):
        overlay(Image.new("L", (12, 9)), mask.T)


@pytest.mark.parametrize("wrong", [255.0, -1.0, math.nan, 2.0])
def test_targets_out_of_range_have_no_loss_and_no_score(wrong):
    """A perfect prediction of a mask of 0 and 255 has the loss -6351."""
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = wrong
    logits = torch.where(target != 0, 50.0, -50.0)
    with pytest.raises(SkipError, match=r"from 0 .* to 1"):
        bce_dice_loss(logits, target)
    with pytest.raises(SkipError, match="target of 0 and 1"):
        MaskMeter(1).update(logits, target)
    with pytest.raises(SkipError, match="threshold"):
        overlay(Image.new("RGB", (4, 4)), target[0, 0])
    whole = (target != 0).to(torch.uint8)
    assert bce_dice_loss(logits, whole).item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(bce_dice_loss(logits, whole / 2)), "shares are targets too"


def test_nan_is_not_scored_as_the_first_class():
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(SkipError, match="NaN"):
        ClassMeter(3).update(torch.full((1, 3, 4, 4), torch.nan), target)
    with pytest.raises(SkipError, match=r"logits \[N, 3, H, W\]"):
        ClassMeter(3).update(torch.zeros(1, 2, 4, 4), target)
    with pytest.raises(SkipError, match="whole numbers"):
        ClassMeter(3).update(target, torch.full((1, 4, 4), torch.nan))
