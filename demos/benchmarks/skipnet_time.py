"""Time against the share of rows that run: does skipping save what it should?

    python -m demos.benchmarks.skipnet_time                  # seven minutes on one CPU core
    python -m demos.benchmarks.skipnet_time --quick --out /tmp/skipnet_time.json

Writes skipnet_time.json and skipnet_time.md. Every share is compared with the plain network in the same round
(interleaved, process seconds, each after one call that is not timed). "rows" is a stack of basic blocks of 64 channels,
decisions given, at 16 and at 56 pixels (the middle of a CIFAR ResNet, the first stage of an ImageNet ResNet); "SkipNet"
is the same stack with its recurrent gates computed (and overruled), by what share of its gated blocks runs. The limit
beside "rows" is the plain network on as many rows: what is above it is the cost of routing, the rest is what small
batches cost by themselves.

The C library's allocator is told to keep freed memory (MALLOC_MMAP_THRESHOLD_, for every variant alike): by default it
returns every activation to the system and faults it in again, which costs more than the gather.

The rows that run are spread evenly over the blocks. At batch 1 the share is one of blocks.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from tqdm import tqdm

from demos.benchmarks.measure import Ratio, interleaved, keep_existing, machine, write_json, write_text
from skipguide.router import Router
from skipguide.vision import SkipNet
from skipguide.vision.skipnet import CifarResNet

HOME = Path(__file__).parent
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0)
BAR = 0.08  # above the share, from 0.25 to 0.9
DENSE_BAR = 0.05  # above the plain network, at 1.0


def spread(share: float, batch: int, blocks: int, seed: int = 0) -> Tensor:
    """Decisions bool `[batch, blocks]` of which that share is True: as many rows in every block, give or take one."""
    random = torch.Generator().manual_seed(seed)
    ends = [round(share * batch * (place + 1)) for place in range(blocks)]
    out = torch.zeros(batch, blocks, dtype=torch.bool)
    for place, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out[torch.randperm(batch, generator=random)[: end - before], place] = True
    return out


class Case:
    """One network at one batch size: the plain call, and calls at every share."""

    def __init__(self, model: nn.Module, x: Tensor, net: SkipNet | None = None) -> None:
        self.model, self.x, self.net = model, x, net
        self.call: Callable[[], object] = partial(model, x)

    @contextmanager
    def plain(self) -> Iterator[None]:
        self.call = partial(self.model, self.x)
        yield

    @contextmanager
    def fewer(self, count: int) -> Iterator[None]:
        """The plain network on some rows only."""
        self.call = partial(self.model, self.x[:count].clone())
        yield

    @contextmanager
    def rows(self, keep: Tensor) -> Iterator[None]:
        columns = list(keep.unbind(1))
        with Router(self.model).running(lambda place, x: columns[place]):
            self.call = partial(self.model, self.x)
            yield

    @contextmanager
    def gated(self, keep: Tensor) -> Iterator[None]:
        assert self.net is not None
        self.call = partial(self.net, self.x, return_routing=True, decisions=keep)
        yield


def measure(case: Case, shares: Sequence[float], rounds: int, calls: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """Median ratio to the plain network for every share."""
    batch = len(case.x)
    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {"plain": case.plain}
    actual: dict[str, float] = {}
    counts: set[int] = set()  # rows whose plain network is the limit
    for share in shares:
        if case.net is None:
            keep = spread(share, batch, len(Router(case.model).blocks))
            variants[str(share)] = partial(case.rows, keep)
            counts |= set(keep.sum(0).tolist())
        else:
            keep = spread(share, batch, len(case.net.gates))
            variants[str(share)] = partial(case.gated, keep)
        actual[str(share)] = float(keep.float().mean())
    counts -= {0, batch}
    variants |= {f"{count} rows": partial(case.fewer, count) for count in sorted(counts)}

    def run() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                case.call()

    @contextmanager
    def warm(variant: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """One call that is not timed: what gates and collected garbage change in Python's caches is no cost of rows."""
        with variant(), torch.inference_mode():
            case.call()
            yield

    clocks = []
    for found in interleaved({name: partial(warm, variant) for name, variant in variants.items()}, run, rounds):
        clocks.append(found)
        bar.update()
    plain = [found["plain"][1] for found in clocks]

    def ratio(name: str) -> dict[str, Any]:
        return Ratio.of([found[name][1] for found in clocks], plain).to_dict()

    of_rows = {0: 0.0, batch: 1.0} | {count: ratio(f"{count} rows")["median"] for count in counts}
    return [
        {
            "share": round(actual[str(share)], 4),
            "time": ratio(str(share)),
            **({"limit": round(between(of_rows, actual[str(share)] * batch), 4)} if case.net is None else {}),
            "plain_ms": round(1000 * sorted(plain)[len(plain) // 2] / calls, 3),
        }
        for share in shares
    ]


def between(times: Mapping[int, float], rows: float) -> float:
    """The time of a number of rows that need not be whole, because blocks have one more or less."""
    rows = round(rows, 4)
    low, high = math.floor(rows), math.ceil(rows)
    return times[low] if low == high else times[low] + (rows - low) * (times[high] - times[low])


def stack(blocks: int) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet([blocks], [64], in_channels=1).eval()  # the stem is under 1 % of one block


# case, pixels, blocks, gates computed, batch -> (rounds, calls per timing)
CASES: tuple[tuple[str, int, int, bool, dict[int, tuple[int, int]]], ...] = (
    ("rows, 16 px", 16, 12, False, {1: (15, 8), 8: (21, 4), 64: (5, 1)}),
    ("rows, 56 px", 56, 4, False, {1: (9, 4), 8: (7, 1), 64: (3, 1)}),
    ("SkipNet, 16 px", 16, 12, True, {1: (7, 8), 8: (7, 4)}),
    ("SkipNet, 56 px", 56, 4, True, {1: (7, 4), 8: (5, 1)}),
)


def compute(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    todo = [(*case[:4], batch, *times) for case in CASES for batch, times in case[4].items()]
    if quick:
        todo = [(name, pixels, 3, gated, batch, 3, 1) for name, pixels, _, gated, batch, *_ in todo if batch < 64]
    with tqdm(total=sum(item[5] for item in todo), desc="rounds") as bar:
        for name, pixels, blocks, gated, batch, rounds, calls in todo:
            torch.manual_seed(1)
            model = stack(blocks)
            net = SkipNet(model, image_size=(1, pixels, pixels)).eval() if gated else None
            found = measure(Case(model, torch.randn(batch, 1, pixels, pixels), net), SHARES, rounds, calls, bar)
            cases.setdefault(name, {})[str(batch)] = found
    allocator = {name: os.environ.get(name) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    return {"cases": cases, "allocator": allocator, "machine": machine()}


def misses(result: dict[str, Any]) -> list[str]:
    """Where the bar is missed in the cases without gates; empty if nowhere."""
    broken = []
    for name, batches in result["cases"].items():
        if not name.startswith("rows"):
            continue
        for batch, found in batches.items():
            for row in found:
                share, time = row["share"], row["time"]["median"]
                bar = share + BAR if 0.24 <= share <= 0.91 else 1 + DENSE_BAR if share == 1 else None
                if bar is not None and time > bar:
                    limit = f"; the plain network on only those rows takes {row['limit']:.3f}" if "limit" in row else ""
                    broken.append(f"{name}, batch {batch}, share {share:.2f}: {time:.3f}, bar {bar:.3f}{limit}")
    return broken


def text(result: dict[str, Any]) -> str:
    """The table."""
    lines = ["Time relative to the plain network, median over the rounds, by share of the rows that run; in brackets"]
    lines += ["the limit, the plain network on so many rows only. What is above it is the cost of routing.", ""]
    lines += ["| case | batch | plain, ms | " + " | ".join(f"{share:g}" for share in SHARES) + " |"]
    lines += ["|---|---:|---:|" + "---:|" * len(SHARES)]
    for name, batches in result["cases"].items():
        for batch, found in batches.items():
            times = " | ".join(
                f"{row['time']['median']:.2f}" + (f" ({row['limit']:.2f})" if "limit" in row else "") for row in found
            )
            lines.append(f"| {name} | {batch} | {found[0]['plain_ms']:g} | {times} |")
    broken = misses(result)
    lines += ["", f"The bar: at most {BAR} above the share from 0.25 to 0.9, at most {1 + DENSE_BAR} at 1. "]
    lines[-1] += "It holds in every case without gates." if not broken else "It is missed here:"
    lines += ["", *(f"- {line}" for line in broken)] if broken else []
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four blocks, few rounds")
    parser.add_argument("--out", type=Path, default=HOME / "skipnet_time.json")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    args = parser.parse_args(argv)
    if argv is None and not ALLOCATOR.items() <= os.environ.items():  # read when a process starts: start again
        command = [sys.executable, "-m", "demos.benchmarks.skipnet_time", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ALLOCATOR)
    keep_existing(args.out, args.force)
    result = compute(args.quick)
    write_json(args.out, result)
    write_text(args.out.with_suffix(".md"), text(result))
    print(text(result))


if __name__ == "__main__":
    main()
