"""Masks of segmentation: read from a picture, and painted over one."""

import numpy as np
import pytest
import torch
from PIL import Image

from skipguide.errors import SkipError
from skipguide.vision.segmentation import inside_of, overlay


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
