"""Tiles join without a seam, of bytes, in low precision and of a model."""

import pytest
import torch
from helpers.tiny_unetpp import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import predict_tiled


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
