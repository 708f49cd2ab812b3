"""The command line on a stub pipeline that draws, then end to end on a tiny random one."""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from skipguide import BlockSpec, SkipError, find_blocks, pictures, register_blocks
from skipguide.cli import COMMANDS, arguments, build_parser, jobs, main, models, outputs, sampling
from zoo.saved import save_tiny_latte

BLOCKS = 4


class StubDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(BLOCKS))


class StubPipeline:
    """Draws a bar on noise; the guidance that is applied makes it redder."""

    def __init__(self):
        self.transformer = StubDenoiser()
        self.calls = []
        self.red = 0.0
        self.fails = None

    def set_progress_bar_config(self, **kwargs):
        self.bar = kwargs

    def draw(self, generator, count, height, width):
        if self.fails is not None:
            raise self.fails
        frames = torch.rand(count, height, width, 3, generator=generator) * 0.5
        frames[:, :, : width // 4, 0] = min(1.0, 0.5 + self.red)
        return (frames * 255).round().to(torch.uint8).numpy()

    def __call__(
        self,
        prompt=None,
        negative_prompt="",
        num_inference_steps=50,
        guidance_scale=7.5,
        video_length=16,
        height=64,
        width=64,
        generator=None,
        output_type="pil",
    ):
        self.calls.append({k: v for k, v in locals().items() if k not in ("self", "generator")})
        return SimpleNamespace(frames=[self.draw(generator, video_length, height, width)])


class StubPictures(StubPipeline):
    def __call__(self, prompt=None, num_inference_steps=50, height=64, width=64, generator=None):
        self.calls.append({"prompt": prompt, "height": height, "width": width})
        return SimpleNamespace(images=[Image.fromarray(self.draw(generator, 1, height, width)[0])])


class StubGuidance:
    def __init__(self, layers, scale=1.0, part="block", **more):
        self.layers, self.scale, self.part = layers, scale, part

    @contextmanager
    def apply(self, pipeline):
        pipeline.red = 0.01 * self.scale * (1 + sum(self.layers))
        try:
            yield SimpleNamespace(stats=StubStats(passes=9, delivery="shift"))
        finally:
            pipeline.red = 0.0

    def cost(self, pipeline):
        find_blocks(pipeline.transformer).select(self.layers)
        return SimpleNamespace(ratio_to_plain=1 + (BLOCKS - 1 - min(self.layers)) / (2 * BLOCKS))


class StubStats(dict):
    def __str__(self):
        return "9 passes"

    def to_dict(self):
        return dict(self)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A stub pipeline behind `--model anything`, in an empty folder; counts how often it was loaded."""
    register_blocks(StubDenoiser, BlockSpec("blocks"))
    state = SimpleNamespace(pipeline=StubPipeline(), loads=0, defaults={"num_inference_steps": 5, "fps": 10})
    folder = tmp_path / "model"
    folder.mkdir()

    def load(source, device, dtype):
        state.loads += 1
        return state.pipeline

    def resolve(name):
        path, text = folder / "generation.json", json.dumps(state.defaults)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return models.Source(name, folder)

    monkeypatch.setattr(models, "resolve", resolve)
    monkeypatch.setattr(models, "pipeline_class", lambda source: type(state.pipeline))
    monkeypatch.setattr(models, "load_pipeline", load)
    monkeypatch.setattr(sampling, "make_guidance", lambda settings: StubGuidance(**settings))
    state.folder = tmp_path / "out"
    state.folder.mkdir()
    monkeypatch.chdir(state.folder)
    return state


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def one_line(capsys, status, expected, *argv):
    """The command ends with `status`, nothing on stdout, and one line on stderr that holds `expected`."""
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert expected in err
    assert err.startswith("skipguide")


# --- the parser


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    name = command.__name__.rpartition(".")[2]
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.partition("examples:\n")[2].splitlines()]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line.partition("    (")[0])
        assert words[:2] == ["skipguide", name]
        assert build_parser().parse_args(words[1:]).run is command.run


def test_help_and_a_wrong_argument_load_neither_diffusers_nor_pillow():
    code = (
        "import sys; from skipguide.cli import main; main(['--help']); main(['nope']);"
        "sys.exit(str({'diffusers', 'transformers', 'PIL'} & set(sys.modules) or '') or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert f"torch {torch.__version__.partition('+')[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no command"),
        (["nope"], "invalid choice: 'nope'"),
        (["generate"], "required: prompt"),
        (["generate", "p", "--nope"], "--nope"),
        (["generate", "p", "--layers", "x"], "expected block numbers such as 5, 5,7 or 5-7; got 'x'"),
        (["generate", "p", "--layers", "-3"], "--layers"),
        (["generate", "--layers", "5", "a prompt"], "put the prompt before --layers"),
        (["generate", "p", "--scale", "nan"], "expected a number; got 'nan'"),
        (["generate", "p", "--steps", "0"], "expected a whole number at least 1; got '0'"),
        (["generate", "p", "--stop", "1.5"], "expected a number at least 0 and at most 1; got '1.5'"),
        (["generate", "p", "--fps", "0"], "expected a number above 0; got '0'"),
        (["generate", "p", "--part", "head"], "invalid choice: 'head'"),
        (["generate", "p", "--formula", "magic"], "invalid choice: 'magic'"),
        (["generate", "p", "--seed", "-1"], "whole number at least 0"),
        (["generate", "p", "--seed", "1.5"], "whole number"),
        (["sweep", "p", "--scales", "a"], "expected a number; got 'a'"),
        (["compare", "p", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(argv, expected, capsys):
    one_line(capsys, 2, expected, *argv)


@pytest.mark.parametrize(
    ("words", "layers"),
    [(["5", "7"], [5, 7]), (["5,7"], [5, 7]), (["5-7", "1"], [5, 6, 7, 1]), (["2", "2,2"], [2])],
)
def test_layers_are_read_in_every_form(words, layers):
    assert build_parser().parse_args(["generate", "p", "--layers", *words]).layers == layers


# --- files


def test_slug():
    assert outputs.slug("A red circle, moving right!") == "a-red-circle-moving-right"
    assert outputs.slug("../../etc/passwd") == "etc-passwd"
    assert outputs.slug("!?") == "clip"
    assert len(outputs.slug("word " * 100)) <= 60
    assert outputs.slug("ein blauer Würfel") == "ein-blauer-würfel"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, None])
def test_replacing_is_all_or_nothing(tmp_path, error):
    old = tmp_path / "a.gif"
    old.write_text("old")
    new = tmp_path / "deeper" / "b.json"

    def write():
        with outputs.replacing(old, new) as (first, second):
            assert first.suffix == ".gif"
            assert first.parent == tmp_path
            first.write_text("new")
            if error:
                raise error
            second.write_text("new")

    if error:
        with pytest.raises(error):
            write()
        assert files(tmp_path) == ["a.gif"]
        assert old.read_text() == "old"
    else:
        write()
        assert files(tmp_path) == ["a.gif", "b.json"]
        assert old.read_text() == "new"


# --- generate


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


def test_flags_go_to_the_names_that_the_pipeline_uses(stub):
    flags = "--steps 7 --guidance-scale 2.5 --negative-prompt blur --height 32 --width 48 --frames 3"
    assert main(["generate", "p", "--no-guidance", *flags.split()]) == 0
    assert stub.pipeline.calls == [
        {
            "prompt": "p",
            "negative_prompt": "blur",
            "num_inference_steps": 7,
            "guidance_scale": 2.5,
            "video_length": 3,
            "height": 32,
            "width": 48,
            "output_type": "pil",
        }
    ]
    assert json.loads((stub.folder / "p.gif.json").read_text())["guidance"] is None


def test_defaults_of_the_model_are_used_and_flags_win(stub):
    stub.defaults = {
        "video_length": 3,
        "height": 16,
        "width": 16,
        "guidance_scale": 2,
        "note": "not an argument",
    }
    assert main(["generate", "p", "--no-guidance", "--height", "32"]) == 0
    (call,) = stub.pipeline.calls
    assert (call["video_length"], call["height"], call["width"], call["guidance_scale"]) == (3, 32, 16, 2)


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


def test_existing_files_are_kept_and_nothing_is_loaded(stub, capsys):
    for name in ("p.gif", "q.gif.json", "r-compare.gif", "s-sweep.csv", "t.png"):
        (stub.folder / name).write_text("precious")
    one_line(capsys, 2, "p.gif exists already", "generate", "p", "--layers", "1")
    one_line(capsys, 2, "q.gif.json exists already", "generate", "q", "--layers", "1")
    one_line(capsys, 2, "r-compare.gif exists already", "compare", "r", "--layers", "1")
    one_line(capsys, 2, "s-sweep.csv exists already", "sweep", "s")
    one_line(capsys, 2, "t.png exists already", "sweep", "t", "-o", "t.png")
    assert stub.loads == 0
    assert {(stub.folder / name).read_text() for name in files(stub.folder)} == {"precious"}
    assert main(["generate", "p", "--layers", "1", "--force"]) == 0
    assert Image.open("p.gif").n_frames == 16


def test_bad_output_is_refused_before_loading(stub, capsys, monkeypatch):
    (stub.folder / "folder.gif").mkdir()
    (stub.folder / "file").write_text("")
    one_line(capsys, 2, "expected a file name that ends in .gif, .mp4, .png", "generate", "p", "-o", "clip.avi")
    one_line(capsys, 2, "is a folder", "generate", "p", "-o", "folder.gif")
    one_line(capsys, 2, "is not a folder", "generate", "p", "-o", "file/clip.gif")
    one_line(capsys, 2, "ends in .png", "sweep", "p", "-o", "clip.gif")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_line(capsys, 2, "skipguide[video]", "generate", "p", "-o", "clip.mp4")
    assert stub.loads == 0


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (SkipError("layer 99 is out of range"), 2, "layer 99 is out of range"),
    ],
)
@pytest.mark.parametrize("where", ["sampling", "writing"])
def test_a_failure_leaves_no_file(stub, capsys, monkeypatch, error, status, expected, where):
    def fail(images, path, fps):
        path.write_text("half a fi")
        raise error

    if where == "sampling":
        stub.pipeline.fails = error
    else:
        monkeypatch.setattr(pictures, "save_gif", fail)
    one_line(capsys, status, expected, "generate", "p", "--layers", "1")
    assert files(stub.folder) == []


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


def test_no_guidance_and_guidance_flags_exclude_each_other(stub, capsys):
    one_line(
        capsys,
        2,
        "--no-guidance leaves nothing for --scale",
        "generate",
        "p",
        "--no-guidance",
        "--scale",
        "2",
    )
    assert stub.loads == 0


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


def test_preset_is_written_down(stub, monkeypatch):
    preset = SimpleNamespace(layers=(2,), scale=1.25, part="block", formula="stg", source="here")
    monkeypatch.setattr("skipguide.pipelines.presets.find_preset", lambda model: preset)
    args = {"layers": None, "scale": None, "part": None, "formula": None, "start": 0.5}
    chosen = sampling.guidance_arguments(argparse.Namespace(**args), stub.pipeline)
    assert chosen == {"layers": [2], "scale": 1.25, "part": "block", "formula": "stg", "start": 0.5}
    args["scale"] = 3.0
    assert sampling.guidance_arguments(argparse.Namespace(**args), stub.pipeline)["scale"] == 3.0
    args["layers"] = [1]
    assert sampling.guidance_arguments(argparse.Namespace(**args), stub.pipeline) == {
        "layers": [1],
        "scale": 3.0,
        "start": 0.5,
    }


def test_a_named_preset_brings_its_settings_and_flags_change_them(stub, monkeypatch):
    from skipguide.pipelines.presets import NAMED

    assert set(arguments.PRESETS) == set(NAMED)
    preset = SimpleNamespace(layers=(2,), scale=1.25, part="block", formula="stg", source="here")
    monkeypatch.setattr("skipguide.pipelines.presets.find_preset", lambda model: preset)
    args = argparse.Namespace(preset="frugal", start=None, scale=None)
    chosen = sampling.guidance_arguments(args, stub.pipeline)
    assert chosen == {"layers": [2], "formula": "stg"} | NAMED["frugal"]
    args.scale = 0.0
    assert sampling.guidance_arguments(args, stub.pipeline) == NAMED["frugal"] | {"scale": 0.0}, "no layers needed"


def test_no_scale_has_to_be_given_where_there_is_none(stub, monkeypatch):
    """formula='uncond' has no third pass to scale, and scale 0 has no layers to name."""
    preset = SimpleNamespace(layers=(2,), scale=1.25, part="block", formula="stg", source="here")
    monkeypatch.setattr("skipguide.pipelines.presets.find_preset", lambda model: preset)
    chosen = sampling.guidance_arguments(argparse.Namespace(formula="uncond"), stub.pipeline)
    assert chosen == {"layers": [2], "scale": 1.0, "part": "block", "formula": "uncond"}
    assert sampling.guidance_arguments(argparse.Namespace(formula="uncond", scale=2.0), stub.pipeline)["scale"] == 2.0
    idle = sampling.guidance_arguments(argparse.Namespace(scale=0.0, start=0.5), stub.pipeline)
    assert jobs.settings(idle) == "scale 0, start 0.5"


# --- compare


def test_compare_puts_the_same_seed_side_by_side(stub, capsys):
    assert main(["compare", "p", "--layers", "1", "--scale", "9", "--frames", "4", "--seed", "5"]) == 0
    with Image.open("p-compare.gif") as gif:
        assert gif.n_frames == 4
        assert gif.width == 2 * 256 + 8
        assert gif.height > 256 + 20, "title and labels above the clips"
        frame = np.asarray(gif.convert("RGB")).astype(int)[-256:]
    left, right = frame[:, :256], frame[:, 264:]
    assert abs(left[:, 128:] - right[:, 128:]).mean() < 8, "same seed, same ground"
    assert (right[:, :56, 0] - left[:, :56, 0]).mean() > 20, "the guidance shows on the right"
    notes = json.loads((stub.folder / "p-compare.gif.json").read_text())
    assert set(notes["seconds"]) == {"plain", "guided"}
    assert 0 < notes["difference"] < 0.1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_compare_png_has_a_row_each(stub):
    assert main(["compare", "p", "--layers", "1", "-o", "c.png"]) == 0
    assert Image.open("c.png").height > 2 * 128
    assert Image.open("c.png").width > 6 * 128


# --- sweep

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
    draw, left = StubPipeline.draw, [4]

    def interrupted(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(StubPipeline, "draw", interrupted)
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


# --- models


def test_models_that_are_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["X"]}')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model_index.json").write_text("{")
    (tmp_path / "future").mkdir()
    (tmp_path / "future" / "model_index.json").write_text('{"_class_name": "FuturePipeline"}')
    for name, expected in {
        "nonsense": "no model 'nonsense': expected tiny-t2v (bundled), a folder, or a hub id",
        "./no/such": "no model './no/such'",
        "file": "file is a file",
        "empty": "no model_index.json",
        "bad": "model_index.json is not JSON",
        "future": "FuturePipeline",
        "other": "it is a single model: only `describe` takes one",
    }.items():
        one_line(capsys, 2, expected, "generate", "p", "--model", name)
    one_line(capsys, 2, "no model 'nonsense'", "describe", "nonsense")
    one_line(capsys, 2, "neither model_index.json nor config.json", "describe", "empty")
    one_line(capsys, 2, "no _class_name", "describe", "other")
    one_line(capsys, 2, "none of transformer", "describe", "future")


@pytest.mark.parametrize("command", [["describe"], ["generate", "p", "--model"]])
def test_a_hub_model_without_a_network_is_one_line(command, capsys, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(self, *args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    expected = "somebody/some-model is neither a folder here nor in the local cache, and the hub does not answer"
    one_line(capsys, 2, expected, *command, "somebody/some-model")


def test_unknown_words_of_a_small_vocabulary():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "▁a": 1, "▁red": 2, ",": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert models.vocabulary_note(tokenizer, "A Red red") == ""
    note = models.vocabulary_note(tokenizer, "a tram in a red tram")
    assert note == "was not trained on tram, in; its words are a, red"


def test_device_that_is_not_there(stub, capsys):
    one_line(capsys, 2, "cannot use device 'warp'", "generate", "p", "--device", "warp", "--layers", "1")


@pytest.mark.parametrize(
    ("name", "device", "bundled", "dtype"),
    [
        ("auto", "cpu", False, "float32"),
        ("auto", "cuda:1", False, "bfloat16"),
        ("auto", "cuda", True, "float32"),
        ("float16", "cuda", True, "float16"),
    ],
)
def test_dtype(name, device, bundled, dtype):
    assert models.choose_dtype(name, device, bundled=bundled) == dtype


# --- end to end: a stock pipeline with random weights, saved and loaded


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a Latte pipeline of 6 blocks that makes 4 frames of 16x16."""
    return save_tiny_latte(tmp_path_factory.mktemp("tiny"))


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

    model = LTXVideoTransformer3DModel(
        num_layers=28, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8
    )
    model.save_config(tmp_path)
    assert main(["describe", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "*" in line] == ["19*", "preset"]
    assert "preset (*): layer 19, scale 1 (STG authors' code" in out


def test_describe_says_what_it_saw_in_a_model_it_does_not_know(tmp_path, capsys):
    from diffusers import PriorTransformer

    PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=8).save_config(tmp_path)
    one_line(capsys, 2, "transformer_blocks (3 x BasicTransformerBlock)", "describe", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "video", "flags", "call"),
    [
        ("LTXPipeline", True, "--frames 9 --fps 25", {"num_frames": 9, "frame_rate": 25.0}),
        ("WanPipeline", True, "--frames 9 --steps 2", {"num_frames": 9, "num_inference_steps": 2}),
        ("LattePipeline", True, "--frames 9", {"video_length": 9}),
        ("HunyuanVideoPipeline", True, "--negative-prompt x", {"negative_prompt": "x"}),
        ("HunyuanVideo15Pipeline", True, "--guidance-scale 3", "takes no --guidance-scale"),
        ("StableDiffusion3Pipeline", False, "--guidance-scale 3", {"guidance_scale": 3.0}),
        ("FluxPipeline", False, "--frames 2", "takes no --frames"),
        ("WanImageToVideoPipeline", True, "", "give it with --image"),
        ("LTXPipeline", True, "--image a.png", "takes no --image"),
        ("WanImageToVideoPipeline", True, "--image nothing.png", "cannot read the picture nothing.png"),
    ],
)
def test_flags_of_stock_pipelines(name, video, flags, call):
    import diffusers

    pipeline = getattr(diffusers, name)
    args = build_parser().parse_args(["generate", "p", *flags.split()])
    assert sampling.makes_video(pipeline) == video
    if isinstance(call, str):
        with pytest.raises(SkipError, match=call):
            sampling.call_arguments(pipeline, args, {})
    else:
        found = sampling.call_arguments(pipeline, args, {})
        assert found.pop("output_type") == "pil"
        assert found.pop("clean_caption", None) in (None, False)
        assert found == call


def test_image_goes_to_the_pipeline(tmp_path):
    from diffusers import WanImageToVideoPipeline

    Image.new("L", (9, 7)).save(tmp_path / "first.png")
    args = build_parser().parse_args(["generate", "p", "--image", str(tmp_path / "first.png")])
    image = sampling.call_arguments(WanImageToVideoPipeline, args, {})["image"]
    assert (image.mode, image.size) == ("RGB", (9, 7))


@pytest.mark.parametrize(
    ("flags", "defaults", "name", "count", "fps"),
    [
        ("--fps 12", {"fps": 8}, "LTXPipeline", 9, 12),
        ("", {"fps": 10}, "LTXPipeline", 9, 10),
        ("", {}, "LTXPipeline", 9, 25),
        ("", {}, "WanPipeline", 81, 16),
        ("", {}, "LattePipeline", 16, 8),
    ],
)
def test_frames_per_second(flags, defaults, name, count, fps):
    import diffusers

    args = build_parser().parse_args(["generate", "p", *flags.split()])
    assert sampling.frames_per_second(args, getattr(diffusers, name), defaults, count) == fps


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
        ("LattePipeline failed", "--frames", "3", "--layers", "1", "--steps", "1"),
    ]:
        assert main(["generate", "a red circle", "--model", tiny, *more]) == 2
        error = capsys.readouterr().err
        assert expected in error.splitlines()[-1]
    assert files(tmp_path) == []


def test_bundled_name_is_the_default(tmp_path, monkeypatch):
    assert build_parser().parse_args(["generate", "p"]).model == arguments.BUNDLED
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr("skipguide.assets.bundled", lambda name: tmp_path / "assets" / name)
    assert models.resolve("shipped") == models.Source("shipped", tmp_path / "assets" / "shipped", bundled=True)
    assert not models.resolve("./shipped").bundled
