"""The commands of the vision systems: what they say of files and flags that cannot be meant."""

import pytest
from helpers.tuning import folder
from PIL import Image

from skipguide.cli import main


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    return tmp_path / "bomb.png"


@pytest.mark.parametrize(
    "words",
    [
        ("segment", "{}"),
        ("explain", "{}", "--random-weights"),
        ("clip", "predict", "{}", "--classes", "cat,dog"),
    ],
    ids=lambda words: words[0],
)
def test_a_picture_too_large_to_open_is_one_sentence(words, bomb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([word.format(bomb) for word in words]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert "bomb.png is larger than Pillow opens" in complaint and "reduce it" in complaint


def test_a_folder_with_a_picture_too_large_to_open(tmp_path, capsys, monkeypatch):
    folder(tmp_path / "photos")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert main(["clip", "eval", str(tmp_path / "photos")]) == 2
    assert "larger than Pillow opens" in capsys.readouterr().err


def test_real_pictures_under_the_made_up_model_come_with_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "navy").save("cells.png")
    assert main(["segment", "cells.png", "--device", "cpu"]) == 0
    assert "has seen made-up nuclei only" in capsys.readouterr().err
    assert main(["segment", "--size", "32", "--device", "cpu", "-o", "made-up.png"]) == 0
    assert not capsys.readouterr().err
