"""Calling any diffusers pipeline with the same few flags."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skipguide.cli.arguments import GUIDANCE_FLAGS, given
from skipguide.cli.models import Source
from skipguide.config import number
from skipguide.errors import SkipError
from skipguide.hosts.progress import pace
from skipguide.media.frames import as_images, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

# What pipelines call the things that the flags name.
NAMES = {
    "steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "negative_prompt": ("negative_prompt",),
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames", "video_length"),
    "image": ("image",),
}
# What a preset may say beside layers, scale, part and formula; written down where it is not what holds anyway.
_UNLESS_USUAL = ("start", "stop", "rescale", "guidance_scale")


@dataclass(frozen=True)
class Sample:
    """One clip, and what making it took."""

    images: list[Image]
    seconds: float
    summary: str = "no skip guidance"
    stats: dict[str, Any] = field(default_factory=dict)


def parameters(pipeline_class: type) -> Mapping[str, inspect.Parameter]:
    """The arguments that a pipeline takes."""
    return inspect.signature(pipeline_class.__call__).parameters


def makes_video(pipeline_class: type) -> bool:
    """Whether a pipeline returns clips rather than pictures."""
    return any(name in parameters(pipeline_class) for name in NAMES["frames"])


def call_arguments(pipeline_class: type, args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What to call a pipeline with, besides the prompt and the generator.

    Args:
        pipeline_class: the pipeline's class; its signature says what it takes.
        args: the parsed command line.
        defaults: the model's own arguments; those that the pipeline does not take are left out.

    Raises:
        SkipError: for a flag that was given and that the pipeline does not take.
    """
    taken = parameters(pipeline_class)
    call = {name: value for name, value in defaults.items() if name in taken}
    for flag, value in given(args, tuple(NAMES)).items():
        name = next((name for name in NAMES[flag] if name in taken), None)
        if name is None:
            raise SkipError(f"{pipeline_class.__name__} takes no --{flag.replace('_', '-')}")
        call[name] = open_picture(value) if flag == "image" else value
    if (schedule := getattr(args, "schedule", None)) is not None and getattr(args, "steps", None) is None:
        call["num_inference_steps"] = len(schedule["steps"])
    if args.fps is not None and "frame_rate" in taken:  # LTX is told how fast its clip will be played
        call["frame_rate"] = args.fps
    if "output_type" in taken:
        call["output_type"] = "pil"
    if "clean_caption" in taken and "clean_caption" not in call and not _can_clean_captions():
        call["clean_caption"] = False  # what the pipeline would fall back to, with a warning
    if "image" in taken and "image" not in call and "ImageTo" in pipeline_class.__name__:
        raise SkipError(f"{pipeline_class.__name__} starts from a picture: give it with --image")
    return call


def _can_clean_captions() -> bool:
    from diffusers.utils import is_bs4_available, is_ftfy_available

    return bool(is_bs4_available() and is_ftfy_available())


def frames_per_second(args: argparse.Namespace, pipeline_class: type, defaults: Mapping[str, Any], count: int) -> float:
    """How fast to play a clip: the flag, the model's own rate, or something that suits its length."""
    if args.fps is not None:
        return float(args.fps)
    if (own := defaults.get("fps")) is not None:
        if (value := number(own)) is None or value <= 0:
            raise SkipError(f"expected fps in the model's generation.json as a number above 0; got {own!r}")
        return float(value)
    rate = parameters(pipeline_class).get("frame_rate")
    if rate is not None and (value := number(rate.default)) is not None:
        return float(value)
    return 8.0 if count <= 32 else 16.0


def guidance_arguments(args: argparse.Namespace, pipeline: Any) -> dict[str, Any]:
    """The arguments of `SpatiotemporalSkipGuidance`: the flags, and the preset where a flag is silent.

    What will hold is asked for here, so that what is written down afterwards names the layers: those of the preset,
    or what `auto` took. Layers of one's own do not come with the preset's scale: that was chosen for the preset's
    layers. Where they are the preset's own, its scale and part are taken too, and this is said. A named preset
    (`--preset`) stands for itself, and needs the model's only where it skips layers that it does not name.
    """
    from skipguide.pipelines import SpatiotemporalSkipGuidance
    from skipguide.pipelines.presets import named_settings
    from skipguide.pipelines.settings import DEFAULTS, WINDOWS

    chosen = given(args, GUIDANCE_FLAGS)
    if named := chosen.pop("preset", None):
        own = named_settings(named)
        if "schedule" in chosen:
            own = {name: value for name, value in own.items() if name not in WINDOWS}
        chosen = own | chosen
    if chosen.get("scale") == 0:
        return chosen
    layers = chosen.get("layers")
    if layers in (None, "auto"):
        found = SpatiotemporalSkipGuidance(**chosen).for_pipeline(pipeline)
        if layers == "auto":
            _say(f"--layers auto took {_plain(found.layers)}")
            return chosen | {"layers": _plain(found.layers)}
        names = ["layers", "scale", "part", "formula"]
        names += [name for name in _UNLESS_USUAL if getattr(found, name) != DEFAULTS.get(name)]
        return chosen | {name: _plain(getattr(found, name)) for name in names}
    if {"scale", "part", "formula", "stack"} & set(chosen):
        return chosen
    try:
        preset = SpatiotemporalSkipGuidance().for_pipeline(pipeline)
    except SkipError:
        return chosen
    if tuple(layers) == preset.layers and preset.formula == "stg":
        chosen |= {"scale": _plain(preset.scale), "part": preset.part}
        _say(f"these are the layers of the model's preset, so its scale ({preset.scale}) and part ({preset.part}) hold")
    return chosen


def _plain(value: Any) -> Any:
    """As the notes beside a clip keep it."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _say(what: str) -> None:
    print(f"skipguide: {what}", file=sys.stderr)


def steps_of(job: Any) -> Any:
    """How many steps a job's call takes: as it was given, else the pipeline's own number."""
    given_steps = job.call.get("num_inference_steps")
    if given_steps is not None:
        return given_steps
    taken = parameters(job.pipeline_class).get("num_inference_steps")
    return "?" if taken is None else taken.default


def make_guidance(arguments: Mapping[str, Any]) -> Any:
    """The guidance object itself."""
    from skipguide.pipelines import SpatiotemporalSkipGuidance

    return SpatiotemporalSkipGuidance(**arguments)


def check_frames(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Refuse a number of frames that the denoiser cannot draw: some have one learned place per frame (Latte).

    Raises:
        SkipError: with the number that it draws.
    """
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    drawn, asked = getattr(config, "video_length", None), call.get("video_length")
    if drawn is not None and asked is not None and asked != drawn:
        raise SkipError(f"this model draws clips of {drawn} frames and no others; got --frames {asked}")


def count_in_words(asked: int | None, made: int) -> str:
    """How many frames a clip has, and how many were asked for where the pipeline drew another number.

    >>> count_in_words(8, 9)
    '9 frames (8 asked for, which the pipeline rounds)'
    """
    return f"{made} frames" + (f" ({asked} asked for, which the pipeline rounds)" if asked not in (None, made) else "")


def sample(
    pipeline: Any,
    prompt: str,
    call: Mapping[str, Any],
    seed: int,
    guidance: Any = None,
    *,
    bar: Mapping[str, Any] | None = None,
) -> Sample:
    """Make one clip.

    Args:
        pipeline: a loaded pipeline.
        prompt: the text.
        call: more arguments of the call, from `call_arguments`.
        seed: of a generator on the CPU, so that a clip does not depend on the device's random numbers.
        guidance: skip guidance, or None for the plain pipeline.
        bar: settings of the pipeline's progress bar.

    Raises:
        SkipError: if the guidance or the pipeline refuses.
    """
    import torch

    check_frames(pipeline, call)
    pipeline.set_progress_bar_config(**pace() | dict(bar or {}))
    arguments = {"prompt": prompt, "generator": torch.Generator("cpu").manual_seed(seed), **call}
    begin = time.perf_counter()
    try:
        if guidance is None:
            output = pipeline(**arguments)
            return Sample(_images(output), time.perf_counter() - begin)
        with guidance.apply(pipeline) as applied:
            output = pipeline(**without_native(pipeline), **arguments)
        seconds = time.perf_counter() - begin
    except SkipError:
        raise
    except (ValueError, RuntimeError) as error:  # sizes and lengths that do not suit the model end this way
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise SkipError(f"{type(pipeline).__name__} failed: {error} (--traceback shows where)") from error
    return Sample(_images(output), seconds, str(applied.stats), applied.stats.to_dict())


def without_native(pipeline: Any) -> dict[str, Any]:
    """The arguments that turn off the pipeline's own skip guidance, whose place ours takes."""
    from skipguide.pipelines.registry.described import native_off

    taken = parameters(type(pipeline))
    return {name: value for name, value in native_off(pipeline).items() if name in taken}


def _images(output: Any) -> list[Image]:
    for name in ("frames", "images"):
        if hasattr(output, name):
            # one prompt: the first clip, or the first picture
            return as_images(getattr(output, name)[0])
    raise SkipError(f"the pipeline returned {type(output).__name__}, which has neither frames nor images")


def describe_source(source: Source, pipeline: Any, device: str, dtype: str) -> dict[str, Any]:
    """What is noted of the model next to a result."""
    return {
        "name": source.name,
        "folder": str(source.folder) if source.folder else None,
        "pipeline": type(pipeline).__name__,
        "device": device,
        "dtype": dtype,
    }
