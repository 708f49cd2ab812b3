"""The command line that the guidance benchmarks share: rounds, where the result goes, and writing it as it grows."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from demos.benchmarks.measure import keep_existing, write_json, write_text


def parser_of(description: str | None, out: Path, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every one of them takes; `parse` reads it.

    Args:
        description: the script's docstring.
        out: where the JSON goes unless `--out` says otherwise; the table is beside it.
        rounds: interleaved rounds without `--quick`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: a smoke test")
    parser.add_argument(
        "--rounds", type=int, help=f"interleaved rounds, an even number (default {rounds}; 2 with --quick)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, the steadiest)")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.set_defaults(usual_rounds=rounds)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check; an existing result is kept unless `--force`."""
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.quick else args.usual_rounds)
    if args.rounds % 2 or args.rounds < 2:
        parser.error("--rounds must be even and at least 2")
    keep_existing(args.out, args.force)
    return args


def write_as_it_grows(out: Path, results: Iterable[Mapping[str, Any]], table: Callable[[Any], str]) -> Any:
    """Write every state of a result, print the table of the last one, and return it."""
    data: Mapping[str, Any] = {}
    warnings.filterwarnings("ignore", message="In CPU autocast")
    with torch.no_grad():
        for data in results:
            write_json(out, data)
            write_text(out.with_suffix(".md"), table(data))
    print(table(data))
    return data
