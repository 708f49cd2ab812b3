"""The commands on stub pipelines, tiny random models, and end to end on a stock pipeline with random weights."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import cli_stub
from helpers.cli_stub import BLOCKS, StubPictures, files, interrupt_after, one_line
from PIL import Image

from skipguide import SkipError
from skipguide.cli import main, models
from zoo import saved

# `skipguide generate` on a stub pipeline that draws.

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


def test_another_number_of_frames_than_asked_for_is_said(stub, capsys, monkeypatch):
    draw = stub.pipeline.draw
    monkeypatch.setattr(
        stub.pipeline, "draw", lambda generator, count, *size: draw(generator, count // 4 * 4 + 1, *size)
    )
    assert main(["generate", "p", "--layers", "1", "--frames", "7"]) == 0
    assert "5 frames (7 asked for, which the pipeline rounds) at 10 fps" in capsys.readouterr().out
    assert main(["generate", "p", "--layers", "1", "--frames", "9", "--force"]) == 0
    assert ": 9 frames at 10 fps" in capsys.readouterr().out


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
    assert Image.open("p-compare.png").size[0] == 3 * 256 + 2 * 8  # without, with, and where they differ
    assert files(stub.folder) == ["p-compare.png", "p-compare.png.json", "p.png", "p.png.json"]


# `skipguide compare` on a stub pipeline that draws.


def test_compare_puts_the_same_seed_side_by_side(stub, capsys):
    assert main(["compare", "p", "--layers", "1", "--scale", "9", "--frames", "4", "--seed", "5"]) == 0
    with Image.open("p-compare.gif") as gif:
        assert gif.n_frames == 4
        assert gif.width == 3 * 256 + 2 * 8
        assert gif.height > 256 + 20, "title and labels above the clips"
        frame = np.asarray(gif.convert("RGB")).astype(int)[-256:]
    left, right, apart = frame[:, :256], frame[:, 264:520], frame[:, 528:]
    assert abs(left[:, 128:] - right[:, 128:]).mean() < 8, "same seed, same ground"
    assert (right[:, :56, 0] - left[:, :56, 0]).mean() > 20, "the guidance shows on the right"
    where = abs(left - right).mean(-1) > 16
    assert apart[where].mean() > 2 * apart[~where].mean(), "the third picture is bright where the two differ"
    notes = json.loads((stub.folder / "p-compare.gif.json").read_text())
    assert set(notes["seconds"]) == {"plain", "guided"}
    assert 0 < notes["difference"] < 0.1
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2 and f"({255 * notes['difference']:.1f} of 255 levels a pixel)" in said


def test_compare_png_has_a_row_each(stub):
    assert main(["compare", "p", "--layers", "1", "-o", "c.png"]) == 0
    assert Image.open("c.png").height > 3 * 128
    assert Image.open("c.png").width > 6 * 128


# `skipguide sweep` on a stub pipeline that draws.

SWEEP = ("sweep", "p", "--layers", "1-2", "0+3", "--scales", "0.5", "2", "--frames", "4")


def test_sweep_writes_a_sheet_a_table_and_notes(stub, capsys):
    assert main(SWEEP) == 0
    assert [name for name in files(stub.folder) if name.startswith("p-sweep.")] == [
        "p-sweep.csv",
        "p-sweep.png",
        "p-sweep.png.json",
    ]
    assert len(stub.pipeline.calls) == 7
    with open("p-sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["layer"], float(row["scale"])) for row in table] == [
        ("plain", 0),
        *((layer, scale) for layer in ("1", "2", "0+3") for scale in (0.5, 2)),
    ]
    assert [float(row["relative_cost"]) for row in table[1::2]] == [1.25, 1.125, 1.375]
    changes = [float(row["difference"]) for row in table]
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]
    sheet = Image.open("p-sweep.png")
    cell = 3 * 128 + 2 * 2
    assert sheet.width > 3 * cell, "plain and two scales"
    assert 3 * 128 < sheet.height < 4 * 128 + 150
    notes = json.loads((stub.folder / "p-sweep.png.json").read_text())
    assert notes["layers"] == [[1], [2], [0, 3]]
    assert len(notes["stats"]) == 7
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_sweep_takes_all_layers_by_default(stub):
    assert main(["sweep", "p", "--scales", "1", "--frames", "2"]) == 0
    assert len(stub.pipeline.calls) == 1 + BLOCKS


def test_sweep_has_one_scale_where_there_is_no_third_pass(stub):
    assert main(["sweep", "p", "--layers", "1", "--formula", "uncond", "--frames", "2"]) == 0
    with open(stub.folder / "p-sweep.csv", newline="") as file:
        assert [row["scale"] for row in csv.DictReader(file) if row["layer"] == "1"] == ["1.0"]


def test_an_interrupted_sweep_goes_on(stub, capsys, monkeypatch):
    left = interrupt_after(4, monkeypatch)
    assert main(SWEEP) == 130
    error = capsys.readouterr().err
    assert "4 cells are kept in" in error.splitlines()[-1]
    assert not (stub.folder / "p-sweep.png").exists()
    assert not (stub.folder / "p-sweep.csv").exists()

    left[0] = 99
    stub.pipeline.calls.clear()
    assert main(SWEEP) == 0
    assert len(stub.pipeline.calls) == 3, "four of seven were there"
    whole = (stub.folder / "p-sweep.png").read_bytes()
    table = (stub.folder / "p-sweep.csv").read_text()

    stub.pipeline.calls.clear()
    assert main([*SWEEP, "--force"]) == 0
    assert stub.pipeline.calls == []
    assert (stub.folder / "p-sweep.png").read_bytes() == whole
    assert (stub.folder / "p-sweep.csv").read_text() == table
    assert main([*SWEEP, "--force", "--seed", "1"]) == 0
    assert len(stub.pipeline.calls) == 7, "another seed is another sweep"
    stub.pipeline.calls.clear()
    assert main([*SWEEP, "--force", "--fresh"]) == 0
    assert len(stub.pipeline.calls) == 7


def test_a_damaged_cell_is_made_again(stub):
    assert main(SWEEP) == 0
    for path in (stub.folder / "p-sweep.cells").glob("1-*.png"):
        path.write_bytes(b"not a picture")
    stub.pipeline.calls.clear()
    assert main([*SWEEP, "--force"]) == 0
    assert len(stub.pipeline.calls) == 2


def test_sweep_refuses_a_layer_that_is_not_there_before_it_starts(stub, capsys):
    one_line(capsys, 2, "layer 9 is out of range", "sweep", "p", "--layers", "1", "9")
    assert stub.pipeline.calls == []
    assert files(stub.folder) == []


# `skipguide describe` on tiny random models.

tiny = saved.tiny


@pytest.mark.parametrize("part", ["", "transformer"])
def test_describe_lists_every_block_without_reading_weights(tiny, part, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", None)
    assert main(["describe", f"{tiny}/{part}".rstrip("/")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{part or 'transformer'}: LatteTransformer3DModel, 6 blocks" if not part else "model:")
    table = [line.split() for line in lines[3:9]]
    assert [row[0] for row in table] == list("012345")
    assert [row[1] for row in table[:2]] == ["transformer_blocks.0", "temporal_transformer_blocks.0"]
    assert table[0][2:5] == ["attn", "cross_attn", "mlp"]
    assert table[1][2:4] == ["attn", "mlp"]
    assert [row[-3] for row in table] == ["5/6", "4/6", "3/6", "2/6", "1/6", "0/6"]
    assert table[0][-1] == f"x{1 + 5 / 12:.2f}"
    assert len({line.index("transformer_blocks") for line in lines[3:9:2]}) == 1, "aligned"
    assert any("skipguide sweep" in line for line in lines), "no preset: says what finds one"


def test_describe_marks_the_preset(tmp_path, capsys):
    from diffusers import LTXVideoTransformer3DModel

    with torch.device("meta"):
        LTXVideoTransformer3DModel().save_config(tmp_path)  # the sizes of the 2B model
    assert main(["describe", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "*" in line] == ["19*", "preset"]
    assert "preset (*): layer 19, scale 1 (authors: STG authors' code" in out


def test_describe_says_what_it_saw_in_a_model_it_does_not_know(tmp_path, capsys):
    from diffusers import PriorTransformer

    PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=8).save_config(tmp_path)
    one_line(capsys, 2, "transformer_blocks (3 x BasicTransformerBlock)", "describe", str(tmp_path))


# The command line end to end: a stock pipeline with random weights, saved and loaded.


def test_scale_zero_needs_no_layers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "p", "--model", tiny, "--scale", "0", "-o", "a.gif"]) == 0
    assert "skip guidance: scale 0; " in capsys.readouterr().out


def test_generate_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a red circle", "--model", tiny, "--layers", "2", "--seed", "1"]
    assert main([*command, "-o", "a.gif"]) == 0
    assert main([*command, "-o", "b.gif"]) == 0
    assert main([*command, "-o", "c.gif", "--scale", "0"]) == 0
    assert main([*command[:4], "-o", "plain.gif", "--no-guidance", "--seed", "1"]) == 0
    a, b, c, plain = ((tmp_path / f"{name}.gif").read_bytes() for name in ("a", "b", "c", "plain"))
    assert a == b, "the seed repeats"
    assert a != plain, "the guidance does something"
    assert c == plain, "scale 0 is the plain pipeline"
    stats = json.loads((tmp_path / "a.gif.json").read_text())["stats"]
    assert stats["blocks_run"] < stats["blocks_naive"]
    assert "skip guidance: layer 2, scale 1" in capsys.readouterr().out


def test_compare_and_sweep_end_to_end(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", tiny, "--steps", "1"]
    assert main(["compare", "a red circle", "--layers", "4", *flags]) == 0
    assert json.loads((tmp_path / "a-red-circle-compare.gif.json").read_text())["difference"] > 0
    assert main(["sweep", "a red circle", "--layers", "1", "4", "--scales", "1", *flags]) == 0
    with open("a-red-circle-sweep.csv", newline="") as file:
        plain, early, late = csv.DictReader(file)
    assert float(plain["difference"]) == 0
    assert float(early["relative_cost"]) == pytest.approx(1 + 4 / 12, abs=1e-3)
    assert float(late["relative_cost"]) == pytest.approx(1 + 1 / 12, abs=1e-3)
    assert float(early["difference"]) > 0


def test_what_a_real_pipeline_refuses(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for expected, *more in [
        ("layer 6 is out of range", "--layers", "6"),
        ("has no part 'cross_attn'", "--layers", "1", "--part", "cross_attn"),
        ("skipguide sweep", "--steps", "1"),  # no preset for a model of this size
        ("divisible by 8", "--height", "15", "--layers", "1"),
        ("draws clips of 4 frames and no others; got --frames 3", "--frames", "3", "--layers", "1", "--steps", "1"),
        ("draws clips of 4 frames and no others; got --frames 1", "--frames", "1", "--no-guidance", "--steps", "1"),
    ]:
        assert main(["generate", "a red circle", "--model", tiny, *more]) == 2
        error = capsys.readouterr().err
        assert expected in error.splitlines()[-1]
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "a red circle", "--steps", "2", "--frames", "5"],
        ["sweep", "a red circle", "--layers", "1", "--scales", "1", "--steps", "2", "--frames", "5"],
        ["rank", "--steps", "1", "--levels", "1", "--prompts", "a red circle", "--parts", "block"],
        ["tune", "--budget", "0.9", "--steps", "2", "--prompts", "a red circle", "--passes-only"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_runs_the_small_pipeline_in_one_thread(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert main([*words, "--device", "cpu"]) == 0
    assert asked[:2] == [1, 3] and asked.count(1) == asked.count(3)
