"""`skipguide generate`: one clip, with skip guidance."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from skipguide.cli import jobs, sampling
from skipguide.cli.arguments import (
    GUIDANCE_FLAGS,
    add_guidance,
    add_model,
    add_output,
    add_sampling,
    examples,
    given,
)
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="make a clip with skip guidance",
        description="Make a clip with skip guidance, and note next to it (out.gif.json) how it was made.",
        epilog=examples(
            'skipguide generate "a red circle moving right"',
            'skipguide generate "a red circle moving right" --layers 5 7 --scale 1.5 --seed 3 -o circle.mp4',
            'skipguide generate "a red circle moving right" --no-guidance -o plain.png    (a contact sheet)',
            'skipguide generate "a tram in the rain" --model Lightricks/LTX-Video --layers 19 --frames 121',
        ),
    )
    add_sampling(parser)
    add_model(parser)
    add_guidance(parser)
    parser.add_argument("--no-guidance", action="store_true", help="the plain pipeline")
    add_output(parser, ".gif, .mp4, or .png for a contact sheet (default: a gif named after the prompt)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the clip."""
    if args.no_guidance and (flags := given(args, GUIDANCE_FLAGS)):
        raise SkipError(f"--no-guidance leaves nothing for --{next(iter(flags))} to do: give one of them")
    job = jobs.prepare(args)
    pipeline = job.load()
    settings = {} if args.no_guidance else sampling.guidance_arguments(args, pipeline)
    guidance = sampling.make_guidance(settings) if settings else None
    sample = sampling.sample(pipeline, args.prompt, job.call, args.seed, guidance)

    images = sample.images
    fps = sampling.frames_per_second(args, job.pipeline_class, job.defaults, len(images))
    label = f"skip guidance: {jobs.settings(settings)}" if settings else "no skip guidance"
    shown = jobs.enlarged(images, args.zoom)
    notes = job.record(
        pipeline,
        guidance=settings or None,
        frames=len(images),
        size=list(images[0].size),
        shown=list(shown[0].size),
        fps=fps if job.video else None,
        seconds=round(sample.seconds, 3),
        stats=sample.stats,
    )

    def sheet() -> Image:
        title = f"{args.prompt}\n{label}, seed {args.seed}"
        return jobs.sheet(images, title, args.zoom) if job.video else shown[0]

    jobs.save_clip(job.output, shown, fps, sheet, notes)
    what = f"{len(images)} frames at {fps:g} fps, " if job.video else ""
    what += f"{images[0].width}x{images[0].height}"
    print(f"{job.output}: {what}, seed {args.seed}, {sample.seconds:.1f} s")
    print(f"{label}; {sample.summary}" if settings else label)
