"""Frames of every kind become the same images, upright; labels are drawn; files play as long as they should."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tuning
from PIL import Image
from PIL.Image import Exif

from skipguide import SkipError
from skipguide.cli import main
from skipguide.media import pictures, sheets
from skipguide.media.pictures import as_rgb
from skipguide.vision import SkipTuner, UNetPlusPlus
from skipguide.vision.skip_tuning.inputs import read_examples

# Frames of every kind become the same images; labels are drawn; files play as long as they should.


def clip(frames=4, width=20, height=12, grey=None):
    """A clip in which a bright bar moves right over a flat ground."""
    array = np.full((frames, height, width, 3), 90 if grey is None else grey, np.uint8)
    for i in range(frames) if grey is None else ():
        array[i, :, 3 * i : 3 * i + 3] = (220, 30, 40)
    return [Image.fromarray(frame) for frame in array]


def ink(image, box=None):
    """How many pixels of a strip are darker than paper."""
    part = np.asarray(image.crop(box) if box else image).min(axis=-1)
    return int((part < 128).sum())


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(left, right, strict=True)
    )


# --- frames


def as_numpy(images):
    return np.stack([np.asarray(image) for image in images])


KINDS = {
    "list of images": lambda a: [Image.fromarray(frame) for frame in a],
    "bytes": lambda a: a,
    "floats": lambda a: a.astype(np.float32) / 255,
    "list of arrays": lambda a: list(a.astype(np.float64) / 255),
    "one clip of a batch": lambda a: a[None],
    "channels first": lambda a: a.transpose(0, 3, 1, 2),
    "tensor": lambda a: torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) / 255,
    "list of tensors": lambda a: list(torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) / 255),
    "tensor of bytes": lambda a: torch.from_numpy(a),
    "with alpha": lambda a: np.concatenate([a, np.full_like(a[..., :1], 7)], axis=-1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_frames_gives_the_same_images(kind):
    images = clip()
    assert same(pictures.as_images(KINDS[kind](as_numpy(images))), images)


def test_bfloat16_and_single_images():
    (image,) = pictures.as_images(torch.ones(3, 5, 7, dtype=torch.bfloat16))
    assert image.size == (7, 5)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    (grey,) = pictures.as_images(Image.new("L", (6, 4), 30))
    assert grey.mode == "RGB"


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        (np.zeros((4, 8)), r"got \(4, 8\)"),
        (np.zeros((2, 8, 8, 5)), r"got \(2, 8, 8, 5\)"),
        (np.full((1, 4, 4, 3), 2.0), "floats in 0..1"),
        (np.full((1, 4, 4, 3), -1.0), "floats in 0..1"),
        (np.full((1, 4, 4, 3), np.nan), "floats in 0..1"),
    ],
)
def test_other_frames_are_refused(frames, message):
    with pytest.raises(SkipError, match=message):
        pictures.as_images(frames)


@pytest.mark.parametrize(("name", "dtype"), [("deep.png", np.uint16), ("floats.tif", np.float32)])
def test_generate_refuses_a_first_picture_beyond_a_byte(tmp_path, name, dtype):
    from diffusers import WanImageToVideoPipeline

    from skipguide.cli import build_parser, pipeline_calls

    Image.fromarray(np.full((4, 5), 300, dtype)).save(tmp_path / name)
    args = build_parser().parse_args(["generate", "p", "--image", str(tmp_path / name)])
    with pytest.raises(SkipError, match=rf"{name} has pixels of mode .* with values 300.* bring it to 8 bits first"):
        pipeline_calls.call_arguments(WanImageToVideoPipeline, args, {})


def test_difference():
    assert pictures.difference(clip(), clip()) == 0
    assert pictures.difference(clip(grey=0), clip(grey=255)) == 1
    assert pictures.difference(clip(grey=0), clip(grey=51)) == pytest.approx(0.2)
    with pytest.raises(SkipError, match="4 frames of 20x12 and 3 frames of 20x12"):
        pictures.difference(clip(4), clip(3))


def test_an_amplified_difference_shows_where_two_clips_differ():
    plain, other = clip(2, grey=100), clip(2, grey=100)
    other[1].paste((103, 100, 100), (0, 0, 10, 12))
    frames, factor = pictures.amplified_difference(plain, other)
    assert factor == 64 and len(frames) == 2 and frames[0].getextrema() == ((0, 0),) * 3
    assert frames[1].getpixel((0, 0)) == (192, 0, 0) and frames[1].getpixel((19, 11)) == (0, 0, 0)
    assert pictures.amplified_difference(clip(grey=0), clip(grey=255))[1] == 1
    with pytest.raises(SkipError, match="4 frames of 20x12 and 3 frames of 20x12"):
        pictures.amplified_difference(clip(4), clip(3))
    assert pictures.in_levels(1 / 255) == "1.0 of 255 levels a pixel"


def test_pick_keeps_both_ends():
    assert pictures.pick(range(16), 4) == [0, 5, 10, 15]
    assert pictures.pick(range(3), 5) == [0, 1, 2]
    assert pictures.pick(range(9), 1) == [4]


@pytest.mark.parametrize(("height", "zoom"), [(64, 4), (16, 16), (100, 3), (256, 1), (480, 1)])
def test_comfortable_zoom(height, zoom):
    assert pictures.comfortable_zoom(height) == zoom


# --- text and layout


def test_label_is_drawn_above_and_the_picture_is_kept():
    image = clip(width=160)[0]
    labelled = pictures.label(image, "layer 5")
    assert labelled.width == image.width
    strip = labelled.height - image.height
    assert ink(labelled, (0, 0, 160, strip)) > 20
    assert same([labelled.crop((0, strip, *labelled.size))], [image])
    assert ink(pictures.label(image, ""), (0, 0, 160, strip)) == 0
    two = pictures.label(image, "a label that needs more than one line of text")
    assert two.height > labelled.height


def test_wrap_fits_and_loses_nothing_but_long_words():
    text = "a small green triangle standing still on a grey gradient"
    lines = pictures.wrap(text, 120)
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert all(pictures.banner([line], 120).width == 120 for line in lines)
    (cut,) = pictures.wrap("x" * 200, 100)
    assert cut.endswith("...")
    assert len(cut) < 40
    assert pictures.wrap("a\nb", 500) == ["a", "b"]


def test_side_by_side_lines_clips_up():
    left, right = clip(width=120), clip(width=120, grey=30)
    frames = pictures.side_by_side([left, right], ["plain", "a much longer label in two lines"], gap=8)
    assert len(frames) == 4
    assert {frame.width for frame in frames} == {248}
    top = frames[0].height - 12
    for i, frame in enumerate(frames):
        assert same([frame.crop((0, top, 120, top + 12))], [left[i]])
        assert same([frame.crop((128, top, 248, top + 12))], [right[i]])
    assert ink(frames[0], (0, 0, 120, top)) > 20
    assert ink(frames[0], (128, 0, 248, top)) > 20
    titled = pictures.side_by_side([left, right], ["a", "b"], title="the prompt")
    assert titled[0].height > pictures.side_by_side([left, right], ["a", "b"])[0].height


def test_side_by_side_refuses_clips_of_different_length():
    with pytest.raises(SkipError, match=r"clips of \[4, 3\] frames"):
        pictures.side_by_side([clip(4), clip(3)], ["a", "b"])


def test_contact_sheet_places_pictures_and_draws_every_label():
    rows = [[clip(width=90, grey=10 * i + j)[0] for j in range(3)] for i in range(2)]
    rows[1][2] = None
    sheet = pictures.contact_sheet(
        rows,
        title="a title",
        row_labels=["layer 1", "layer 2"],
        column_labels=["plain", "0.5", "1"],
        captions=[["a", "b", "c"], ["d", "e"]],
    )
    pixels = np.asarray(sheet)
    for i in range(2):
        for j in range(3):
            count = int((pixels == 10 * i + j).all(axis=-1).sum())
            assert count == (90 * 12 if rows[i][j] else 0), (i, j)
    bare = pictures.contact_sheet(rows)
    assert bare.size == (8 + 3 * 98, 8 + 2 * 20)
    assert sheet.width > bare.width
    assert sheet.height > bare.height
    left = np.argwhere((pixels == 0).all(axis=-1))[0]  # the first pixel of the first picture
    assert ink(sheet, (0, 0, sheet.width, int(left[0]))) > 60, "title and column labels"
    assert ink(sheet, (0, int(left[0]), int(left[1]), sheet.height)) > 60, "row labels"


def test_a_long_caption_goes_on_in_the_next_line():
    rows = [[clip(width=90)[0], clip(width=90)[0]], [clip(width=90)[0], None]]
    words = "one two three four five six seven eight"
    short = pictures.contact_sheet(rows, captions=[["one", ""], ["one"]])
    long = pictures.contact_sheet(rows, captions=[["one", words], ["one"]])
    lines = len(pictures.wrap(words, 90, 12))
    assert lines > 1 and long.width == short.width
    assert long.height - short.height == (lines - 1) * sheets._line_height(12)
    second = np.asarray(long)[8 + 12 + 1 + sheets._line_height(12) :, 106:][: sheets._line_height(12)]
    assert (second != second[0, -1]).any(), "the words of the second line are there"


def test_contact_sheet_refuses_what_does_not_fit():
    with pytest.raises(SkipError, match="at least one picture"):
        pictures.contact_sheet([])
    with pytest.raises(SkipError, match="expected 1 row labels; got 2"):
        pictures.contact_sheet([clip()], row_labels=["a", "b"])


# --- files


def gif_frames(path):
    with Image.open(path) as gif:
        found = []
        for i in range(gif.n_frames):
            gif.seek(i)
            found.append((gif.convert("RGB"), gif.info["duration"]))
        return found, gif.info.get("loop")


@pytest.mark.parametrize("fps", [7, 8, 16, 24])
def test_gif_plays_every_frame_for_the_right_time_and_loops(tmp_path, fps):
    images = clip(6)
    pictures.save_gif(images, tmp_path / "a.gif", fps)
    frames, loop = gif_frames(tmp_path / "a.gif")
    assert loop == 0
    assert len(frames) == 6
    assert sum(duration for _, duration in frames) == pytest.approx(6000 / fps, abs=5)
    assert pictures.difference([image for image, _ in frames], images) < 0.01


def test_gif_keeps_paper_white_and_ink_dark(tmp_path):
    grey = np.linspace(200, 255, 160)[None, :, None].repeat(12, 0).repeat(3, -1).astype(np.uint8)
    image = pictures.label(Image.fromarray(grey), "a label")
    pictures.save_gif([image, image.rotate(180)], tmp_path / "a.gif")
    (first, _), _ = gif_frames(tmp_path / "a.gif")[0]
    assert first.getpixel((159, 1)) == (255, 255, 255)
    assert ink(first) > 20


def test_video_has_even_sides_and_every_frame(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    from imageio.v3 import imread

    pictures.save_video(clip(5, width=33, height=35), tmp_path / "a.mp4", fps=8)
    assert imread(tmp_path / "a.mp4").shape == (5, 36, 34, 3)


def test_video_without_imageio_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SkipError, match=r"imageio and imageio_ffmpeg: pip install 'skipguide\[video\]'"):
        pictures.save_video(clip(), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_save_frames_keeps_what_is_there(tmp_path):
    paths = pictures.save_frames(clip(3), tmp_path / "frames")
    assert [path.name for path in paths] == ["frame_000.png", "frame_001.png", "frame_002.png"]
    assert same([Image.open(path) for path in paths], clip(3))
    with pytest.raises(SkipError, match=r"frame_000\.png exists already"):
        pictures.save_frames(clip(3, grey=0), tmp_path / "frames")
    assert same([Image.open(path) for path in paths], clip(3))


@pytest.mark.parametrize("fps", [0, -1, float("nan")])
def test_a_clip_needs_frames_and_a_rate(tmp_path, fps):
    with pytest.raises(SkipError, match="frames per second"):
        pictures.save_gif(clip(), tmp_path / "a.gif", fps)
    with pytest.raises(SkipError, match="at least one frame"):
        pictures.save_gif([], tmp_path / "a.gif")


def test_import_does_not_load_pillow():
    code = "import sys, skipguide.media.pictures; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A picture that its camera noted as turned is read as people see it, by everything that reads pictures.

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

    tuner = SkipTuner(tuning.clip(), (pixels, tuning.words), ["red circle", "blue star"], 1)
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
