"""Work: search the schedules on a few runs, then make and judge the clips of other prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from demos.bundled_model.autoencoder import FRAMES
from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import ClipSpec, caption, render
from demos.bundled_model.common import atomically
from demos.bundled_model.evaluate import choose
from demos.quality.measures import frechet, read
from demos.quality.sampling import Sampler, prompts
from demos.quality.settings import LAYERS, Setting
from demos.study import Cells
from demos.tune.settings import SHARES, STARTS, STEPS, W, Way
from skipguide import Skipper, SkipPlan
from skipguide.pipelines import SpatiotemporalSkipGuidance, tune

CALIBRATION_SEED = 77_000
DRAWS = 200  # of the bootstrap


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        prompts: other captions than those of the calibration, a clip each.
        real: real clips per caption, for the reference.
        calls: runs that a schedule is searched on.
        steps: of every sampler, for tests; None is each way's own.
        draw: of captions and noise.
    """

    prompts: int = 64
    real: int = 8
    calls: int = 2
    steps: int | None = None
    draw: int = 3

    def specs(self) -> list[ClipSpec]:
        """What the clips show."""
        return prompts(self.prompts, 1, self.draw)


def calibration(sampler: Sampler, plan: Plan) -> list[dict[str, Any]]:
    """The calls that schedules are searched on."""
    steps = plan.steps or STEPS
    shared = sampler.call | {"num_inference_steps": steps, "guidance_scale": W}
    known = {caption(spec) for spec in plan.specs()}
    words = [caption(spec) for spec in choose(plan.calls + len(known), CALIBRATION_SEED)]
    others = [prompt for prompt in words if prompt not in known][: plan.calls]
    return [shared | {"prompt": prompt, "seed": CALIBRATION_SEED + n} for n, prompt in enumerate(others)]


def searched(sampler: Sampler, plan: Plan, start: str) -> dict[str, Any]:
    """The schedules on the way from a guidance to the smallest share, by share of plain CFG's blocks."""
    guidance, began = SpatiotemporalSkipGuidance(**STARTS[start]), time.process_time()
    whole = guidance.cost(sampler.pipe, steps=plan.steps or STEPS).ratio_to_plain
    with torch.autocast("cpu", torch.bfloat16):
        tuned = tune(sampler.pipe, calibration(sampler, plan), min(SHARES) / whole, guidance=guidance)
    path = [{"share": each.share * whole, "error": each.damage**0.5} for each in tuned.path]
    found = {f"{share:g}": tuned.within(share / whole) for share in SHARES if share < whole}
    return {
        "seconds": round(time.process_time() - began, 1),
        "runs": tuned.runs,
        "path": path,
        "order": [[each.block, each.how, each.damage] for each in tuned.order],
        "schedules": {share: each.schedule.to_dict() for share, each in found.items()},
    }


@contextmanager
def cached(pipe: Any, way: Way) -> Iterator[Skipper]:
    """A cache on the transformer, and the ledger of the blocks that run."""
    options = dict(way.options)
    if "Taylor" in way.cache:
        options["taylor_factors_dtype"] = torch.float32
    model = pipe.transformer
    model.enable_cache(getattr(diffusers, way.cache)(**options))
    try:
        with Skipper(model, SkipPlan()) as skipper:
            yield skipper
    finally:
        model.disable_cache()
        model._diffusers_hook.invalidate_child_registries_cache()


def made(sampler: Sampler, way: Way, plan: Plan, found: dict[str, Any]) -> tuple[Tensor, float, float]:
    """The clips of a way, its blocks relative to plain CFG, and processor seconds per clip."""
    specs, steps = plan.specs(), plan.steps or way.steps
    guidance = dict(way.guidance)
    if way.start:
        kept = {name: value for name, value in STARTS[way.start].items() if name != "cfg_interval"}
        guidance = kept | {"schedule": found[way.start]["schedules"][f"{way.share:g}"]}
    setting = Setting(way.name, way.family, 1, w=W, steps=steps, guidance=guidance or None)
    seed = 100 * plan.draw
    if not way.cache:
        clips = sampler.make(setting, specs, seed, steps)
        # the sampler counts relative to plain CFG at these steps; here it is relative to that at the usual ones
        return clips.pixels, clips.cost * steps / (plan.steps or STEPS), clips.seconds
    with cached(sampler.pipe, way) as skipper:
        clips = sampler.make(setting, specs, seed, steps)
    rows = skipper.stats.rows
    ran = sum(rows.get(block.name, 0) for block in skipper.map)
    return clips.pixels, ran / len(specs) / (2 * LAYERS * (plan.steps or STEPS)), clips.seconds


def features(folder: Path, name: str) -> Tensor:
    """What the judge sees in the clips of a way."""
    with np.load(folder / f"{name}.npz") as file:
        return torch.from_numpy(file["features"])


def _keep(folder: Path, name: str, arrays: dict[str, Tensor]) -> None:
    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez_compressed(file, **{key: value.numpy() for key, value in arrays.items()})

    folder.mkdir(parents=True, exist_ok=True)
    atomically(folder / f"{name}.npz", save)


def compute(plan: Plan, todo: Sequence[Way], folder: Path) -> dict[str, Any]:
    """Everything that is not there yet; then the distances."""
    torch.set_num_threads(1)
    classifier, sampler = AttributeClassifier.load(), Sampler()
    cells, kept = Cells(folder, {"plan": plan.__dict__}), folder / "features"
    if not (kept / "real.npz").exists():
        specs = [spec for spec in plan.specs() for _ in range(plan.real)]
        parts = [specs[at : at + 32] for at in range(0, len(specs), 32)]
        real = [read(classifier, render(part, 810_000 + 32 * n, FRAMES), part) for n, part in enumerate(parts)]
        _keep(kept, "real", {"features": torch.cat([each["features"] for each in real])})
    found: dict[str, Any] = {}
    rows = []
    for way in todo:
        if way.start and way.start not in found:
            found[way.start] = cells(f"searched-{way.start}", lambda start=way.start: searched(sampler, plan, start))
        rows.append(cells(way.name, lambda way=way: _one(sampler, classifier, way, plan, found, kept)))
        print(f"{way.name}: {rows[-1].get('cost')}", flush=True)
    return {"plan": plan.__dict__, "ways": _judged(rows, kept), "searched": found}


def _one(
    sampler: Sampler, classifier: AttributeClassifier, way: Way, plan: Plan, found: dict[str, Any], kept: Path
) -> dict[str, Any]:
    try:
        pixels, cost, seconds = made(sampler, way, plan, found)
    except (ValueError, RuntimeError) as error:
        if not way.cache:
            raise
        return way.to_dict() | {"not_offered": f"{type(error).__name__}: {error}"[:200]}
    seen = read(classifier, pixels, plan.specs())
    _keep(kept, way.name, seen)
    right = float(torch.stack([value for key, value in seen.items() if key.startswith("right_")]).all(0).float().mean())
    return way.to_dict() | {"cost": cost, "seconds_per_clip": round(seconds, 3), "right": right}


def _judged(rows: list[dict[str, Any]], kept: Path) -> list[dict[str, Any]]:
    """The rows with their distance, and with the difference to `frugal` of about as many blocks, clip by clip."""
    real = features(kept, "real")
    offered = [row for row in rows if "cost" in row]
    seen = {row["name"]: features(kept, row["name"]) for row in offered}
    rivals = [row for row in offered if row["family"] == "frugal, fewer steps"]
    draws = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(next(iter(seen.values()))), (len(next(iter(seen.values()))),), generator=draws)]
    picks += [torch.randint(len(picks[0]), picks[0].shape, generator=draws) for _ in range(DRAWS - 1)]
    for row in offered:
        row["frechet"] = frechet(seen[row["name"]], real)
        if rivals and row not in rivals:
            other = min(rivals, key=lambda rival: abs(rival["cost"] - row["cost"]))
            mine, theirs = seen[row["name"]], seen[other["name"]]
            apart = torch.tensor([frechet(mine[pick], real) - frechet(theirs[pick], real) for pick in picks])
            row["against"] = other["name"]
            row["difference"] = row["frechet"] - frechet(theirs, real)
            row["interval"] = [float(apart.quantile(0.025)), float(apart.quantile(0.975))]
    return rows
