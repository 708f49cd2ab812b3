"""Losses of segmentation on paper, and of large masks in low precision."""

import math

import pytest
import torch

from skipguide.errors import SkipError
from skipguide.vision.segmentation import bce_dice_loss, deep_supervision_loss


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
