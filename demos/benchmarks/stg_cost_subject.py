"""A model on the bench: its pipeline, every way to guide it, and what is measured of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from demos.benchmarks.measure import Clocks, ModuleClock, interleaved, peak_bytes
from demos.benchmarks.stg_cost_blocks import VARIANTS, analytic_blocks, deep_layer, preset_layer
from demos.benchmarks.stg_models import Case, run
from demos.benchmarks.stg_rivals import DiffusersSkip, Naive, OneBatch, blocks_of, counting
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.prefix import Prefix
from skipguide.skipper import capture

SCALE = 1.0


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
        preset = preset_layer(pipe.transformer, blocks)
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


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Memory behind some tensors; views of one storage count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
