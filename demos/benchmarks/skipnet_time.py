"""Time against the share of rows that run: does skipping save what it should?

    python -m demos.benchmarks.skipnet_time                  # eleven minutes on one CPU core
    python -m demos.benchmarks.skipnet_time --quick --out /tmp/skipnet_time.json
    python -m demos.benchmarks.skipnet_time --join monday.json tuesday.json friday.json --force

Writes skipnet_time.json and skipnet_time.md. Every share is compared with the plain network in the same round
(interleaved, process seconds, each after one call that is not timed). The blocks are basic blocks of 64 channels, at 16
and at 56 pixels (the middle of a CIFAR ResNet, the first stage of an ImageNet ResNet). Decisions are given:

- "even": as many rows in every block, others each time. The bar is for these.
- "independent": the rows that run are drawn from all rows of all blocks, a new draw for every call. The batches change
  their size from block to block then, which the plain blocks pay for too.

"SkipNet" is a network of such blocks with its recurrent gates computed (and overruled), by what share of its gated
blocks runs. The limit in brackets is every plain block on as many rows, one after the other and nothing else: what is
above it is the cost of routing, the rest is what small batches cost by themselves.

The rounds are shared by three processes: where a process happens to lie in memory is worth a hundredth. So is the hour:
`--join` makes one result of several whole runs, the median of their medians, and keeps every run's beside it.

The C library's allocator is told to keep freed memory (MALLOC_MMAP_THRESHOLD_, for every variant alike): by default it
returns every activation to the system and faults it in again, which costs more than the gather.

At batch 1 the share is one of blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

from demos.benchmarks.measure import Ratio, interleaved, keep_existing, machine, write_json, write_text
from skipguide import BlockSpec, register_blocks
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


def scatter(share: float, batch: int, blocks: int, seed: int = 0) -> Tensor:
    """Decisions bool `[batch, blocks]` of which that share is True, wherever chance puts it."""
    random = torch.Generator().manual_seed(seed)
    places = torch.randperm(batch * blocks, generator=random)
    return (places < round(share * batch * blocks)).view(batch, blocks)


DRAWS: dict[str, Callable[[float, int, int, int], Tensor]] = {"even": spread, "independent": scatter}


class Blocks(nn.Module):
    """A stack of basic blocks and nothing else: `[B, channels, H, W]` in and out."""

    def __init__(self, count: int, channels: int = 64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(BasicBlock(channels, channels) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


register_blocks(Blocks, BlockSpec("blocks", streams=("x",)))


class Rows:
    """A network at one batch size: the plain call, and calls that route rows as drawn."""

    def __init__(self, model: Blocks, x: Tensor, draw: str, calls: int) -> None:
        self.plain_model: nn.Module = model
        self.model, self.x, self.draw, self.calls = model, x, DRAWS[draw], calls
        self.call: Callable[[], object] = partial(model, x)

    def decisions(self, share: float) -> list[Tensor]:
        """Bool `[batch, blocks]`, for every call of a timing."""
        return [self.draw(share, len(self.x), len(self.model.blocks), seed) for seed in range(self.calls)]

    @contextmanager
    def plain(self) -> Iterator[None]:
        self.call = partial(self.plain_model, self.x)
        yield

    @contextmanager
    def limit(self, decisions: Sequence[Tensor]) -> Iterator[None]:
        """Every plain block on as many rows as are decided, and nothing else."""
        draws = cycle([keep.sum(0).tolist() for keep in decisions])

        def call() -> None:
            for block, count in zip(self.model.blocks, next(draws), strict=True):
                if count:
                    block(self.x[:count])

        self.call = call
        yield

    @contextmanager
    def at(self, decisions: Sequence[Tensor]) -> Iterator[None]:
        """The calls obey one set of decisions after the other."""
        draws = cycle([list(keep.unbind(1)) for keep in decisions])
        columns: list[Tensor] = []

        def decide(place: int, x: Tensor) -> Tensor:
            nonlocal columns
            if place == 0:
                columns = next(draws)
            return columns[place]

        with Router(self.model).running(decide):
            self.call = partial(self.model, self.x)
            yield


class Gated(Rows):
    """A SkipNet, its gates computed and overruled; the plain network is its backbone."""

    def __init__(self, net: SkipNet, x: Tensor) -> None:
        self.net, self.plain_model, self.x = net, net.backbone, x
        self.call = partial(net.backbone, x)

    def decisions(self, share: float) -> list[Tensor]:
        return [spread(share, len(self.x), len(self.net.gates))]

    @contextmanager
    def at(self, decisions: Sequence[Tensor]) -> Iterator[None]:
        self.call = partial(self.net, self.x, return_routing=True, decisions=decisions[0])
        yield


def measure(
    case: Rows, shares: Sequence[float], rounds: int, calls: int, limits: bool, bar: tqdm[Any]
) -> list[dict[str, Any]]:
    """For every share, the ratios to the plain network in the rounds."""
    decisions = {share: case.decisions(share) for share in shares}
    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {"plain": case.plain}
    variants |= {str(share): partial(case.at, chosen) for share, chosen in decisions.items()}
    if limits:
        variants |= {f"{share} limit": partial(case.limit, chosen) for share, chosen in decisions.items()}

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
        clocks.append({name: seconds for name, (_, seconds) in found.items()})
        bar.update()

    def row(share: float) -> dict[str, Any]:
        out: dict[str, Any] = {"share": round(float(torch.cat(decisions[share], 1).float().mean()), 4)}
        out["time"] = [found[str(share)] / found["plain"] for found in clocks]
        if limits:
            out["limit"] = [found[f"{share} limit"] / found["plain"] for found in clocks]
        return out | {"plain_ms": [1000 * found["plain"] / calls for found in clocks]}

    return [row(share) for share in shares]


def pooled(parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several processes as one: medians over all rounds."""

    def row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        every = {key: [value for part in rows for value in part[key]] for key in rows[0] if key != "share"}
        out = {"share": rows[0]["share"], "time": Ratio.of(every["time"], [1.0] * len(every["time"])).to_dict()}
        if "limit" in every:
            out["limit"] = round(statistics.median(every["limit"]), 5)
        return out | {"plain_ms": round(statistics.median(every["plain_ms"]), 3)}

    return [row(rows) for rows in zip(*parts, strict=True)]


PROCESSES = 3  # the rounds are shared by: where the memory of a process happens to lie is worth a hundredth

# case, pixels, blocks, decisions ("gates": a SkipNet), batch -> (rounds of a process, calls per timing)
CASES: tuple[tuple[str, int, int, str, dict[int, tuple[int, int]]], ...] = (
    ("even, 16 px", 16, 12, "even", {1: (5, 8), 8: (15, 4), 64: (2, 1)}),
    ("even, 56 px", 56, 4, "even", {1: (3, 4), 8: (3, 1), 64: (1, 1)}),
    ("independent, 16 px", 16, 12, "independent", {8: (7, 8)}),
    ("independent, 56 px", 56, 4, "independent", {8: (3, 2)}),
    ("SkipNet, 16 px", 16, 12, "gates", {1: (3, 8), 8: (3, 4)}),
    ("SkipNet, 56 px", 56, 4, "gates", {1: (3, 4), 8: (2, 1)}),
)


def build(pixels: int, blocks: int, draw: str, batch: int, calls: int) -> Rows:
    """The network of a case and its input."""
    torch.manual_seed(0)
    if draw == "gates":
        net = SkipNet(CifarResNet([blocks], [64], in_channels=1), image_size=(1, pixels, pixels)).eval()
        return Gated(net, torch.randn(batch, 1, pixels, pixels))
    return Rows(Blocks(blocks).eval(), torch.randn(batch, 64, pixels, pixels), draw, calls)


Cases = dict[str, dict[str, list[dict[str, Any]]]]


def part(quick: bool) -> Cases:
    """What one process measures."""
    torch.set_num_threads(1)
    cases: Cases = {}
    todo = [(*case[:4], batch, *times) for case in CASES for batch, times in case[4].items()]
    if quick:
        todo = [(name, pixels, min(n, 3), draw, batch, 2, 1) for name, pixels, n, draw, batch, *_ in todo if batch < 64]
    with tqdm(total=sum(item[5] for item in todo), desc="rounds") as bar:
        for name, pixels, blocks, draw, batch, rounds, calls in todo:
            case = build(pixels, blocks, draw, batch, calls)
            found = measure(case, SHARES, rounds, calls, draw != "gates", bar)
            cases.setdefault(name, {})[str(batch)] = found
    return cases


def in_processes(module: str, *arguments: str) -> list[Any]:
    """What `python -m module` prints as JSON in each of the processes, one after the other."""
    command = [sys.executable, "-m", module, *arguments]
    parts = []
    for _ in range(PROCESSES):
        # read when a process starts
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | ALLOCATOR)
        parts.append(json.loads(done.stdout))
    return parts


def compute(quick: bool) -> dict[str, Any]:
    """All processes, one after the other."""
    parts: list[Cases] = in_processes("demos.benchmarks.skipnet_time", "--part", *["--quick"] * quick)
    cases = {
        name: {batch: pooled([each[name][batch] for each in parts]) for batch in batches}
        for name, batches in parts[0].items()
    }
    return {"cases": cases, "processes": PROCESSES, "allocator": ALLOCATOR, "machine": machine()}


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whole runs as one: medians of what they found, and what each found at every share (`each`)."""

    def row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        times = [found["time"] for found in rows]
        quartiles = zip(*(time["quartiles"] for time in times), strict=True)
        each = [time["median"] for time in times]
        middle = {
            name: statistics.median(found[name] for found in rows) for name in rows[0] if name not in ("time", "each")
        }
        return middle | {
            "time": {"median": statistics.median(each), "quartiles": [statistics.median(ends) for ends in quartiles]},
            "each": each,
        }

    cases = {
        name: {
            batch: [row(rows) for rows in zip(*(result["cases"][name][batch] for result in results), strict=True)]
            for batch in batches
        }
        for name, batches in results[0]["cases"].items()
    }
    return results[-1] | {"cases": cases, "machine": [result["machine"] for result in results]}


def misses(result: dict[str, Any], draw: str = "even") -> list[str]:
    """Where the times are above the bar with these decisions; empty if nowhere."""
    broken = []
    for name, batches in result["cases"].items():
        if not name.startswith(draw):
            continue
        for batch, found in batches.items():
            for row in found:
                share, time = row["share"], row["time"]["median"]
                bar = share + BAR if 0.24 <= share <= 0.91 else 1 + DENSE_BAR if share == 1 else None
                if bar is not None and time > bar:
                    limit = f"the plain blocks on only those rows take {row['limit']:.3f}"
                    broken.append(f"{name}, batch {batch}, share {share:.2f}: {time:.3f}, bar {bar:.3f}; {limit}")
    return broken


def text(result: dict[str, Any]) -> str:
    """The table."""
    lines = ["Time relative to the plain network, median over the rounds, by share of the rows that run; in brackets"]
    lines += ["the limit, the plain blocks on so many rows only. What is above it is the cost of routing.", ""]
    if isinstance(result["machine"], list):
        lines += [f"Medians of {len(result['machine'])} whole runs; each run's are in the JSON.", ""]
    lines += ["| case | batch | plain, ms | " + " | ".join(f"{share:g}" for share in SHARES) + " |"]
    lines += ["|---|---:|---:|" + "---:|" * len(SHARES)]
    for name, batches in result["cases"].items():
        for batch, found in batches.items():
            times = " | ".join(
                f"{row['time']['median']:.2f}" + (f" ({row['limit']:.2f})" if "limit" in row else "") for row in found
            )
            lines.append(f"| {name} | {batch} | {found[0]['plain_ms']:g} | {times} |")
    lines += ["", f"The bar: at most {BAR} above the share from 0.25 to 0.9, at most {1 + DENSE_BAR} at 1."]
    for draw in ("even", "independent"):
        broken = misses(result, draw)
        lines += ["", f"With {draw} decisions it {'is missed here:' if broken else 'holds everywhere.'}"]
        lines += ["", *(f"- {line}" for line in broken)] if broken else []
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four blocks, few rounds")
    parser.add_argument("--out", type=Path, default=HOME / "skipnet_time.json")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.add_argument("--join", nargs="+", type=Path, metavar="JSON", help="results of whole runs to make one of")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        json.dump(part(args.quick), sys.stdout)
        return
    keep_existing(args.out, args.force)
    result = joined([json.loads(path.read_text()) for path in args.join]) if args.join else compute(args.quick)
    write_json(args.out, result)
    write_text(args.out.with_suffix(".md"), text(result))
    print(text(result))


if __name__ == "__main__":
    main()
