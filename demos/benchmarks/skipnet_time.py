"""Time against the share of rows that run: does skipping save what it should?

    python -m demos.benchmarks.skipnet_time                  # two minutes on one CPU core
    python -m demos.benchmarks.skipnet_time --quick --out /tmp/skipnet_time.json

Writes skipnet_time.json and skipnet_time.md. Every share is compared with the plain network in the same round
(interleaved, process seconds). "rows" is a stack of basic blocks of 64 channels at 16 pixels, decisions given: the
bar. "rows, SkipNet" is the same stack as a SkipNet with its recurrent gates computed (and overruled), at what share of
its gated blocks runs; "ResNet-50" is torchvision's at 128 pixels, where a block is larger.

The rows that run are spread evenly over the blocks. At batch 1 the share is one of blocks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
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
    for share in shares:
        if case.net is None:
            keep = spread(share, batch, len(Router(case.model).blocks))
            variants[str(share)] = partial(case.rows, keep)
        else:
            keep = spread(share, batch, len(case.net.gates))
            variants[str(share)] = partial(case.gated, keep)
        actual[str(share)] = float(keep.float().mean())

    def run() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                case.call()

    for name in variants:  # warm
        with variants[name](), torch.inference_mode():
            case.call()
    clocks = []
    for found in interleaved(variants, run, rounds, lambda name: None):
        clocks.append(found)
        bar.update()
    plain = [found["plain"][1] for found in clocks]
    return [
        {
            "share": round(actual[str(share)], 4),
            "time": Ratio.of([found[str(share)][1] for found in clocks], plain).to_dict(),
            "plain_ms": round(1000 * sorted(plain)[len(plain) // 2] / calls, 3),
        }
        for share in shares
    ]


def stack(blocks: int) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet([blocks], [64], in_channels=1).eval()  # the stem is under 1 % of one block


def compute(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    blocks = 4 if quick else 12
    rounds = {1: 3, 8: 3} if quick else {1: 25, 8: 15, 64: 9}
    calls = {1: 4, 8: 1, 64: 1}
    cases: dict[str, Any] = {}
    todo = [("rows", b) for b in rounds] + [("rows, SkipNet", b) for b in rounds if b != 64]
    todo += [] if quick else [("ResNet-50", 1), ("ResNet-50", 8)]
    counts = {item: rounds[item[1]] if item[0] != "ResNet-50" else 9 if item[1] == 1 else 4 for item in todo}
    with tqdm(total=sum(counts.values()), desc="rounds") as bar:
        for name, batch in todo:
            torch.manual_seed(1)
            if name == "ResNet-50":
                from torchvision.models import resnet50

                torch.manual_seed(0)
                case = Case(resnet50().eval(), torch.randn(batch, 3, 128, 128))
            else:
                model = stack(blocks)
                x = torch.randn(batch, 1, 16, 16)
                net = SkipNet(model, image_size=(1, 16, 16)).eval() if "SkipNet" in name else None
                case = Case(model, x, net)
            found = measure(case, SHARES, counts[name, batch], calls[batch] if name != "ResNet-50" else 1, bar)
            cases.setdefault(name, {})[str(batch)] = found
    return {"blocks": blocks, "rounds": {str(k): v for k, v in rounds.items()}, "cases": cases, "machine": machine()}


def holds(result: dict[str, Any], name: str = "rows") -> list[str]:
    """Where the bar does not hold; empty if it does."""
    broken = []
    for batch, found in result["cases"][name].items():
        for row in found:
            share, time = row["share"], row["time"]["median"]
            if 0.24 <= share <= 0.91 and time > share + BAR:
                broken.append(f"batch {batch}, share {share}: {time:.3f} is above {share + BAR:.3f}")
            if share == 1.0 and time > 1 + DENSE_BAR:
                broken.append(f"batch {batch}, all rows: {time:.3f} is above {1 + DENSE_BAR:.2f}")
    return broken


def text(result: dict[str, Any]) -> str:
    """The table."""
    lines = ["Time relative to the plain network, median over the rounds, by share of the rows that run.", ""]
    lines += ["| case | batch | plain, ms | " + " | ".join(f"{share:g}" for share in SHARES) + " |"]
    lines += ["|---|---:|---:|" + "---:|" * len(SHARES)]
    for name, batches in result["cases"].items():
        for batch, found in batches.items():
            times = " | ".join(f"{row['time']['median']:.2f}" for row in found)
            lines.append(f"| {name} | {batch} | {found[0]['plain_ms']:g} | {times} |")
    broken = holds(result)
    lines += ["", f"The bar (at most {BAR} above the share from 0.25 to 0.9, at most {1 + DENSE_BAR} at 1): "]
    lines[-1] += "holds for the first case at every batch size." if not broken else "; ".join(broken) + "."
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four blocks, few rounds")
    parser.add_argument("--out", type=Path, default=HOME / "skipnet_time.json")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    args = parser.parse_args(argv)
    keep_existing(args.out, args.force)
    result = compute(args.quick)
    write_json(args.out, result)
    write_text(args.out.with_suffix(".md"), text(result))
    print(text(result))


if __name__ == "__main__":
    main()
