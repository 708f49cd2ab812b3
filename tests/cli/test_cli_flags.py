"""What a pipeline is called with: flags, the model's defaults, presets."""

import argparse
import json
from types import SimpleNamespace

import pytest
from helpers import cli_stub
from helpers.cli_stub import one_line
from PIL import Image

from skipguide import SkipError
from skipguide.cli import arguments, build_parser, clip_job, main, pipeline_calls

stub = cli_stub.stub


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


def test_preset_is_written_down(stub, monkeypatch):
    preset = SimpleNamespace(layers=(2,), scale=1.25, part="block", formula="stg", source="here")
    monkeypatch.setattr("skipguide.pipelines.presets.find_preset", lambda model: preset)
    args = {"layers": None, "scale": None, "part": None, "formula": None, "start": 0.5}
    chosen = pipeline_calls.guidance_arguments(argparse.Namespace(**args), stub.pipeline)
    assert chosen == {"layers": [2], "scale": 1.25, "part": "block", "formula": "stg", "start": 0.5}
    args["scale"] = 3.0
    assert pipeline_calls.guidance_arguments(argparse.Namespace(**args), stub.pipeline)["scale"] == 3.0
    args["layers"] = [1]
    assert pipeline_calls.guidance_arguments(argparse.Namespace(**args), stub.pipeline) == {
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
    chosen = pipeline_calls.guidance_arguments(args, stub.pipeline)
    assert chosen == {"layers": [2], "formula": "stg"} | NAMED["frugal"]
    args.scale = 0.0
    assert pipeline_calls.guidance_arguments(args, stub.pipeline) == NAMED["frugal"] | {"scale": 0.0}, (
        "no layers needed"
    )


def test_no_scale_has_to_be_given_where_there_is_none(stub, monkeypatch):
    """formula='uncond' has no third pass to scale, and scale 0 has no layers to name."""
    preset = SimpleNamespace(layers=(2,), scale=1.25, part="block", formula="stg", source="here")
    monkeypatch.setattr("skipguide.pipelines.presets.find_preset", lambda model: preset)
    chosen = pipeline_calls.guidance_arguments(argparse.Namespace(formula="uncond"), stub.pipeline)
    assert chosen == {"layers": [2], "scale": 1.0, "part": "block", "formula": "uncond"}
    assert (
        pipeline_calls.guidance_arguments(argparse.Namespace(formula="uncond", scale=2.0), stub.pipeline)["scale"]
        == 2.0
    )
    idle = pipeline_calls.guidance_arguments(argparse.Namespace(scale=0.0, start=0.5), stub.pipeline)
    assert clip_job.in_words(idle) == "scale 0, start 0.5"


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
    assert pipeline_calls.makes_video(pipeline) == video
    if isinstance(call, str):
        with pytest.raises(SkipError, match=call):
            pipeline_calls.call_arguments(pipeline, args, {})
    else:
        found = pipeline_calls.call_arguments(pipeline, args, {})
        assert found.pop("output_type") == "pil"
        assert found.pop("clean_caption", None) in (None, False)
        assert found == call


def test_image_goes_to_the_pipeline(tmp_path):
    from diffusers import WanImageToVideoPipeline

    Image.new("L", (9, 7)).save(tmp_path / "first.png")
    args = build_parser().parse_args(["generate", "p", "--image", str(tmp_path / "first.png")])
    image = pipeline_calls.call_arguments(WanImageToVideoPipeline, args, {})["image"]
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
    assert pipeline_calls.frames_per_second(args, getattr(diffusers, name), defaults, count) == fps
