"""Guidance together with caches: time and blocks of every cache, plain and guided, side by side in one run.

    python -m demos.benchmarks.caches --force            # two models of released depth, some twenty minutes on one core
    python -m demos.benchmarks.caches --quick --out /tmp/caches.json  # tiny models, about a minute: a smoke test

Writes caches.json and caches.md. Every cache is set so that it answers about half of the steps. Each is measured under
the plain pipeline and under SpatiotemporalSkipGuidance, and on LTX-Video's modular pipeline under diffusers' own
skip-layer guider, without and with PrefixReuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demos.benchmarks.caches_enabled import CACHES, calibrate, enabled
from demos.benchmarks.command import parse, parser_of, write_as_it_grows
from demos.benchmarks.measure import Clocks, Ratio, interleaved, machine
from demos.benchmarks.stg_models import BY_NAME, Size
from demos.benchmarks.stg_models import run as run_classic
from skipguide import Skipper, SkipPlan, find_blocks
from skipguide.pipelines import PrefixReuse, SpatiotemporalSkipGuidance

HERE = Path(__file__).parent
STEPS = 8
LAYERS = {"ltx": 19, "wan": 20}
MODES = {"plain": "plain", "guided": "plain", "native": "plain", "reused": "native"}  # mode -> what it is compared with
BAR = 1.2  # guided over plain with the same cache, where half of the steps are answered


class Subject:
    """One model with its classic pipeline, and where there is one its modular pipeline with diffusers' guider."""

    def __init__(self, name: str, size: str) -> None:
        torch.manual_seed(0)
        self.case, self.name, self.layer = BY_NAME[name], name, LAYERS[name]
        self.pipe = self.case.build(size)
        self.model = self.pipe.transformer
        self.blocks = [block.name for block in find_blocks(self.model)]
        self.call = self.case.call(size, STEPS)
        self.modular = Modular(self.pipe, self.case.sizes[size], self.layer) if name == "ltx" else None
        self.mode = "plain"
        self.absent: dict[str, str] = {}
        self.whole: dict[str, int] = {}  # mode -> blocks without a cache
        self.clocks: list[dict[str, Clocks]] = []

    @property
    def modes(self) -> list[str]:
        return [mode for mode in MODES if self.modular is not None or mode in ("plain", "guided")]

    def run(self) -> torch.Tensor:
        if self.mode in ("plain", "guided"):
            return run_classic(self.pipe, self.call)
        assert self.modular is not None
        return self.modular()

    @contextmanager
    def variant(self, cache: str, mode: str) -> Iterator[Any]:
        """The pipeline with that cache, in that mode; yields who counts, if that is somebody of skipguide."""
        self.mode = mode
        with ExitStack() as stack:
            stack.enter_context(enabled(cache, self.pipe, STEPS))
            if mode == "guided":
                yield stack.enter_context(SpatiotemporalSkipGuidance(layers=[self.layer]).apply(self.pipe)).stats
            elif mode == "reused":
                assert self.modular is not None
                yield stack.enter_context(PrefixReuse().apply(self.modular.pipe)).stats
            else:
                yield None

    def inspect(self, caches: Sequence[str], progress: Callable[[], object]) -> dict[str, dict[str, Any]]:
        """Blocks of every variant; also the warm-up. What diffusers or skipguide refuses is noted, and left out."""
        found: dict[str, dict[str, Any]] = {}
        whole = 2 * STEPS * len(self.blocks)
        if "FirstBlockCache" in caches:
            calibrate(self.pipe, lambda: run_classic(self.pipe, self.call), self._counter, whole)
        for cache in caches:
            for mode in self.modes:
                try:
                    found[f"{cache} {mode}"] = self._counted(cache, mode)
                except (ValueError, RuntimeError, TypeError, ImportError) as error:
                    self.absent[f"{cache} {mode}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                progress()
        return found

    def _counter(self) -> Skipper:
        return Skipper(self.model, SkipPlan())

    def _counted(self, cache: str, mode: str) -> dict[str, Any]:
        with self.variant(cache, mode) as stats:
            if stats is None:
                with self._counter() as counter:
                    self.run()
                ran = sum(counter.stats.rows.get(name, 0) for name in self.blocks)
                if cache == "none":
                    self.whole[mode] = ran
                answered = self.whole[mode] - ran
                return {"blocks_run": ran, "blocks_cached": answered, "blocks_left_out": 0}
            self.run()
        left_out = stats.blocks_skipped if mode == "guided" else stats.blocks_shared
        return {"blocks_run": stats.blocks_run, "blocks_cached": stats.blocks_cached, "blocks_left_out": left_out}

    def time(self, keys: list[str], progress: Callable[[], object]) -> None:
        """Two rounds more."""
        variants = {key: (lambda key=key: self.variant(*key.split())) for key in keys}
        self.clocks += interleaved(variants, self.run, rounds=2, progress=lambda name: progress())

    def report(self, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        seconds = {key: [clocks[key][1] for clocks in self.clocks] for key in found}
        rows = []
        for key, counts in found.items():
            cache, mode = key.split()
            base = f"{cache} {MODES[mode]}" if mode != "plain" else "none plain"
            known = base in found
            rows.append(
                {
                    "cache": cache,
                    "mode": mode,
                    **counts,
                    "seconds": round(sorted(seconds[key])[len(self.clocks) // 2], 4),
                    "compared_with": base,
                    "time_ratio": Ratio.of(seconds[key], seconds[base]).to_dict() if known else None,
                    "blocks_ratio": round(counts["blocks_run"] / found[base]["blocks_run"], 4) if known else None,
                }
            )
        return {
            "name": self.name,
            "title": self.case.title,
            "blocks": len(self.blocks),
            "layer": self.layer,
            "rows": rows,
            "absent": self.absent,
        }


class Modular:
    """LTX-Video's modular pipeline around the same transformer, with diffusers' skip-layer guider."""

    def __init__(self, classic: Any, size: Size, layer: int) -> None:
        import diffusers
        from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep

        guider = diffusers.SkipLayerGuidance(
            guidance_scale=3.0,
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
            skip_layer_config=diffusers.LayerSkipConfig([layer], fqn="transformer_blocks"),
        )
        self.pipe = LTXCoreDenoiseStep().init_pipeline()
        self.pipe.update_components(transformer=classic.transformer, scheduler=classic.scheduler, guider=guider)
        self.pipe.set_progress_bar_config(disable=True)
        self.given: dict[str, Any] = {}
        for seed, prefix in ((1, ""), (2, "negative_")):
            made = torch.randn(1, size.text, size.text_width, generator=torch.Generator().manual_seed(seed))
            self.given |= {
                f"{prefix}prompt_embeds": made,
                f"{prefix}prompt_attention_mask": torch.ones(1, size.text, dtype=torch.long),
            }
        self.given |= {"height": 32 * size.side[0], "width": 32 * size.side[1], "num_frames": 8 * (size.frames - 1) + 1}
        shape = (1, size.tokens, classic.transformer.config.in_channels)
        self.given["latents"] = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def __call__(self) -> torch.Tensor:
        # diffusers' modular pipelines leave what a cache has kept to the next call
        if getattr(self.pipe.transformer, "is_cache_enabled", False):
            self.pipe.transformer._reset_stateful_cache()
        out: torch.Tensor = self.pipe(**self.given, num_inference_steps=STEPS, output="latents")
        return out


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the results so far after every second round."""
    size = "quick" if args.quick else "cpu"
    torch.set_num_threads(args.threads)
    subjects = [Subject(name, size) for name in args.models]
    total = sum(len(args.caches) * len(subject.modes) for subject in subjects)
    with tqdm(desc="inspect", total=total, file=sys.stderr) as bar:
        found = [subject.inspect(args.caches, bar.update) for subject in subjects]
    start = machine()
    with tqdm(desc="time", total=args.rounds * sum(map(len, found)), file=sys.stderr) as bar:
        for done in range(2, args.rounds + 1, 2):
            for subject, each in zip(subjects, found, strict=True):
                subject.time(list(each), bar.update)
            models = [subject.report(each) for subject, each in zip(subjects, found, strict=True)]
            yield {
                "benchmark": "caches",
                "machine": start,
                "settings": {"size": size, "steps": STEPS, "rounds": done, "clock": "process", "bar": BAR},
                "models": models,
            }


def table(data: dict[str, Any]) -> str:
    """The tables, from the JSON alone."""
    lines: list[str] = []
    for model in data["models"]:
        lines += [f"## {model['title']}: {model['blocks']} blocks, block {model['layer']} skipped", ""]
        head = "| cache | mode | blocks a step | answered | left out | **time** | blocks | relative to |"
        lines += [head, "|---|---|" + "---:|" * 5 + "---|"]
        steps = data["settings"]["steps"]
        for row in model["rows"]:
            ratio = row["time_ratio"]
            time = "" if ratio is None else f"**{ratio['median']:.3f}** {_spread(ratio)}"
            cells = [row["cache"], row["mode"]]
            cells += [f"{row[name] / steps:.1f}" for name in ("blocks_run", "blocks_cached", "blocks_left_out")]
            blocks = "" if row["blocks_ratio"] is None else f"{row['blocks_ratio']:.3f}"
            lines.append("| " + " | ".join([*cells, time, blocks, row["compared_with"]]) + " |")
        if model["absent"]:
            lines += ["", "Not offered: " + "; ".join(f"{key} ({why})" for key, why in model["absent"].items()) + "."]
        lines.append("")
    where, settings = data["machine"], data["settings"]
    lines.append(
        f"Blocks are counted for one batch row each: run, answered by the cache, and left out by the plan or shared "
        f"with an earlier pass. Time and blocks relative to the run that is named, medians of {settings['rounds']} "
        f"interleaved rounds, quartiles in brackets ({settings['clock']} time); {where['threads']} thread(s) of "
        f"{where['cpu']}, float32, random weights, {settings['steps']} steps, of which each cache is set to answer "
        f"about half. Caches of attention layers answer inside of blocks that run. Bar: guided over plain with the "
        f"same cache at most {settings['bar']:.1f}. `native` is diffusers' skip-layer guider, `reused` the same with "
        f"`PrefixReuse`."
    )
    return "\n".join(lines) + "\n"


def _spread(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"({low:.3f} to {high:.3f})"


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, write."""
    parser = parser_of(__doc__, HERE / "caches.json", rounds=10)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--models", nargs="+", choices=sorted(LAYERS), default=list(LAYERS))
    args = parse(parser, argv)
    args.caches = list(dict.fromkeys(["none", *args.caches]))  # first, for all others are told from it
    write_as_it_grows(args.out, measure(args), table)


if __name__ == "__main__":
    main()
