"""Short runs: what commands share that call a pipeline a few times to learn something of it (rank, tune)."""

from __future__ import annotations

import argparse
from typing import Any

from skipguide.cli import models, pipeline_calls
from skipguide.cli.arguments import BUNDLED, DTYPES, number
from skipguide.errors import SkipError

# what the bundled video model knows
BUNDLED_PROMPTS = (
    "a large red circle moving right on a black background",
    "a small blue square moving up on stripes",
    "a large green star circling on a checkerboard",
    "a small purple ring growing on a grey gradient",
)


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    """Add the model, by its place."""
    parser.add_argument(
        "model", nargs="?", default=BUNDLED, metavar="MODEL", help="as for generate --model (default: %(default)s)"
    )


def add_call(parser: argparse.ArgumentParser) -> None:
    """Add what the pipeline is called with, beside prompts and steps, and where and how it runs."""
    parser.add_argument("--guidance-scale", metavar="X", type=number(float), help="classifier-free guidance")
    parser.add_argument("--height", metavar="N", type=number(int, 1), help="in pixels")
    parser.add_argument("--width", metavar="N", type=number(int, 1), help="in pixels")
    parser.add_argument("--frames", metavar="N", type=number(int, 1), help="length of the clip")
    parser.add_argument("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="as for generate")


def check_prompts(args: argparse.Namespace) -> None:
    """Refuse an empty prompt.

    Raises:
        SkipError: if there is one.
    """
    if any(not text.strip() for text in args.prompts or ()):
        raise SkipError("expected prompts in words; one of --prompts is empty")


def load(args: argparse.Namespace) -> tuple[models.Source, Any, dict[str, Any]]:
    """Where the model comes from, its pipeline, and the arguments of the call, which are checked before it is loaded.

    Raises:
        SkipError: for a model that is not to be had, or flags that its pipeline does not take.
    """
    source = models.resolve(args.model)
    device = models.choose_device(args.device)
    call = pipeline_calls.call_arguments(models.pipeline_class(source), args, source.defaults())
    dtype = models.choose_dtype(args.dtype, device, bundled=source.bundled)
    return source, models.load_pipeline(source, device, dtype), call
