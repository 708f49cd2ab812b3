"""`skipguide rank`: score every layer and part of a model in one short run, for choosing what to skip."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipguide.cli import models, pipeline_calls, short_runs
from skipguide.cli.arguments import Default, examples, number
from skipguide.cli.outputs import check_output, plain_arguments, replacing, sidecar, slug, versions, write_json
from skipguide.errors import SkipError
from skipguide.hosts.progress import pace
from skipguide.parts import PARTS

LEVELS = 4


def register(subparsers: Any) -> None:
    """Add the command."""
    from skipguide.select import DEFAULT_SCORE, SCORES

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "rank",
        help="score every layer and part: what skipping it does, and what it costs",
        description="Run the pipeline plainly once per prompt; at a few noise levels leave out every layer and part\n"
        "in turn and score the effect. Prints a table, writes a plot, its figures (CSV, JSON), and caches them for\n"
        'layers="auto".',
        epilog=examples(
            "skipguide rank",
            "skipguide rank Lightricks/LTX-Video --parts block attn_identity -o ltx.png",
            "skipguide rank ./my-pipeline --score thrift --fresh --force",
        ),
    )
    short_runs.add_pipeline(parser)
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="one run each (default: two)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="only these parts (default: all)")
    parser.add_argument(
        "--score",
        choices=tuple(SCORES),
        default=DEFAULT_SCORE,
        help="what to order by (default: %(default)s)",
    )
    parser.add_argument("--steps", metavar="N", type=number(int, 1), default=8, help="of a run (default: %(default)s)")
    parser.add_argument(
        "--levels",
        metavar="N",
        type=number(int, 1),
        default=Default(LEVELS),
        help="steps that are scored (default: %(default)s, or all --steps if they are fewer)",
    )
    short_runs.add_call(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="score anew even if the scores of these weights are cached"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="a .png (default: named after the model)")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run, fps=None)


def run(args: argparse.Namespace) -> None:
    """Score, print, plot."""
    if args.levels > args.steps:
        if not isinstance(args.levels, Default):
            raise SkipError(
                f"expected --levels of at most the {args.steps} --steps that can be scored; got {args.levels}"
            )
        args.levels = args.steps  # what the notes say
    short_runs.check_prompts(args)
    output = args.output or Path(f"{slug(Path(args.model).name)}-rank.png")
    table = output.with_suffix(".csv")
    check_output(output, (".png",), force=args.force)
    check_output(table, (".csv",), force=args.force, notes=False)
    pyplot = _pyplot()
    source, pipeline, call = short_runs.load(args)
    prompts = args.prompts or (short_runs.BUNDLED_PROMPTS if source.bundled else None)
    with models.few_threads(source, pipeline.device.type):
        scores = _scores(args, pipeline, call, prompts)

    print(f"{scores.model}: {scores.blocks} blocks, by {args.score}")
    print(scores.table(args.score))
    print('space, time: change of the low/high frequencies; cost: share of a pass; layers="auto" takes the first row')
    with replacing(output, table, sidecar(output)) as (picture, rows, notes):
        _plot(pyplot, scores, args.score, picture)
        _write(scores, args.score, rows)
        write_json(notes, {"arguments": plain_arguments(args), "scores": scores.to_dict(), "versions": versions()})
    print(f"{output}, {table}")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SkipError("the plot needs matplotlib: pip install 'skipguide[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _scores(args: argparse.Namespace, pipeline: Any, call: dict[str, Any], prompts: Sequence[str] | None) -> Any:
    """From the cache, or from a run that then goes into it."""
    from skipguide.pipelines.calibration import PROMPTS, cached_scores, calibrate, keep_scores

    denoisers = models.denoisers(pipeline)
    if not denoisers:
        raise SkipError(f"{type(pipeline).__name__} has no denoiser that skip guidance knows")
    model = next(iter(denoisers.values()))
    own_run = args.parts or args.prompts
    if not args.fresh and not own_run and (found := cached_scores(model)) is not None:
        print("from the cache (--fresh scores anew)")
        return found
    settings = {"num_inference_steps": args.steps, "output_type": "latent"} | {
        name: value for name, value in call.items() if name not in ("num_inference_steps", "output_type")
    }
    pipeline_calls.check_frames(pipeline, call)
    pipeline.set_progress_bar_config(desc="every block, one prompt", **pace())
    scores = calibrate(
        pipeline, prompts or PROMPTS, parts=args.parts, levels=args.levels, call=settings, seed=args.seed
    )
    if not args.parts:
        keep_scores(model, scores)
    return scores


def _plot(pyplot: Any, scores: Any, score: str, path: Path) -> None:
    """Three panels over the layers, one line per part: the effect, its direction, the score."""
    from skipguide.select import LIMIT, SCORES, TOLERANCE

    parts = list(dict.fromkeys(row.part for row in scores.rows))
    panels = ("effect |c − k| / |c|", "cosine of c − k with c − u", f"score: {score} (higher is taken first)")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for part in parts:
        rows = scores.select(part)
        layers = [row.layer for row in rows]
        axes[0].plot(layers, [row.effect for row in rows], "o-", ms=3, label=part)
        if all(row.alignment is not None for row in rows):
            axes[1].plot(layers, [row.alignment for row in rows], "o-", ms=3)
        (line,) = axes[2].plot(layers, [SCORES[score](row) for row in rows], "o-", ms=3)
        strong = [row for row in rows if row.effect > LIMIT]
        values = [SCORES[score](row) for row in strong]
        axes[2].plot([row.layer for row in strong], values, "o", ms=7, mfc="white", color=line.get_color())
    axes[0].axhline(LIMIT, color="grey", ls=":", lw=1, label=f"effect {LIMIT:g}: beyond it a skip breaks the model")
    axes[0].set_yscale("log")
    best = scores.rank(score)[0]
    near = f"(scores within {100 * TOLERANCE:.0f} % are equal: the deeper layer is cheaper)"
    axes[2].plot(
        [best.layer], [SCORES[score](best)], "k*", ms=12, label=f"taken first: {best.layer} {best.part} {near}"
    )
    axes[2].plot([], [], "o", ms=7, mfc="white", color="grey", label=f"effect above {LIMIT:g}: ranked last")
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    figure.suptitle(
        f"{scores.model}: what leaving out a layer does to a prediction\n"
        "c: with the prompt, u: without it, k: with the prompt and the layer's part left out",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _write(scores: Any, score: str, path: Path) -> None:
    from dataclasses import asdict

    from skipguide.select import SCORES

    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [{"rank": n, score: SCORES[score](row)} | asdict(row) for n, row in enumerate(scores.rank(score), 1)]
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
