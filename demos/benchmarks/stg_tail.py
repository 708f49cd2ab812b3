"""Batched against separate tail: when do the skipped rows better run in one batch with the others?

    python -m demos.benchmarks.stg_tail                      # three models, some four minutes on one CPU core
    python -m demos.benchmarks.stg_tail --quick --out /tmp/stg_tail.json
    python -m demos.benchmarks.stg_tail --device cuda --force  # where it counts; not yet run by its authors

Writes stg_tail.json and stg_tail.md. Per model and size, on the stock pipeline with random weights: plain, guided with
tail="separate", guided with tail="batched", interleaved; the difference of the latents (rounding), blocks run and peak
memory beside it. Depth is cut to a few blocks, which leaves the ratios of blocks as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demos.benchmarks.command import parse, parser_of, write_as_it_grows
from demos.benchmarks.measure import (
    Clocks,
    Ratio,
    interleaved,
    machine,
    peak_bytes,
)
from demos.benchmarks.stg_models import BY_NAME, Case, run
from skipguide import find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.pipelines.sampling.tail import AUTO

HERE = Path(__file__).parent
MODELS = ("ltx", "wan", "hunyuan_distilled")
DEPTH = 4  # blocks per stack
LAYER = 1
# (frames, (height, width) in patches, prompts)
POINTS = {
    "cpu": [(2, (4, 4), 1), (2, (4, 4), 4), (2, (8, 8), 1), (2, (8, 8), 4), (2, (16, 16), 1), (4, (16, 16), 1)],
    "cuda": [(2, (8, 8), 1), (2, (16, 16), 1), (4, (16, 32), 1), (4, (16, 32), 4), (9, (30, 52), 1)],
    "quick": [(2, (2, 2), 1), (2, (2, 2), 2)],
}
VARIANTS = ("plain", "separate", "batched")


def shallow(pipe: Any, depth: int) -> Any:
    """The pipeline with the first blocks of every stack only."""
    for stack in dict.fromkeys(block.stack for block in find_blocks(pipe.transformer)):
        blocks = pipe.transformer.get_submodule(stack)
        del blocks[depth:]
    return pipe


class Subject:
    """One model at one size."""

    def __init__(self, case: Case, size: str, point: tuple[int, tuple[int, int], int], how: dict[str, Any]) -> None:
        frames, side, self.prompts = point
        self.case = replace(case, sizes={size: replace(case.sizes[size], frames=frames, side=side)})
        self.tokens = self.case.sizes[size].tokens
        self.pipe = shallow(self.case.build(size, **how), DEPTH)
        call = self.case.call(size, steps=2, **how)
        self.call = {k: torch.cat([v] * self.prompts) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        self.rounds: list[dict[str, Clocks]] = []

    @property
    def rows(self) -> int:
        """Rows of the batched tail."""
        return self.prompts * (3 if self.case.cfg == "batched" else 2)

    def context(self, variant: str) -> AbstractContextManager[Any]:
        if variant == "plain":
            return nullcontext()
        tail: Any = variant
        return SpatiotemporalSkipGuidance(layers=[LAYER], tail=tail).apply(self.pipe)

    def run(self) -> torch.Tensor:
        return run(self.pipe, self.call)

    def inspect(self) -> dict[str, Any]:
        """Everything but the time; also the warm-up."""
        latents, found = {}, {}
        for variant in VARIANTS:
            with self.context(variant) as applied:
                latents[variant] = self.run().float()
            found[variant] = {"blocks_run": applied.stats.blocks_run} if applied is not None else {}
            with self.context(variant):
                found[variant]["peak_bytes"] = peak_bytes(self.run)
        size = latents["separate"].abs().max()
        difference = float((latents["batched"] - latents["separate"]).abs().max() / size)
        effect = float((latents["separate"] - latents["plain"]).abs().max() / size)
        return {"variants": found, "difference": difference, "effect": effect}

    def time(self, progress: Callable[[str], object]) -> None:
        """Two rounds more."""
        variants = {name: (lambda name=name: self.context(name)) for name in VARIANTS}
        self.rounds += interleaved(variants, self.run, rounds=2, progress=progress)

    def report(self, found: dict[str, Any], clock: str) -> dict[str, Any]:
        seconds = {name: [clocks[name][clock == "process"] for clocks in self.rounds] for name in VARIANTS}
        return {
            "model": self.case.name,
            "title": self.case.title,
            "cfg": self.case.cfg,
            "tokens": self.tokens,
            "prompts": self.prompts,
            "tail_rows": self.rows,
            "tokens_times_rows": self.tokens * self.rows,
            "seconds_plain": round(sorted(seconds["plain"])[len(self.rounds) // 2], 4),
            "separate_to_plain": Ratio.of(seconds["separate"], seconds["plain"]).to_dict(),
            "batched_to_plain": Ratio.of(seconds["batched"], seconds["plain"]).to_dict(),
            "batched_to_separate": Ratio.of(seconds["batched"], seconds["separate"]).to_dict(),
            **found,
        }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the results so far after every second round."""
    cuda = args.device == "cuda"
    size = "quick" if args.quick else "cuda" if cuda else "cpu"
    how = {"device": args.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    torch.set_num_threads(args.threads)
    cases = [BY_NAME[name] for name in args.models]
    cases = [case for case in cases if size in case.sizes]
    subjects = []
    with tqdm(desc="inspect", total=len(cases) * len(POINTS[size]), file=sys.stderr) as bar:
        for case in cases:
            for point in POINTS[size]:
                subject = Subject(case, size, point, how)
                subjects.append((subject, subject.inspect()))
                bar.update()
    clock = "wall" if cuda or args.threads > 1 else "process"
    start = machine()
    with tqdm(desc="time", total=len(VARIANTS) * len(subjects) * args.rounds, file=sys.stderr) as bar:
        for done in range(2, args.rounds + 1, 2):
            for subject, _ in subjects:
                subject.time(lambda name: bar.update())
            yield {
                "benchmark": "stg_tail",
                "machine": start,
                "settings": {
                    "size": size,
                    "device": args.device,
                    "dtype": str(how["dtype"]).removeprefix("torch."),
                    "depth": DEPTH,
                    "layer": LAYER,
                    "steps": 2,
                    "rounds": done,
                    "clock": clock,
                    "auto": AUTO,
                },
                "points": [subject.report(found, clock) for subject, found in subjects],
            }


def table(data: dict[str, Any]) -> str:
    """The table, from the JSON alone."""
    head = (
        "| model | tokens | rows in the tail | tokens x rows | separate | **batched** | batched / separate "
        "| peak memory |"
    )
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for point in data["points"]:
        ratio = point["batched_to_separate"]
        peaks = [point["variants"][name]["peak_bytes"] / 2**20 for name in ("separate", "batched")]
        cells = [
            f"{point['title']} ({point['cfg']})",
            point["tokens"],
            point["tail_rows"],
            point["tokens_times_rows"],
            f"{point['separate_to_plain']['median']:.2f}",
            f"**{point['batched_to_plain']['median']:.2f}**",
            f"{ratio['median']:.2f} ({ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f})",
            f"{peaks[0]:.1f} → {peaks[1]:.1f} MiB",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    where, settings = data["machine"], data["settings"]
    device = where["gpu"] if settings["device"] == "cuda" else f"{where['threads']} thread(s) of {where['cpu']}"
    width = BY_NAME[data["points"][0]["model"]].sizes[settings["size"]].width
    worst = max(point["difference"] for point in data["points"])
    note = (
        f"Time of a call relative to the plain pipeline, medians of {settings['rounds']} interleaved rounds "
        f"({settings['clock']} time; quartiles in brackets); {device}, {settings['dtype']}, random weights, width "
        f"{width}, {settings['depth']} blocks per stack, layer {settings['layer']} skipped. Both tails run the same "
        f"blocks on the same rows, and their latents differ by at most {worst:.0e} of the largest value. "
    )
    if settings["device"] == "cpu":
        note += (
            "A GPU is where it counts: it needs far longer sequences than one CPU core to be busy. Here short ones "
            f'gain, through fewer calls and larger matrix products, and long ones do not: `tail="auto"` takes one '
            f"batch up to {settings['auto']['cpu']} tokens x rows."
        )
    return "\n".join([*lines, "", note]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, write."""
    parser = parser_of(__doc__, HERE / "stg_tail.json", rounds=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=sorted(BY_NAME), default=MODELS)
    args = parse(parser, argv)
    write_as_it_grows(args.out, measure(args), table)


if __name__ == "__main__":
    main()
