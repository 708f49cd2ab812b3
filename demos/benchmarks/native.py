"""PrefixReuse against the plain call: pipelines whose own guidance makes further passes, side by side in one run.

    python -m demos.benchmarks.native --force            # five pipelines, some ten minutes on one CPU core
    python -m demos.benchmarks.native --quick --out /tmp/native.json  # tiny models, about a minute: a smoke test

Writes native.json and native.md. Per pipeline: block rows and passes a step, time and peak memory of the plain call and
of the same call with prefix reuse, interleaved, the plain call against itself beside it, and what the call takes beside
its blocks: the Python of gates, proofs and captures, and the kernels of the comparisons.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demos.benchmarks.command import parse, parser_of, write_as_it_grows
from demos.benchmarks.measure import Clocks, ModuleClock, Ratio, interleaved, machine, peak_bytes
from demos.benchmarks.native_models import NATIVE, SIZES, STEPS, Native
from skipguide import find_blocks
from skipguide.pipelines import PrefixReuse

HERE = Path(__file__).parent
VARIANTS = ("plain", "again", "reused")
BAR = 0.05  # what may be spent beside the blocks


class Subject:
    """One pipeline at one size."""

    def __init__(self, case: Native, size: str) -> None:
        torch.manual_seed(0)
        self.case, self.size = case, SIZES[size]
        self.pipe = case.build(self.size)
        self.blocks = [block.module for block in find_blocks(self.pipe.transformer)]
        self.clocks: list[dict[str, Clocks]] = []
        self.inside: list[dict[str, float]] = []  # seconds in blocks, of the same rounds

    def context(self, variant: str) -> AbstractContextManager[Any]:
        return PrefixReuse().apply(self.pipe) if variant == "reused" else nullcontext()

    def run(self) -> torch.Tensor:
        return self.case.call(self.pipe, self.size)

    def inspect(self) -> dict[str, Any]:
        """Everything but the time; also the warm-up."""
        plain = self.run().float()
        with self.context("reused") as applied:
            out = self.run().float()
        peaks = {}
        for variant in ("plain", "reused"):
            with self.context(variant):
                peaks[variant] = peak_bytes(self.run)
        stats = applied.stats
        return {
            "difference": float((out - plain).norm() / plain.norm()),
            "stats": stats.to_dict(),
            "passes_per_step": {
                "plain": round(stats.blocks_plain / len(self.blocks) / STEPS, 4),
                "reused": round(stats.blocks_run / len(self.blocks) / STEPS, 4),
            },
            "peak_bytes": peaks,
        }

    def time(self, progress: Callable[[], object]) -> None:
        """Two rounds more."""
        variants = {name: (lambda name=name: self.context(name)) for name in VARIANTS}
        with ModuleClock(self.blocks) as clock:
            began: list[tuple[str, int]] = []

            def note(name: str) -> None:
                began.append((name, len(clock.calls)))
                progress()

            for clocks in interleaved(variants, self.run, rounds=2, progress=note):
                ends = [*(start for _, start in began[1:]), len(clock.calls)]
                spent = {
                    name: sum(seconds for _, seconds in clock.calls[start:end])
                    for (name, start), end in zip(began, ends, strict=True)
                }
                self.clocks.append(clocks)
                self.inside.append(spent)
                began.clear()
                clock.calls.clear()

    def report(self, found: dict[str, Any]) -> dict[str, Any]:
        seconds = {name: [clocks[name][1] for clocks in self.clocks] for name in VARIANTS}
        beside = {
            name: [
                clocks[name][1] - spent[name] - (clocks["plain"][1] - spent["plain"])
                for clocks, spent in zip(self.clocks, self.inside, strict=True)
            ]
            for name in ("again", "reused")
        }
        return {
            "name": self.case.name,
            "title": self.case.title,
            "guidance": self.case.guidance,
            "blocks": len(self.blocks),
            "seconds_plain": round(sorted(seconds["plain"])[len(self.clocks) // 2], 4),
            "reused_to_plain": Ratio.of(seconds["reused"], seconds["plain"]).to_dict(),
            "again_to_plain": Ratio.of(seconds["again"], seconds["plain"]).to_dict(),
            "beside_the_blocks": Ratio.of(beside["reused"], seconds["plain"]).to_dict(),
            "beside_the_blocks_again": Ratio.of(beside["again"], seconds["plain"]).to_dict(),
            **found,
        }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the results so far after every second round."""
    size = "quick" if args.quick else "cpu"
    torch.set_num_threads(args.threads)
    subjects = []
    with tqdm(desc="inspect", total=len(args.pipelines), file=sys.stderr) as bar:
        for name in args.pipelines:
            subject = Subject(NATIVE[name], size)
            subjects.append((subject, subject.inspect()))
            bar.update()
    start = machine()
    with tqdm(desc="time", total=len(VARIANTS) * len(subjects) * args.rounds, file=sys.stderr) as bar:
        for done in range(2, args.rounds + 1, 2):
            for subject, _ in subjects:
                subject.time(bar.update)
            yield {
                "benchmark": "native",
                "machine": start,
                "settings": {"size": size, "steps": STEPS, "rounds": done, "clock": "process", "bar": BAR},
                "pipelines": [subject.report(found) for subject, found in subjects],
            }


def table(data: dict[str, Any]) -> str:
    """The table, from the JSON alone."""
    head = (
        "| pipeline | its own guidance | passes a step | **time** | plain against itself | beside the blocks "
        "| peak memory | result |"
    )
    lines = [head, "|---|---|" + "---:|" * (head.count("|") - 3)]
    for row in data["pipelines"]:
        passes, peaks = row["passes_per_step"], row["peak_bytes"]
        difference = row["difference"]
        cells = [
            row["title"],
            row["guidance"],
            f"{passes['plain']:.3f} → {passes['reused']:.3f}",
            f"**{row['reused_to_plain']['median']:.3f}** {_spread(row['reused_to_plain'], 1)}",
            f"{row['again_to_plain']['median']:.3f} {_spread(row['again_to_plain'], 1)}",
            f"{row['beside_the_blocks']['median']:+.1%} {_spread(row['beside_the_blocks'], 100)}",
            f"{peaks['plain'] / 2**20:.1f} → {peaks['reused'] / 2**20:.1f} MiB",
            "bit-equal" if difference == 0 else f"{difference:.0e} off",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where, settings = data["machine"], data["settings"]
    size = SIZES[settings["size"]]
    note = (
        f"The plain call → the same call with `PrefixReuse`. A pass is all blocks for one batch row. Time relative to "
        f"the plain call, medians of {settings['rounds']} interleaved rounds, quartiles in brackets "
        f"({settings['clock']} time); {where['threads']} thread(s) of {where['cpu']}, float32, random weights, width "
        f"{size.width}, {settings['steps']} steps. Beside the blocks: what the call with reuse takes more than the "
        f"plain one outside of the blocks, as a share of the plain call (bar: {settings['bar']:.0%}). Result: the norm "
        f"of the difference of the latents, relative to theirs; it is rounding, since a batch of another size moves "
        f"the last bits."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _spread(ratio: dict[str, Any], unit: int) -> str:
    low, high = (value * unit for value in ratio["quartiles"])
    return f"({low:.1f} to {high:.1f} %)" if unit == 100 else f"({low:.3f} to {high:.3f})"


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, write."""
    parser = parser_of(__doc__, HERE / "native.json", rounds=20)
    parser.add_argument("--pipelines", nargs="+", choices=sorted(NATIVE), default=list(NATIVE))
    args = parse(parser, argv)
    write_as_it_grows(args.out, measure(args), table)


if __name__ == "__main__":
    main()
