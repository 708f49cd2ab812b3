"""What the sheet of `explain` says of its picture: the segments' numbers, and what was cropped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from skipguide.cli import main
from skipguide.vision.layer_masking import grid_segments
from skipguide.vision.layer_masking.classifiers import load_classifier
from skipguide.vision.layer_masking.numbered import number_segments


@pytest.fixture(scope="module")
def tiny():
    return load_classifier("tiny-cnn")


@pytest.mark.parametrize(
    ("size", "resized", "seen"),
    [
        ((640, 480), (224, 299), (80, 0, 560, 480)),  # the middle square
        ((480, 640), (299, 224), (0, 80, 480, 560)),
        ((300, 300), (224, 224), (0, 0, 300, 300)),
        ((64, 64), (64, 64), (0, 0, 64, 64)),
        ((256, 256), (256, 256), (16, 16, 240, 240)),
    ],
)
def test_what_the_model_sees_of_a_picture(tiny, size, resized, seen):
    side = min(224, *resized)
    steps = [v2.Resize(resized), v2.CenterCrop(side), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    classifier = replace(tiny, prepare=v2.Compose([*steps, v2.Normalize(*tiny.scale)]))
    assert max(abs(a - b) for a, b in zip(classifier.seen(size), seen, strict=True)) <= 3


def test_segments_carry_their_numbers():
    segments = grid_segments(64, 64, 4)
    plain = Image.new("RGB", (224, 224), "white")
    drawn = np.asarray(number_segments(plain, segments, first={5}))
    red = (drawn[..., 0] > 150) & (drawn[..., 1] < 120)
    rows, columns = red.nonzero()
    assert red.any() and rows.min() > 56 and rows.max() < 112 and columns.min() > 56 and columns.max() < 112
    dark = (drawn < 90).all(-1).reshape(4, 56, 4, 56).any((1, 3))
    assert dark.sum() == 15 and not dark[1, 1]  # every other number is in its own segment


def test_what_was_cropped_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((96, 64), 80).convert("RGB").save("wide.png")
    Image.effect_noise((64, 64), 80).convert("RGB").save("square.png")
    arguments = ["--model", "resnet18", "--random-weights", "--segments", "grid:2", "--method", "occlusion"]
    assert main(["explain", "wide.png", *arguments]) == 0
    assert "of the 96x64 picture the model sees columns" in capsys.readouterr().out
    assert main(["explain", "square.png"]) == 0
    assert "cropped" not in capsys.readouterr().out
