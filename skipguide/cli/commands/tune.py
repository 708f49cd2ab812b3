"""`skipguide tune`: search what may be left out at which step, for a share of the blocks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipguide.cli import models, pipeline_calls, short_runs
from skipguide.cli.arguments import add_guidance, examples, number
from skipguide.cli.outputs import check_output, plain_arguments, replacing, sidecar, slug, versions, write_json
from skipguide.errors import SkipError


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="search a schedule: which passes and blocks to leave out at which step",
        description="Run the pipeline with its guidance once per prompt. Then search, step by step, which passes are\n"
        "left out or made of earlier ones and which blocks run, until only the share --budget of the blocks is left:\n"
        "always the change that moves the final latents least per block saved. Writes the schedule as JSON, for\n"
        "generate --schedule half.json and the other commands with skip guidance, and notes beside it.",
        epilog=examples(
            "skipguide tune",
            "skipguide tune --budget 0.5 --steps 12 --preset frugal -o half.json",
            'skipguide tune ./my-pipeline --layers 9 --prompts "a tram in the rain" "a dog on a beach"',
        ),
    )
    short_runs.add_pipeline(parser)
    parser.add_argument(
        "--budget",
        metavar="X",
        type=number(float, 0.05, 1, above=True),
        default=0.6,
        help="share of the blocks that the guided run takes now (default: %(default)s)",
    )
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="one run each (default: three)")
    parser.add_argument("--passes-only", action="store_true", help="leave whole passes out only, no single blocks")
    parser.add_argument("--steps", metavar="N", type=number(int, 1), help="of a run, and so of the schedule")
    short_runs.add_call(parser)
    add_guidance(parser)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="a .json (default: named after the model)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run, fps=None)


PROMPTS = ("a red ball rolling over grass", "a woman walking along a street in the rain", "a ship on a stormy sea")


def run(args: argparse.Namespace) -> None:
    """Search, print, write."""
    if args.schedule is not None:
        raise SkipError("--schedule is what this command makes: leave it out")
    short_runs.check_prompts(args)
    output = args.output or Path(f"{slug(Path(args.model).name)}-schedule.json")
    check_output(output, (".json",), force=args.force)
    from skipguide.pipelines.tuning.tune import tune

    source, pipeline, call = short_runs.load(args)
    pipeline_calls.check_frames(pipeline, call)
    pipeline.set_progress_bar_config(disable=True)
    guidance = pipeline_calls.guidance_arguments(args, pipeline)
    prompts = args.prompts or (short_runs.BUNDLED_PROMPTS[:3] if source.bundled else PROMPTS)
    shared = call | {"output_type": "latent"} | pipeline_calls.without_native(pipeline)
    calls = [shared | {"prompt": prompt, "seed": args.seed + place} for place, prompt in enumerate(prompts)]
    applied = pipeline_calls.make_guidance(guidance)
    with models.few_threads(source, pipeline.device.type):
        tuned = tune(pipeline, calls, args.budget, guidance=applied, blocks=not args.passes_only)

    print(tuned)
    with replacing(output, sidecar(output)) as (schedule, notes):
        write_json(schedule, tuned.schedule.to_dict())
        path = [{"share": each.share, "damage": each.damage} for each in tuned.path]
        found = {"share": tuned.share, "error": tuned.error, "runs": tuned.runs, "path": path}
        write_json(
            notes,
            {
                "command": "tune",
                "arguments": plain_arguments(args),
                "guidance": guidance,
                "prompts": list(prompts),
                **found,
                "versions": versions(),
            },
        )
    print(f"{output}: {tuned.share:.0%} of the blocks, {len(tuned.schedule.steps)} steps; for --schedule {output}")
