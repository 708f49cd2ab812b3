"""`skipguide generate` on a stub pipeline that draws."""

import json

import pytest
import torch
from helpers import cli_stub
from helpers.cli_stub import StubPictures, files, one_line
from PIL import Image

from skipguide import SkipError
from skipguide.cli import main

stub = cli_stub.stub


def test_generate_writes_a_clip_and_its_notes(stub, capsys):
    assert main(["generate", "A red bar", "--layers", "1,2", "--scale", "1.5", "--seed", "3", "--frames", "6"]) == 0
    assert files(stub.folder) == ["a-red-bar.gif", "a-red-bar.gif.json"]
    with Image.open("a-red-bar.gif") as gif:
        assert gif.size == (256, 256)
        assert gif.n_frames == 6
        assert gif.info["duration"] == 100
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("a-red-bar.gif: 6 frames at 10 fps, 64x64, seed 3")
    assert lines[1] == "skip guidance: layers 1, 2, scale 1.5; 9 passes"

    notes = json.loads((stub.folder / "a-red-bar.gif.json").read_text())
    assert notes["command"] == "generate"
    assert notes["prompt"] == "A red bar"
    assert notes["seed"] == notes["arguments"]["seed"] == 3
    assert notes["guidance"] == {"layers": [1, 2], "scale": 1.5}
    assert notes["stats"] == {"passes": 9, "delivery": "shift"}
    assert notes["model"]["pipeline"] == "StubPipeline"
    assert notes["call"]["num_inference_steps"] == 5
    assert notes["frames"] == 6
    assert notes["size"] == [64, 64]
    assert notes["seconds"] >= 0
    assert set(notes["versions"]) >= {"python", "skipguide", "torch", "diffusers"}


def test_same_seed_same_file_and_guidance_shows(stub):
    for name, more in {"a": [], "b": [], "c": ["--seed", "1"], "d": ["--scale", "9"]}.items():
        assert main(["generate", "p", "--layers", "1", "-o", f"{name}.gif", "--frames", "2", *more]) == 0
    a, b, c, d = ((stub.folder / f"{name}.gif").read_bytes() for name in "abcd")
    assert a == b
    assert a != c
    assert a != d


@pytest.mark.parametrize(
    ("zoom", "size"), [([], (256, 256)), (["--zoom", "1"], (64, 64)), (["--zoom", "2"], (128, 128))]
)
def test_zoom(stub, zoom, size):
    assert main(["generate", "p", "--no-guidance", "--frames", "2", *zoom]) == 0
    assert Image.open("p.gif").size == size


def test_png_is_a_contact_sheet(stub):
    assert main(["generate", "p", "--layers", "1", "-o", "deep/er/sheet.png"]) == 0
    sheet = Image.open("deep/er/sheet.png")
    assert sheet.width == 8 + 4 * (128 + 8)
    assert sheet.height > 4 * 128
    assert files(stub.folder) == ["sheet.png", "sheet.png.json"]


def test_mp4(stub):
    pytest.importorskip("imageio_ffmpeg")
    from imageio.v3 import imread

    assert main(["generate", "p", "--no-guidance", "--frames", "3", "-o", "clip.mp4"]) == 0
    assert imread("clip.mp4").shape == (3, 256, 256, 3)
    assert files(stub.folder) == ["clip.mp4", "clip.mp4.json"]


@pytest.mark.parametrize("error", [ValueError("height must be\ndivisible by 8"), RuntimeError("size of tensor a (3)")])
def test_what_the_pipeline_refuses_is_one_line(stub, capsys, error):
    stub.pipeline.fails = error
    one_line(capsys, 2, "StubPipeline failed: " + " ".join(str(error).split()), "generate", "p", "--layers", "1")
    with pytest.raises(SkipError) as caught:
        main(["--traceback", "generate", "p", "--layers", "1"])
    assert caught.value.__cause__ is error


def test_running_out_of_memory_is_one_line_with_advice(stub, capsys):
    stub.pipeline.fails = torch.OutOfMemoryError("tried to allocate 99 GiB")
    one_line(capsys, 1, "try fewer --frames", "generate", "p", "--layers", "1")


def test_pictures_become_png(stub, capsys):
    stub.pipeline = StubPictures()
    one_line(capsys, 2, "makes pictures, not clips", "generate", "p", "-o", "p.gif", "--layers", "1")
    one_line(capsys, 2, "StubPictures takes no --frames", "generate", "p", "--frames", "3", "--layers", "1")
    one_line(capsys, 2, "takes no --negative-prompt", "generate", "p", "--negative-prompt", "x", "--layers", "1")
    assert stub.loads == 0
    assert main(["generate", "p", "--layers", "1"]) == 0
    assert Image.open("p.png").size == (256, 256)
    assert main(["compare", "p", "--layers", "1"]) == 0
    assert Image.open("p-compare.png").size[0] == 2 * 256 + 8
    assert files(stub.folder) == ["p-compare.png", "p-compare.png.json", "p.png", "p.png.json"]
