"""`skipguide bench`: the honest table for a model of one's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipguide.bench.export import EXPORTS, Exported, export
from skipguide.cli.arguments import BUNDLED, GUIDANCE_FLAGS, add_guidance, add_sampling, examples, given, number
from skipguide.cli.bench_kinds import CLASSIFIER, CLIPS, LANGUAGE, OWN_FLAGS, kind_of
from skipguide.cli.outputs import slug
from skipguide.cli.processes import Process, this_process
from skipguide.cli.short_runs import BUNDLED_PROMPTS
from skipguide.errors import SkipError

SEEDS, QUICK_SEEDS = 4, 3
QUICK_PROMPTS = 2


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="does skipping help this model? A table with controls, intervals and a report",
        description="Does skipping help this model? On a diffusion pipeline: plain CFG over a grid of scales first\n"
        "(the best one is the baseline), then skip guidance and its controls, with paired intervals over seeds. On a\n"
        "language model: perplexity per method and size on your text. On a classifier: how often it keeps its class\n"
        "as parts of your pictures are hidden. One folder: clips, results.json, results.csv, sheet.png, report.html.\n"
        "Run the same command again to go on where it stopped, or in several processes to share the work.",
        epilog=examples(
            "skipguide bench tiny-t2v --quick",
            "skipguide bench Lightricks/LTX-Video --prompts prompts.txt --seeds 4 -o ltx-bench",
            "skipguide bench ./my-pipeline --layers 9 --scale 1 --scorer my_scores:clip_score --export vbench",
            "skipguide bench SmolLM2-135M-Instruct.Q4_1.gguf --text notes.txt",
            "skipguide bench resnet50 --images photos",
        ),
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=BUNDLED,
        metavar="MODEL",
        help="a bundled one, a folder, a hub id, a .gguf file, or a name of timm or torchvision (default: %(default)s)",
    )
    group = parser.add_argument_group("size")
    group.add_argument("--quick", action="store_true", help="minutes: fewer scales, prompts, seeds and steps")
    group.add_argument(
        "--seeds",
        metavar="N",
        type=number(int, 2),
        help=f"clips of each prompt (default: {SEEDS}; quick: {QUICK_SEEDS})",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="as generate"
    )
    _add_clips(parser)
    group = parser.add_argument_group("a language model")
    group.add_argument("--text", metavar="FILE", type=Path, help="to measure on (default: of the standard library)")
    group.add_argument("--counts", metavar="N", nargs="+", type=number(int, 1), help="sublayers to leave out")
    group.add_argument("--tokens", metavar="N", type=number(int, 2), help="of a piece of the text (default: 256)")
    group.add_argument("--pieces", metavar="N", type=number(int, 2), help="of the text, to judge on (default: 24)")
    group = parser.add_argument_group("a classifier")
    group.add_argument("--images", metavar="FOLDER", type=Path, help="the pictures")
    group.add_argument("--checkpoint", metavar="FILE", type=Path, help="weights of your own for a named model")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FOLDER", type=Path, help="(default: named after the model)")
    group.add_argument("--force", action="store_true", help="replace results of other settings")
    parser.set_defaults(run=run, fps=None, seed=0)


def _add_clips(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a diffusion pipeline")
    group.add_argument("--prompts", metavar="FILE", type=Path, help="a prompt on each line, as generate takes them")
    group.add_argument("--grid", metavar="W", nargs="+", type=number(float, 1, above=True), help="CFG scales to try")
    group.add_argument(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="a score of your own: function(clips, prompts) gives a number for each clip, or one for all",
    )
    group.add_argument(
        "--judge", metavar="SCORE", help="the score that chooses the baseline (default: your own, if any)"
    )
    group.add_argument("--export", nargs="+", choices=EXPORTS, default=[], help="clips in the folders that these read")
    sampling = argparse.ArgumentParser(add_help=False)
    add_sampling(sampling, optional_prompt=True)
    for action in sampling._actions:
        if action.dest in ("steps", "negative_prompt", "height", "width", "frames", "image"):
            group._add_action(action)
    add_guidance(parser)


def run(args: argparse.Namespace) -> None:
    """Find out what the model is, and measure it."""
    kind = kind_of(args.model)
    for other, flags in OWN_FLAGS.items():
        if other != kind and (strange := [flag for flag in flags if getattr(args, flag) not in (None, [], False)]):
            flag = strange[0].replace("_", "-")
            raise SkipError(f"--{flag} is for {other}, and {args.model} is {kind}: leave it out")
    folder = args.output or Path(f"{slug(Path(args.model).name)}-bench")
    args.seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    process = this_process(args.device)
    try:
        {CLIPS: _clips, LANGUAGE: _language, CLASSIFIER: _classifier}[kind](args, folder, process)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is kept in {folder}; run the same command to go on") from None
    if process.shows:
        print(f"{folder / 'report.html'}: open it in a browser; {folder / 'results.csv'} has the numbers")


def _language(args: argparse.Namespace, folder: Path, process: Process) -> None:
    from skipguide.cli import bench_language

    bench_language.run(args, folder, process)


def _classifier(args: argparse.Namespace, folder: Path, process: Process) -> None:
    from skipguide.cli import bench_masking

    bench_masking.run(args, folder, process)


def _clips(args: argparse.Namespace, folder: Path, process: Process) -> None:
    from skipguide.bench.scorer import Scorer
    from skipguide.cli.bench_clips import ClipBench, grid_of, steps_of
    from skipguide.cli.bench_report import clips_report, verdict
    from skipguide.cli.clip_requests import ClipModel, described
    from skipguide.cli.models import few_threads
    from skipguide.cli.result_cells import open_plan

    scorer = Scorer(args.scorer) if args.scorer is not None else None
    model = ClipModel.of(args.model, process.device, args.dtype)
    lines = _lines(args, model.source.bundled)
    for line in lines:
        described(model, line, None)  # arguments that the pipeline does not take are refused before anything is written
    plan = {
        "bench": "diffusion pipeline",
        **model.made_with,
        "prompts": [line.prompt for line in lines],
        "seeds": args.seeds,
        "grid": grid_of(args, model),
        "steps": steps_of(args, model),
        "quick": args.quick,
        "guidance": given(args, GUIDANCE_FLAGS),
    }
    open_plan(folder, plan, force=args.force)
    bench = ClipBench(args, model, lines, folder, process, scorer)
    with few_threads(model.source, process.device):
        table = bench.run()
        clips_report(table, bench.clips, args.model, folder)
    for suite in args.export:
        with bench.cells.locks.hold(f"export-{suite}") as mine:
            if mine:
                requests = [request for row in table.rows for request in bench.clips.requests(row.setting)]
                clips = (
                    Exported(
                        request.setting.name,
                        request.job.args.prompt,
                        request.number + 1,
                        request.seed,
                        request.frames(),
                        float(request.notes().get("fps") or 8.0),
                    )
                    for request in requests
                )
                export(suite, folder / suite, clips)
    if process.shows:
        print(verdict(table))


def _lines(args: argparse.Namespace, bundled: bool) -> Sequence[argparse.Namespace]:
    """The arguments of every prompt.

    Raises:
        SkipError: for lines with settings that the table varies, or the same prompt twice.
    """
    from skipguide.cli.prompts import read_prompts
    from skipguide.pipelines.calibration import PROMPTS

    base = argparse.Namespace(**{**vars(args), "no_guidance": False, "guidance_scale": None, "zoom": 1})
    if args.prompts is None:
        words: Sequence[str] = BUNDLED_PROMPTS if bundled else PROMPTS
        words = words[:QUICK_PROMPTS] if args.quick else words
        return [argparse.Namespace(**{**vars(base), "prompt": prompt}) for prompt in words]
    lines = read_prompts(args.prompts, base)
    varied = ("seed", "steps", "guidance_scale", "no_guidance", *GUIDANCE_FLAGS)
    for own in lines:
        changed = [name for name in varied if getattr(own, name) != getattr(base, name)]
        if changed:
            raise SkipError(
                f"{args.prompts}: {changed[0]} is what the table varies, and a line of its prompts cannot set it "
                f"({own.prompt!r})"
            )
    if twins := [own.prompt for number, own in enumerate(lines) if own.prompt in [o.prompt for o in lines[:number]]]:
        raise SkipError(f"{args.prompts} has the prompt {twins[0]!r} twice: --seeds makes several clips of each")
    return lines
