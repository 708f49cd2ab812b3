"""The parser of the command line: help, wrong arguments, which model is taken, what a pipeline is called with."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import cli_stub
from helpers.cli_stub import one_line
from PIL import Image

from skipguide import SkipError
from skipguide.cli import COMMANDS, arguments, build_parser, clip_job, main, models, pipeline_calls
from skipguide.pipelines.presets import Preset

# The parser of the command line: help, examples, wrong arguments.


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


# Which model the command line takes, on which device, in which precision.

stub = cli_stub.stub


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
        "bad": "expected JSON in bad/model_index.json",
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


def test_bundled_name_is_the_default(tmp_path, monkeypatch):
    assert build_parser().parse_args(["generate", "p"]).model == arguments.BUNDLED
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr("skipguide.assets.bundled", lambda name: tmp_path / "assets" / name)
    assert models.resolve("shipped") == models.Source("shipped", tmp_path / "assets" / "shipped", bundled=True)
    assert not models.resolve("./shipped").bundled


# What a pipeline is called with: flags, the model's defaults, presets.


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
    preset = Preset((2,), 1.25, "here")
    monkeypatch.setattr("skipguide.pipelines.stg.find_preset", lambda model, pipe: preset)
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
    preset = Preset((2,), 1.25, "here")
    monkeypatch.setattr("skipguide.pipelines.stg.find_preset", lambda model, pipe: preset)
    args = argparse.Namespace(preset="frugal", start=None, scale=None)
    chosen = pipeline_calls.guidance_arguments(args, stub.pipeline)
    assert chosen == {"layers": [2], "formula": "stg", "scale": 1.25, "part": "block"} | NAMED["frugal"], chosen
    args.scale = 0.0
    assert pipeline_calls.guidance_arguments(args, stub.pipeline) == NAMED["frugal"] | {"scale": 0.0}, (
        "no layers needed"
    )


def test_no_scale_has_to_be_given_where_there_is_none(stub, monkeypatch):
    """formula='uncond' has no third pass to scale, and scale 0 has no layers to name."""
    preset = Preset((2,), 1.25, "here")
    monkeypatch.setattr("skipguide.pipelines.stg.find_preset", lambda model, pipe: preset)
    chosen = pipeline_calls.guidance_arguments(argparse.Namespace(formula="uncond"), stub.pipeline)
    assert chosen == {"layers": [2], "scale": 1.0, "part": "block", "formula": "uncond"}
    with pytest.raises(SkipError, match="no third pass"):
        pipeline_calls.guidance_arguments(argparse.Namespace(formula="uncond", scale=2.0), stub.pipeline)
    idle = pipeline_calls.guidance_arguments(argparse.Namespace(scale=0.0, start=0.5), stub.pipeline)
    assert clip_job.in_words(idle) == "scale 0, start 0.5"


def test_perturbations_and_their_options():
    """From flags and from a line of a file of prompts; what is said goes into the words beside a clip."""
    flags = "--layers 2 --part window_space --strength 0.5 --heads 0,2-3 --part-options window=[2,3]"
    taken = build_parser().parse_args(["generate", "p", *flags.split()])
    chosen = {name: getattr(taken, name) for name in ("layers", "part", "strength", "heads", "part_options")}
    assert (taken.heads, taken.part_options) == ([0, 2, 3], {"window": [2, 3]})
    settings = pipeline_calls.make_guidance(chosen)
    assert settings.part_options == {"window": (2, 3)} and settings.heads == (0, 2, 3)
    words = clip_job.in_words(chosen | {"scale": 1.0})
    assert words == "layer 2, scale 1, window_space, strength 0.5, heads 0 2 3, window [2, 3]"
    swap = build_parser().parse_args(["generate", "p", "--part-options", "over=space", "ratio=0.2"])
    assert swap.part_options == {"over": "space", "ratio": 0.2}


def test_a_scale_each_for_video_and_sound():
    taken = build_parser().parse_args(["generate", "p", "--scale", "video=1,audio=0.5"])
    assert taken.scale == {"video": 1.0, "audio": 0.5}
    assert build_parser().parse_args(["generate", "p", "--scale", "-1.5"]).scale == -1.5
    assert clip_job.in_words({"layers": [28], "scale": taken.scale}) == "layer 28, scale 1 for video and 0.5 for audio"
    for wrong in ("video", "video=", "=1", "video=1,video=2", "video=1,", "video=nan"):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["generate", "p", "--scale", wrong])


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
        ("WanImageToVideoPipeline", True, "--image nothing.png", "nothing.png is not a readable picture"),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generat", "a circle"], "did you mean generate?"),
        (
            ["generate", "a circle", "--layer", "3"],
            "skipguide generate: unrecognized arguments: --layer 3: did you mean --layers",
        ),
        (
            ["llm", "x", "--skipratio", "0.1"],
            "skipguide llm generate: unrecognized arguments: --skipratio 0.1: did you mean",
        ),
        (["compare", "a circle", "--zzz"], "unrecognized arguments: --zzz; see skipguide compare --help"),
        (["generate", "--prompt", "a"], "--prompt: the prompt is given without a flag; see skipguide generate --help"),
        (["segment", "--image", "a.png"], "--image: the image is given without a flag; see skipguide segment --help"),
        (["llm"], "skipguide llm generate: the following arguments are required: prompt"),
    ],
)
def test_a_flag_or_command_that_is_not_known_is_answered_with_what_is_like_it(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err
