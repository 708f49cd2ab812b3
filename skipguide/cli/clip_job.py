"""What `generate` and `compare` share: from the arguments to a loaded pipeline, and from a clip to a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.cli import models, pipeline_calls
from skipguide.cli.outputs import (
    check_output,
    plain_arguments,
    replacing,
    sidecar,
    slug,
    versions,
    write_json,
)
from skipguide.errors import SkipError
from skipguide.media import pictures
from skipguide.schedule import Timetable

if TYPE_CHECKING:
    from PIL.Image import Image

CLIPS = (".gif", ".mp4", ".png")
SHEET_FRAME = 128  # pixels: the height of one frame on a sheet


@dataclass(frozen=True)
class ClipJob:
    """Everything that can be checked before the weights are read."""

    args: argparse.Namespace
    source: models.Source
    pipeline_class: type
    defaults: dict[str, Any]
    call: dict[str, Any]
    output: Path
    device: str
    dtype: str

    @property
    def video(self) -> bool:
        """Whether the model makes clips rather than pictures."""
        return pipeline_calls.makes_video(self.pipeline_class)

    def load(self, prompts: Sequence[str] = ()) -> Any:
        """The pipeline with its weights, on the device; `prompts` in place of the job's own, for its vocabulary."""
        pipeline = models.load_pipeline(self.source, self.device, self.dtype)
        words = " ".join(prompts or [self.args.prompt])
        if self.source.bundled and (note := models.vocabulary_note(pipeline.tokenizer, words)):
            print(f"skipguide: {self.source.name} {note}", file=sys.stderr)
        return pipeline

    def record(self, pipeline: Any, **results: Any) -> dict[str, Any]:
        """What goes into the sidecar."""
        return {
            "command": self.args.command,
            "arguments": plain_arguments(self.args),
            "model": pipeline_calls.describe_source(self.source, pipeline, self.device, self.dtype),
            "prompt": self.args.prompt,
            "seed": self.args.seed,
            "call": {name: value for name, value in self.call.items() if name != "image"},
            **results,
            "versions": versions(),
        }


def prepare(args: argparse.Namespace, ending: str = "", suffixes: Sequence[str] = CLIPS) -> ClipJob:
    """Check everything that can be checked without the weights, the output file first.

    Args:
        args: the parsed command line.
        ending: goes after the prompt in the default file name.
        suffixes: the kinds of file that may be written, the default one first.

    Raises:
        SkipError: if something will not work.
    """
    if not args.prompt.strip():
        raise SkipError("expected a prompt in words; got an empty one")
    if args.output is not None:
        check_output(args.output, suffixes, force=args.force)
    source = models.resolve(args.model)
    device = models.choose_device(args.device)
    pipeline_class = models.pipeline_class(source)
    video = pipeline_calls.makes_video(pipeline_class)
    output = args.output
    if output is None:
        output = Path(slug(args.prompt) + ending + (suffixes[0] if video else ".png"))
        check_output(output, suffixes, force=args.force)
    elif not video and output.suffix.lower() != ".png":
        raise SkipError(f"{pipeline_class.__name__} makes pictures, not clips: name a .png with -o")
    defaults = source.defaults()
    call = pipeline_calls.call_arguments(pipeline_class, args, defaults)
    dtype = models.choose_dtype(args.dtype, device, bundled=source.bundled)
    return ClipJob(args, source, pipeline_class, defaults, call, output, device, dtype)


@dataclass(frozen=True)
class MadeClip:
    """One clip that was made, in memory.

    Args:
        sample: what the pipeline returned.
        shown: the frames to play.
        fps: how fast.
        label: the guidance in words.
        as_sheet: makes what a png shows.
        notes: the sidecar.
    """

    sample: pipeline_calls.Sample
    shown: list[Image]
    fps: float
    label: str
    as_sheet: Callable[[], Image]
    notes: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the clip; the suffix decides what it is."""
        write_clip(path, self.shown, self.fps, self.as_sheet)


def make_clip(
    job: ClipJob,
    pipeline: Any,
    guidance: Mapping[str, Any],
    bar: Mapping[str, Any] | None = None,
    *,
    applied: Any = None,
    more: Mapping[str, Any] | None = None,
) -> MadeClip:
    """Make one clip.

    Args:
        job: what is asked for.
        pipeline: loaded.
        guidance: settings of the skip guidance; empty for the plain pipeline.
        bar: settings of the pipeline's progress bar.
        applied: what is applied in place of the guidance that the settings make.
        more: arguments of the pipeline's call that are not noted, such as a callback that watches.
    """
    args = job.args
    applied = applied or (pipeline_calls.make_guidance(guidance) if guidance else None)
    call = {**job.call, **(more or {})}
    with models.few_threads(job.source, job.device):
        sample = pipeline_calls.sample(pipeline, args.prompt, call, args.seed, applied, bar=bar)
    images = sample.images
    fps = pipeline_calls.frames_per_second(args, job.pipeline_class, job.defaults, len(images))
    label = f"skip guidance: {in_words(guidance)}" if guidance else "no skip guidance"
    shown = enlarged(images, args.zoom)
    notes = job.record(
        pipeline,
        guidance=guidance or None,
        frames=len(images),
        size=list(images[0].size),
        shown=list(shown[0].size),
        fps=fps if job.video else None,
        seconds=round(sample.seconds, 3),
        stats=sample.stats,
    )

    def as_sheet() -> Image:
        title = f"{args.prompt}\n{label}, seed {args.seed}"
        return sheet(images, title, args.zoom) if job.video else shown[0]

    return MadeClip(sample, shown, fps, label, as_sheet, notes)


def enlarged(images: Sequence[Image], zoom: int | None) -> list[Image]:
    """Frames at a size that is comfortable to look at, or `zoom` times theirs."""
    height = images[0].height
    return pictures.resized(images, height * (zoom or pictures.comfortable_zoom(height)))


def sheet(images: Sequence[Image], title: str, zoom: int | None) -> Image:
    """One clip on a contact sheet: at most 16 frames, four in a row."""
    height = images[0].height
    height = height * zoom if zoom else min(max(height, SHEET_FRAME), 2 * SHEET_FRAME)
    chosen = pictures.resized(pictures.pick(images, 16), height)
    numbers = pictures.pick(list(range(len(images))), 16)
    rows = [chosen[i : i + 4] for i in range(0, len(chosen), 4)]
    captions = [[f"frame {n}" for n in numbers[i : i + 4]] for i in range(0, len(chosen), 4)]
    return pictures.contact_sheet(rows, title=title, captions=captions)


def save_clip(
    path: Path, frames: Sequence[Image], fps: float, as_sheet: Callable[[], Image], notes: Mapping[str, Any]
) -> None:
    """Write a clip and its sidecar, both or neither.

    Args:
        path: the file; its suffix decides what it is.
        frames: what a gif or an mp4 plays.
        fps: how fast.
        as_sheet: makes what a png shows.
        notes: the sidecar.
    """
    with replacing(path, sidecar(path)) as (clip, json_file):
        write_clip(clip, frames, fps, as_sheet)
        write_json(json_file, dict(notes))


def write_clip(path: Path, frames: Sequence[Image], fps: float, as_sheet: Callable[[], Image]) -> None:
    """Write a gif, an mp4, a webp without loss or, for a png, a sheet."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        as_sheet().save(path)
    elif suffix == ".webp":
        pictures.save_webp(frames, path, fps)
    elif suffix == ".mp4":
        pictures.save_video(frames, path, fps)
    else:
        pictures.save_gif(frames, path, fps)


def _amount_in_words(amount: Any) -> str:
    if isinstance(amount, Timetable) or (isinstance(amount, Mapping) and "points" in amount):
        return "by a timetable"
    if isinstance(amount, Mapping):
        return " and ".join(f"{_amount_in_words(own)} for {name}" for name, own in amount.items())
    return f"{amount:g}"


def _layers_in_words(layers: Any) -> str:
    if isinstance(layers, Timetable) or (isinstance(layers, Mapping) and "points" in layers):
        return "layers by a timetable"
    if isinstance(layers, Mapping):
        return "; ".join(f"{name}: {_layers_in_words(own)}" for name, own in layers.items())
    named = layers if isinstance(layers, str) else ", ".join(map(str, layers))
    return f"layer{'s' if len(layers) > 1 else ''} {named}"


def in_words(guidance: Mapping[str, Any]) -> str:
    """Skip guidance in a few words, for labels."""
    words = []
    if (chosen := guidance.get("layers")) is not None:  # at scale 0 no layer need be named
        words.append(_layers_in_words(chosen))
    words.append(f"scale {_amount_in_words(guidance.get('scale', 1.0))}")
    words += [str(guidance["part"])] if guidance.get("part", "block") != "block" else []
    words += [f"strength {guidance['strength']:g}"] if guidance.get("strength", 1) != 1 else []
    words += [f"heads {' '.join(map(str, guidance['heads']))}"] if guidance.get("heads") else []
    words += [f"{name} {value}" for name, value in (guidance.get("part_options") or {}).items()]
    words += [str(guidance["formula"])] if guidance.get("formula", "stg") != "stg" else []
    others = [name for name in ("rescale", "start", "stop", "every", "cfg_every", "guidance_scale") if name in guidance]
    words += [f"{name.replace('_', ' ')} {_amount_in_words(guidance[name])}" for name in others]
    words += ["cfg from {:g} to {:g}".format(*guidance["cfg_interval"])] if guidance.get("cfg_interval") else []
    words += [f"schedule of {len(guidance['schedule']['steps'])} steps"] if guidance.get("schedule") else []
    return ", ".join(words)
