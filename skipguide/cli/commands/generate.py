"""`skipguide generate`: a clip with skip guidance, or many from a file of prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipguide.cli import clip_job, pipeline_calls, processes, prompt_clips
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

KINDS = ("gif", "mp4", "png")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="make a clip with skip guidance, or many from a file of prompts",
        description="Make a clip with skip guidance, and note next to it (out.gif.json) how it was made.\n"
        "With --prompts, make a folder of clips and a manifest (manifest.jsonl): run the same command again to go on\n"
        "where a killed run stopped, or run it in several processes, also with accelerate launch.",
        epilog=examples(
            'skipguide generate "a red circle moving right"',
            'skipguide generate "a red circle moving right" --layers 5 7 --scale 1.5 --seed 3 -o circle.mp4',
            'skipguide generate "a red circle moving right" --no-guidance -o plain.png    (a contact sheet)',
            'skipguide generate "a tram in the rain" --model Lightricks/LTX-Video --layers 19 --frames 121',
            "skipguide generate --prompts prompts.txt -o clips",
        ),
    )
    add_sampling(parser, optional_prompt=True)
    add_many(parser)
    add_model(parser)
    add_guidance(parser)
    parser.add_argument("--no-guidance", action="store_true", help="the plain pipeline")
    add_output(
        parser,
        ".gif, .mp4, or .png for a contact sheet (default: a gif named after the prompt); with --prompts a folder "
        "(default: named after the file)",
    )
    parser.set_defaults(run=run)


def add_many(parser: argparse.ArgumentParser) -> None:
    """Add the options for many clips from a file of prompts."""
    group = parser.add_argument_group("many clips")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='a prompt on each line, or {"prompt": ..., "seed": ..., "scale": ...} with settings of its own',
    )
    group.add_argument("--kind", choices=KINDS, help="what the clips are (default: gif; png for picture models)")
    group.add_argument("--keep", action="store_true", help="leave clips that were made with other settings as they are")


def run(args: argparse.Namespace) -> None:
    """Make the clip, or the clips."""
    if (args.prompts is None) == (args.prompt is None):
        raise SkipError("exactly one of these is required: prompt, or --prompts FILE")
    if args.no_guidance and (flags := given(args, GUIDANCE_FLAGS)):
        raise SkipError(f"--no-guidance leaves nothing for --{next(iter(flags))} to do: give one of them")
    if args.prompts is not None:
        prompt_clips.run(args)
        return
    if single := [name for name in ("kind", "keep") if getattr(args, name)]:
        raise SkipError(f"--{single[0]} is for many clips: give --prompts FILE, or leave it out")
    processes.refuse_several("generate", "give --prompts FILE to share many clips, or leave accelerate launch out")
    job = clip_job.prepare(args)
    pipeline = job.load()
    settings = {} if args.no_guidance else pipeline_calls.guidance_arguments(args, pipeline)
    made = clip_job.make_clip(job, pipeline, settings)
    sample, images = made.sample, made.sample.images
    clip_job.save_clip(job.output, made.shown, made.fps, made.as_sheet, made.notes)
    what = f"{pipeline_calls.count_in_words(args.frames, len(images))} at {made.fps:g} fps, " if job.video else ""
    what += f"{images[0].width}x{images[0].height}"
    print(f"{job.output}: {what}, seed {args.seed}, {sample.seconds:.1f} s")
    print(f"{made.label}; {sample.summary}" if settings else made.label)
