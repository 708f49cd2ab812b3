"""`skipguide compare`: the same seed without and with skip guidance, side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from skipguide.cli import clip_job, pipeline_calls
from skipguide.cli.arguments import add_guidance, add_model, add_output, add_sampling, examples
from skipguide.media import pictures

if TYPE_CHECKING:
    from PIL.Image import Image


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="the same seed without and with skip guidance, side by side",
        description="Make the same clip without and with skip guidance, and put them side by side.",
        epilog=examples(
            'skipguide compare "a red circle moving right"',
            'skipguide compare "a red circle moving right" --layers 5,7 --scale 2 -o compare.mp4',
            'skipguide compare "a red circle moving right" -o compare.png    (rows of frames)',
        ),
    )
    add_sampling(parser)
    add_model(parser)
    add_guidance(parser)
    add_output(parser, ".gif, .mp4, or .png for rows of frames (default: a gif named after the prompt)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make both clips."""
    job = clip_job.prepare(args, ending="-compare")
    pipeline = job.load()
    settings = pipeline_calls.guidance_arguments(args, pipeline)
    guidance = pipeline_calls.make_guidance(settings)
    plain = pipeline_calls.sample(pipeline, args.prompt, job.call, args.seed, bar={"desc": "plain"})
    guided = pipeline_calls.sample(pipeline, args.prompt, job.call, args.seed, guidance, bar={"desc": "guided"})

    fps = pipeline_calls.frames_per_second(args, job.pipeline_class, job.defaults, len(plain.images))
    labels = ["without skip guidance", f"with skip guidance: {clip_job.in_words(settings)}"]
    title = f"{args.prompt} (seed {args.seed})"
    change = pictures.difference(plain.images, guided.images)
    apart, factor = pictures.amplified_difference(plain.images, guided.images)
    clips = [clip_job.enlarged(images, args.zoom) for images in (plain.images, guided.images, apart)]
    shown = pictures.side_by_side(clips, [*labels, f"where they differ, x {factor}"], title)
    notes = job.record(
        pipeline,
        guidance=settings,
        frames=len(plain.images),
        size=list(plain.images[0].size),
        shown=list(shown[0].size),
        fps=fps if job.video else None,
        difference=round(change, 6),
        seconds={"plain": round(plain.seconds, 3), "guided": round(guided.seconds, 3)},
        stats=guided.stats,
    )

    def sheet() -> Image:
        if not job.video:
            return shown[0]
        clips = (plain.images, guided.images, apart)
        rows = [pictures.resized(pictures.pick(clip, 6), clip_job.SHEET_FRAME) for clip in clips]
        numbers = pictures.pick(list(range(len(plain.images))), 6)
        return pictures.contact_sheet(
            rows,
            title=f"{title}\nskip guidance: {clip_job.in_words(settings)}",
            row_labels=["without", "with", f"apart, x {factor}"],
            column_labels=[f"frame {n}" for n in numbers],
        )

    clip_job.save_clip(job.output, shown, fps, sheet, notes)
    print(
        f"{job.output}: without and with skip guidance, seed {args.seed}, {plain.seconds:.1f} s and "
        f"{guided.seconds:.1f} s, mean difference {change:.4f} ({pictures.in_levels(change)})"
    )
    print(f"skip guidance: {clip_job.in_words(settings)}; {guided.summary}")
