"""A picture that its camera noted as turned is read as people see it, by everything that reads pictures."""

import json

import numpy as np
import pytest
import torch
from helpers.tuning import clip, words
from PIL import Image
from PIL.Image import Exif

from skipguide.cli import main
from skipguide.media.pictures import as_rgb
from skipguide.vision import SkipTuner, UNetPlusPlus
from skipguide.vision.skip_tuning.inputs import read_examples

ORIENTATION = 0x0112
SEEN = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
# how the pixels lie in the file, for what people see
STORED = {
    1: SEEN,
    2: SEEN[:, ::-1],
    3: SEEN[::-1, ::-1],
    4: SEEN[::-1],
    5: SEEN.transpose(1, 0, 2),
    6: np.rot90(SEEN, 1),
    7: SEEN.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(SEEN, -1),
}


def write(path, turned):
    notes = Exif()
    notes[ORIENTATION] = turned
    Image.fromarray(np.ascontiguousarray(STORED[turned])).save(path, exif=notes)
    return path


@pytest.mark.parametrize("turned", STORED)
def test_as_people_see_it(tmp_path, turned):
    with Image.open(write(tmp_path / "photo.png", turned)) as photo:
        once = as_rgb(photo)
    assert np.array_equal(np.asarray(once), SEEN)
    assert np.array_equal(np.asarray(as_rgb(once)), SEEN)


def test_damaged_notes_leave_the_pixels(tmp_path):
    Image.fromarray(SEEN).save(tmp_path / "photo.png", exif=b"Exif\0\0no notes")
    with Image.open(tmp_path / "photo.png") as photo:
        assert np.array_equal(np.asarray(as_rgb(photo)), SEEN)


def test_a_folder_of_photos(tmp_path):
    (tmp_path / "tram").mkdir()
    write(tmp_path / "tram" / "a.png", 6)
    assert np.array_equal(np.asarray(read_examples(tmp_path).load(0)), SEEN)


def test_a_photo_in_memory(tmp_path):
    def pixels(picture):
        return torch.from_numpy(np.array(picture.resize((16, 16)))).permute(2, 0, 1) / 255

    tuner = SkipTuner(clip(), (pixels, words), ["red circle", "blue star"], 1)
    with Image.open(write(tmp_path / "photo.png", 8)) as photo:
        assert tuner.predict(photo) == tuner.predict(Image.fromarray(SEEN))


def test_segment(tmp_path):
    torch.manual_seed(0)
    UNetPlusPlus(widths=(4, 6, 8)).save_pretrained(tmp_path / "net")
    inside = np.zeros((24, 40), np.uint8)
    inside[3:9, 5:30] = 255
    found = []
    for turned in (1, 6):
        write(tmp_path / "photo.png", turned)
        notes = Exif()
        notes[ORIENTATION] = turned
        mask = inside if turned == 1 else np.ascontiguousarray(np.rot90(inside, 1))
        Image.fromarray(mask).save(tmp_path / "truth.png", exif=notes)
        out = tmp_path / f"{turned}.png"
        arguments = ["--truth", tmp_path / "truth.png", "--model", tmp_path / "net", "-o", out]
        assert main(["segment", "--device", "cpu", *map(str, [tmp_path / "photo.png", *arguments])]) == 0
        found.append((json.loads(out.with_name(out.name + ".json").read_text())["results"], Image.open(out)))
    (numbers, picture), (other, turned_picture) = found
    assert all(a["iou"] == b["iou"] for a, b in zip(numbers[0], other[0], strict=True))
    assert np.array_equal(np.asarray(picture), np.asarray(turned_picture))


def test_explain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for turned in (1, 6):
        write(tmp_path / "photo.png", turned)
        command = ["explain", "photo.png", "--samples", "8", "--segments", "grid:2", "-o", f"{turned}.png"]
        assert main(command) == 0
    first, second = (np.asarray(Image.open(f"{turned}.png")) for turned in (1, 6))
    assert np.array_equal(first, second)
