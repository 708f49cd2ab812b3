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
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from demos.benchmarks.command import parse, parser_of, write_as_it_grows
from demos.benchmarks.measure import (
    Clocks,
    ModuleClock,
    Ratio,
    interleaved,
    machine,
    peak_bytes,
)
from demos.benchmarks.stg_models import BY_NAME, CASES, Case, run
from demos.benchmarks.stg_rivals import DiffusersSkip, Naive, OneBatch, blocks_of, counting
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.pipelines.presets import find_preset
from skipguide.resume import Prefix, capture

HERE = Path(__file__).parent
VARIANTS = ("plain", "scale_0", "naive", "ours", "ours_deep", "one_batch", "diffusers")
SCALE = 1.0
TIME_SLACK, ZERO_SLACK = 0.03, 0.01
PREDICTIONS_HELD = 4  # memory slack: c, the delta and the two sums, each the size of a prediction


# -- arithmetic on paper --------------------------------------------------------------------------------------------


def analytic_blocks(variant: str, blocks: int, branches: int, layer: int) -> int:
    """Blocks that one step runs, per clip."""
    third = {
        "plain": 0,
        "scale_0": 0,
        "naive": blocks,
        "one_batch": blocks,
        "diffusers": blocks - 1,
        "ours": blocks - 1 - layer,
        "ours_deep": blocks - 1 - layer,
    }
    return branches * blocks + third[variant]


def analytic_limit(blocks: int, branches: int, layer: int) -> float:
    """Blocks of our step over those of a naive one: (2N + N - 1 - l) / 3N with CFG, (N + N - 1 - l) / 2N without."""
    ours, naive = (analytic_blocks(name, blocks, branches, layer) for name in ("ours", "naive"))
    return ours / naive


def deep_layer(blocks: int, preset: int) -> int:
    """A layer at 2/3 of the depth, or at 5/6 where the preset is there already."""
    deep = round(2 * blocks / 3)
    return deep if preset < 0.6 * blocks else round(5 * blocks / 6)


# -- one model ------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model on the bench: its pipeline, its call and its variants."""

    case: Case
    size: str
    pipe: Any
    call: dict[str, Any]
    layers: dict[str, int]
    blocks: int
    rounds: list[dict[str, Clocks]] = field(default_factory=list)
    in_blocks: list[dict[str, list[tuple[int, float]]]] = field(default_factory=list)

    @classmethod
    def build(cls, case: Case, size: str, steps: int, device: str, dtype: torch.dtype) -> Subject:
        pipe = case.build(size, device, dtype)
        call = case.call(size, steps, device, dtype)
        blocks = len(blocks_of(pipe.transformer))
        preset = find_preset(pipe.transformer).layers[0]
        deep = deep_layer(blocks, preset)
        layers = {name: deep if name == "ours_deep" else preset for name in VARIANTS}
        return cls(case, size, pipe, call, layers, blocks)

    def variants(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """In the order of a round; each call makes a fresh context."""
        preset, deep = self.layers["ours"], self.layers["ours_deep"]
        rival = (self.pipe, self.case, self.call, preset, SCALE)

        def guided(layer: int, scale: float) -> Callable[[], AbstractContextManager[Any]]:
            return lambda: SpatiotemporalSkipGuidance(layers=[layer], scale=scale).apply(self.pipe)

        return {
            "plain": nullcontext,
            "scale_0": guided(preset, 0.0),
            "naive": lambda: Naive(*rival),
            "ours": guided(preset, SCALE),
            "ours_deep": guided(deep, SCALE),
            "one_batch": lambda: OneBatch(*rival),
            "diffusers": lambda: DiffusersSkip(*rival),
        }

    def run(self) -> torch.Tensor:
        return run(self.pipe, self.call)

    def inspect(self, progress: Callable[[str], object]) -> dict[str, dict[str, Any]]:
        """Per variant everything but the time: latents, blocks, peak memory. Also the warm-up."""
        captured, prediction = self.held()
        latents: dict[str, torch.Tensor] = {}
        found: dict[str, dict[str, Any]] = {}
        steps = self.call["num_inference_steps"]
        for name, context in self.variants().items():
            progress(name)
            row = found[name] = {"layer": None if name in ("plain", "scale_0") else self.layers[name]}
            with counting(self.pipe.transformer) as rows, context() as handle:
                row["peak_bytes"] = peak_bytes(lambda name=name: latents.update({name: self.run()}))
            row["peak_over_plain"] = row["peak_bytes"] - found["plain"]["peak_bytes"]
            row["blocks_analytic"] = steps * analytic_blocks(name, self.blocks, self.case.branches, self.layers[name])
            row["blocks_counted"] = sum(rows)
            row["blocks_run"] = handle.stats.blocks_run if name.startswith(("ours", "scale")) else sum(rows)
            if name.startswith("ours"):
                row |= {"captured_bytes": captured[name], "prediction_bytes": prediction}
            if name != "ours_deep":
                reference = latents["plain" if name in ("plain", "scale_0") else "naive"]
                row["difference"] = float((latents[name] - reference).abs().max() / reference.abs().max())
        for name in ("plain", "naive"):
            if not torch.isfinite(latents[name]).all():
                raise RuntimeError(f"{self.case.name}: the latents of the {name} run are not finite")
        return found

    def held(self) -> tuple[dict[str, int], int]:
        """Bytes of the streams that enter each variant's block in the plain pipeline, and of one float32 prediction."""
        model, sizes = self.pipe.transformer, []
        prefixes = {name: Prefix(self.layers[name]) for name in ("ours", "ours_deep")}
        hook = model.register_forward_hook(lambda module, args, out: sizes.append(4 * out[0].numel()))
        try:
            with capture(model, prefixes["ours"]), capture(model, prefixes["ours_deep"]):
                self.run()
        finally:
            hook.remove()
        return {name: storage_bytes(prefix.streams.values()) for name, prefix in prefixes.items()}, max(sizes)

    def time(self, progress: Callable[[str], object]) -> None:
        """Two more rounds, one forward and one in reverse, after a run that is not timed."""
        self.run()
        logs: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in VARIANTS}

        @contextmanager
        def clocked(name: str) -> Iterator[None]:
            modules = [] if torch.cuda.is_available() else [block for _, _, block in blocks_of(self.pipe.transformer)]
            with ModuleClock(modules) as clock, variants[name]():
                yield
            logs[name].append(clock.calls)

        variants = self.variants()
        contexts = {name: partial(clocked, name) for name in variants}
        self.rounds += interleaved(contexts, self.run, 2, progress)
        self.in_blocks += [{name: logs[name][number] for name in variants} for number in range(2)]

    # -- results ----------------------------------------------------------------------------------------------------

    def report(self, found: dict[str, dict[str, Any]], clock: str) -> dict[str, Any]:
        """The model's entry of the JSON."""
        steps = self.call["num_inference_steps"]
        found = {name: dict(row) for name, row in found.items()}
        wall, process = ({name: [clocks[name][i] / steps for clocks in self.rounds] for name in found} for i in (0, 1))
        chosen = process if clock == "process" else wall
        for name, row in found.items():
            row["time_to_plain"] = Ratio.of(chosen[name], chosen["plain"]).to_dict()
            row["time_to_naive"] = Ratio.of(chosen[name], chosen["naive"]).to_dict()
            row["wall_to_plain"] = Ratio.of(wall[name], wall["plain"]).to_dict()
            row["wall_to_naive"] = Ratio.of(wall[name], wall["naive"]).to_dict()
            row["seconds_per_step"] = {
                "wall": [round(value, 4) for value in wall[name]],
                "process": [round(value, 4) for value in process[name]],
            }
            if name.startswith("ours"):
                row["limit_to_naive"] = analytic_limit(self.blocks, self.case.branches, self.layers[name])
        size = self.case.sizes[self.size]
        entry = {
            "name": self.case.name,
            "title": self.case.title,
            "pipeline": type(self.pipe).__name__,
            "cfg": self.case.cfg,
            "branches": self.case.branches,
            "blocks": self.blocks,
            "layer": self.layers["ours"],
            "deep_layer": self.layers["ours_deep"],
            "width": size.width,
            "heads": size.heads,
            "head_dim": size.head_dim,
            "video_tokens": size.tokens,
            "text_tokens": size.text,
            "parameters": sum(p.numel() for p in self.pipe.transformer.parameters()),
            "variants": found,
        }
        if not torch.cuda.is_available():
            entry |= self.split(found, process)
        entry["bars"] = bars(entry)
        return entry

    def split(self, found: dict[str, dict[str, Any]], process: dict[str, list[float]]) -> dict[str, Any]:
        """Time inside the blocks and outside them: what a busy machine blurs, and what the ways to guide differ in.

        The same block takes the same time in every variant, so the difference between two variants is the blocks that
        only one of them runs, plus the difference of their times outside the blocks. That has no noise of the blocks
        in it, and resolves overheads that the plain ratio of two long runs cannot.
        """
        steps = self.call["num_inference_steps"]
        outside = {
            name: median(
                process[name][number] - sum(seconds for _, seconds in calls[name]) / steps
                for number, calls in enumerate(self.in_blocks)
            )
            for name in found
        }
        per_block = self.third_pass()
        naive, plain = median(process["naive"]), median(process["plain"])
        for name, row in found.items():
            row["seconds_outside_blocks"] = round(outside[name], 5)
            if name.startswith("ours"):
                limit = 1 - sum(per_block[: self.layers[name] + 1]) / naive
                row["measured_limit_to_naive"] = round(limit, 5)
                row["split_time_to_naive"] = round(limit + (outside[name] - outside["naive"]) / naive, 5)
        found["scale_0"]["split_overhead"] = round((outside["scale_0"] - outside["plain"]) / plain, 5)
        return {
            "seconds_per_block": round(sum(per_block) / len(per_block), 5),
            "share_outside_blocks": round(outside["plain"] / plain, 5),
        }

    def third_pass(self) -> list[float]:
        """Seconds of each block in the naive third pass, which is every block's second call in a step."""
        steps = self.call["num_inference_steps"]
        seconds: list[list[float]] = [[] for _ in range(self.blocks)]
        for calls in self.in_blocks:
            own: list[list[float]] = [[] for _ in range(self.blocks)]
            for place, value in calls["naive"]:
                own[place].append(value)
            for place, values in enumerate(own):
                seconds[place] += values[1 :: len(values) // steps]
        return [median(values) for values in seconds]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Memory behind some tensors; views of one storage count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def bars(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the design promises, held against one model's measurements."""
    rows = entry["variants"]
    out = {
        "blocks_equal_analytic": {
            "passed": all(
                row["blocks_run"] == row["blocks_counted"] == row["blocks_analytic"] for row in rows.values()
            ),
        },
    }
    direct = round(rows["scale_0"]["time_to_plain"]["median"] - 1, 5)
    overhead = rows["scale_0"].get("split_overhead", direct)
    out["scale_0_overhead"] = {
        "value": overhead,
        "direct": direct,
        "limit": ZERO_SLACK,
        "passed": overhead < ZERO_SLACK,
    }
    for name in ("ours", "ours_deep"):
        row = rows[name]
        direct = row["time_to_naive"]["median"] / row["limit_to_naive"] - 1
        split = row["split_time_to_naive"] / row["limit_to_naive"] - 1 if "split_time_to_naive" in row else direct
        out[f"{name}_time"] = {
            "value": round(direct, 5),
            "split": round(split, 5),
            "limit": TIME_SLACK,
            "applies": entry["branches"] == 2 and entry["blocks"] >= 24,
            "passed": max(direct, split) <= TIME_SLACK,
        }
        allowed = row["captured_bytes"] + PREDICTIONS_HELD * row["prediction_bytes"]
        out[f"{name}_memory"] = {
            "value": row["peak_over_plain"],
            "limit": allowed,
            "passed": row["peak_over_plain"] <= allowed,
        }
    return out


# -- the table ------------------------------------------------------------------------------------------------------


def table(data: dict[str, Any]) -> str:
    """The README's table, from the JSON alone."""
    head = (
        "| model | blocks | layer | plain | naive third pass | one batch of three | diffusers SLG | **ours** "
        "| analytic limit | peak memory: plain | one batch | **ours** |"
    )
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for entry in data["models"]:
        rows = entry["variants"]
        for name in ("ours", "ours_deep"):
            ours = rows[name]
            times = [rows[other]["time_to_plain"]["median"] for other in ("plain", "naive", "one_batch", "diffusers")]
            limit = ours["limit_to_naive"] * (entry["branches"] + 1) / entry["branches"]
            peaks = [rows[other]["peak_bytes"] / 2**20 for other in ("plain", "one_batch", name)]
            first = name == "ours"
            cells = [
                entry["title"] if first else "",
                str(entry["blocks"]) if first else "",
                str(ours["layer"]) + (" (preset)" if first else ""),
                *[f"{value:.2f}" if first else "" for value in times],
                f"**{ours['time_to_plain']['median']:.2f}**",
                f"{limit:.2f}",
                *[f"{value:.1f} MiB" if first else "" for value in peaks[:2]],
                f"**{peaks[2]:.1f} MiB**",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes(data)]) + "\n"


def notes(data: dict[str, Any]) -> list[str]:
    """How to read the table."""
    where, settings = data["machine"], data["settings"]
    device = where["gpu"] or f"{where['threads']} thread(s) of {where['cpu']}"
    widths = sorted({entry["width"] for entry in data["models"]})
    passed = {name: bar["passed"] for name, bar in data["bars"].items()}
    missed = [name for name, ok in passed.items() if not ok]
    verdict = f"missed: {', '.join(missed)}" if missed else "all hold"
    return [
        f"Time per step relative to the plain pipeline: median of {settings['rounds']} interleaved rounds, "
        f"{settings['clock']} time. Stock pipelines, random weights, released depth and head dimension, width "
        f"{', '.join(map(str, widths))}, {settings['dtype']}; {device}; torch {where['versions']['torch']}, "
        f"diffusers {where['versions']['diffusers']}. Analytic limit: blocks that must run over blocks of the plain "
        "pipeline, (2N + N − 1 − ℓ) / 2N with CFG, (N + N − 1 − ℓ) / N without; work outside the blocks is not in it. "
        "Peak memory: most bytes in tensors at once during the call, without the weights. Without CFG the batch has "
        "two rows.",
        "",
        f"Bars ({verdict}): blocks run equal the analytic count; with CFG on, time within 3 % of the limit relative to "
        "the naive third pass; peak memory no higher than the plain pipeline plus the captured streams of one block "
        f"(slack: {PREDICTIONS_HELD} predictions); guidance at scale 0 costs less than 1 %.",
    ]


# -- the command ----------------------------------------------------------------------------------------------------


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
            models = [subject.report(found, settings["clock"]) for subject, found in subjects]
            yield {
                "benchmark": "stg_cost",
                "machine": start | {"load_average_while_timing": list(loads)},
                "settings": settings | {"rounds": done},
                "bars": overall(models),
                "models": models,
            }


def overall(models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each bar over all models it applies to: passed, and the worst value."""
    out: dict[str, dict[str, Any]] = {}
    for name in models[0]["bars"]:
        held = [entry["bars"][name] for entry in models if entry["bars"][name].get("applies", True)]
        out[name] = {"passed": all(bar["passed"] for bar in held), "models": len(held)}
        if held and not name.endswith("memory") and "value" in held[0]:
            out[name] |= {"worst": max(bar["value"] for bar in held), "limit": held[0]["limit"]}
    return out


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
