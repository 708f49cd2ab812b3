"""Time of a routed ResNet-110 against the share of its blocks' rows that run, on pictures of 32 pixels.

    python -m demos.benchmarks.skipnet_resnet110             # five minutes on one CPU core
    python -m demos.benchmarks.skipnet_resnet110 --quick --out /tmp/skipnet_resnet110.json

Writes skipnet_resnet110.json. The network of the paper's main table as it is used: its recurrent gates are computed and
their decisions replaced by given ones, as many rows in every block, others each time. Compared with the plain network
in the same round, as in `skipnet_time`, with its allocator and its three processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from demos.benchmarks.measure import keep_existing, machine, write_json
from demos.benchmarks.skipnet_time import PROCESSES, Gated, in_processes, measure, pooled
from skipguide.vision import skipnet

SHARES = (1.0, 0.75, 0.5, 0.25)
AIM = 0.53  # at a share of one half
HOME = Path(__file__).parent


def part(batch: int, rounds: int) -> list[dict[str, Any]]:
    """What one process measures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = Gated(skipnet("resnet110").eval(), torch.randn(batch, 3, 32, 32))
    with tqdm(total=rounds, desc="rounds") as bar:
        return measure(case, SHARES, rounds, 1, False, bar)


def compute(batch: int, rounds: int) -> dict[str, Any]:
    """All processes, one after the other."""
    parts = in_processes("demos.benchmarks.skipnet_resnet110", "--part", str(batch), str(rounds))
    return {"batch": batch, "rows": pooled(parts), "aim_at_half": AIM, "processes": PROCESSES, "machine": machine()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a batch of 4, one round")
    parser.add_argument("--out", type=Path, default=HOME / "skipnet_resnet110.json")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.add_argument("--part", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        json.dump(part(*args.part), sys.stdout)
        return
    keep_existing(args.out, args.force)
    result = compute(4, 1) if args.quick else compute(128, 5)
    write_json(args.out, result)
    for row in result["rows"]:
        print(f"share {row['share']:.2f}: {row['time']['median']:.3f} of the plain network's time")


if __name__ == "__main__":
    main()
