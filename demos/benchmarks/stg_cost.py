"""What Spatiotemporal Skip Guidance costs, side by side with the other ways to run it.

    python -m demos.benchmarks.stg_cost                      # five models, some ten minutes on one CPU core
    python -m demos.benchmarks.stg_cost --quick --out /tmp/stg_cost.json
    python -m demos.benchmarks.stg_cost --models ltx wan --rounds 20 --force

Writes stg_cost.json and stg_cost.md. With a CUDA device the models are LTX-2B and Wan-1.3B at their released sizes
in bfloat16; that path has not been run by its authors yet.

Per model, on the stock pipeline with random weights: plain CFG; a naive full third pass; one batch [u, c, k] (the
authors' code); diffusers' skip hook with every branch by itself (its SkipLayerGuidance); ours at the preset layer and
at a deeper one; ours at scale 0. First everything that is not time: the same latents, blocks run, peak memory. Then
the time, interleaved over all variants.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demos.benchmarks.command import parse, parser_of, write_as_it_grows
from demos.benchmarks.measure import machine
from demos.benchmarks.stg_cost_bars import overall
from demos.benchmarks.stg_cost_blocks import VARIANTS
from demos.benchmarks.stg_cost_entry import entry_of
from demos.benchmarks.stg_cost_subject import SCALE, Subject
from demos.benchmarks.stg_cost_table import table
from demos.benchmarks.stg_models import BY_NAME, CASES

HERE = Path(__file__).parent


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the benchmark; yields the results so far after every second round."""
    cuda = torch.cuda.is_available()
    size = "quick" if args.quick else "cuda" if cuda else "cpu"
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    if not cuda:
        torch.set_num_threads(args.threads)
    settings = {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "steps": args.steps,
        "scale": SCALE,
        "clock": "wall" if cuda or args.threads > 1 else "process",
    }
    cases = [BY_NAME[name] for name in args.models] if args.models else list(CASES)
    cases = [case for case in cases if size in case.sizes]
    start = machine()
    subjects: list[tuple[Subject, dict[str, dict[str, Any]]]] = []
    with tqdm(total=len(VARIANTS) * len(cases), desc="inspect", file=sys.stderr) as bar:
        for case in cases:
            subject = Subject.build(case, size, args.steps, device, dtype)
            subjects.append((subject, subject.inspect(_reporter(bar, case.name))))
    loads = []
    with tqdm(total=len(VARIANTS) * len(cases) * args.rounds, desc="time", file=sys.stderr) as bar:
        for done in range(2, args.rounds + 1, 2):
            for subject, _ in subjects:
                subject.time(_reporter(bar, subject.case.name))
            loads.append(round(os.getloadavg()[0], 2))
            models = [entry_of(subject, found, settings["clock"]) for subject, found in subjects]
            yield {
                "benchmark": "stg_cost",
                "machine": start | {"load_average_while_timing": list(loads)},
                "settings": settings | {"rounds": done},
                "bars": overall(models),
                "models": models,
            }


def _reporter(bar: tqdm, model: str) -> Callable[[str], None]:
    def report(variant: str) -> None:
        bar.set_postfix_str(f"{model}: {variant}")
        bar.update()

    return report


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, write."""
    parser = parser_of(__doc__, HERE / "stg_cost.json", rounds=8)
    parser.add_argument("--models", nargs="+", choices=sorted(BY_NAME), help="default: all")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of a call (default 2)")
    args = parse(parser, argv)
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    data = write_as_it_grows(args.out, measure(args), table)
    for name, bar in data["bars"].items():
        print("passed" if bar["passed"] else "MISSED", name, bar)


if __name__ == "__main__":
    main()
