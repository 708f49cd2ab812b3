"""`skipguide describe`: a model's blocks, its preset, and what skipping each block costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from skipguide.cli import clip_job, models
from skipguide.cli.arguments import BUNDLED, examples
from skipguide.errors import SkipError

SUBLAYERS = ("attn", "cross_attn", "mlp")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "describe",
        help="a model's blocks, its preset, and what skipping each block costs",
        description="List a model's blocks in execution order. Only configurations are read, no weights.",
        epilog=examples(
            "skipguide describe",
            "skipguide describe Lightricks/LTX-Video",
            "skipguide describe ./my-pipeline/transformer",
        ),
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=BUNDLED,
        metavar="MODEL",
        help="a bundled model's name, the folder of a pipeline or of its transformer, or a hub id "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print one table per denoiser."""
    source = models.resolve(args.model)
    for name, model in models.empty_denoisers(source).items():
        print(describe(name, model))


def describe(name: str, model: Any) -> str:
    """The text for one model.

    Args:
        name: the model's name in its pipeline.
        model: the model; its weights are not looked at.
    """
    from skipguide import find_blocks

    blocks = find_blocks(model)
    preset, line = _preset(model)
    total = len(blocks)
    rows = [("layer", "block", "sublayers", "skipped pass", "step")]
    for i, block in enumerate(blocks):
        # The blocks before the skipped one are replayed: only those after it run again.
        suffix = total - 1 - i
        rows.append(
            (
                f"{i}{'*' if i in preset else ''}",
                block.name,
                " ".join(part for part in SUBLAYERS if part in block.parts),
                f"{suffix}/{total} {suffix / total:4.0%}",
                f"x{1 + suffix / (2 * total):.2f}",
            )
        )
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return "\n".join(
        [
            f"{name}: {type(model).__name__}, {total} blocks, {parameters:,.1f} M parameters",
            "",
            *_aligned(rows, right=(0, 3, 4)),
            "",
            line,
            "skipped pass: the blocks that run again if this one is left out (one more for a part of it).",
            "step: time of a step against classifier-free guidance alone, which runs all blocks twice.",
            "",
        ]
    )


def _preset(model: Any) -> tuple[Sequence[int], str]:
    from skipguide.pipelines.presets import find_preset

    try:
        preset = find_preset(model)
    except SkipError:
        return (), "preset: none; `skipguide sweep PROMPT --model ...` shows what every layer does"
    names = ["layers", "scale", "part", "formula"]
    usual = {"start": 0.0, "stop": 1.0, "rescale": 0.0, "guidance_scale": None}
    names += [name for name, value in usual.items() if getattr(preset, name) != value]
    settings = clip_job.in_words({name: getattr(preset, name) for name in names})
    return preset.numbers, f"preset (*): {settings} ({preset.origin}: {preset.source})"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if j in right else text.ljust(width)
            for j, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
