"""Summary: from the files of a run to one row per setting, with means, deviations and a verdict against plain CFG."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demos.bundled_model.clips import ATTRIBUTES, ClipSpec, held_out
from demos.quality.measures import diversity, frechet
from demos.quality.settings import Setting
from demos.quality.work import REAL, REAL_EACH, Item, Plan, done, read_arrays
from demos.study import spread

MEASURES = {
    "frechet": "Fréchet distance",
    "seen": "right, seen combinations",
    "held_out": "right, held-out",
    "shape": "shape right",
    "diversity": "diversity",
    "dynamic": "motion of moving captions",
    "still": "motion of still captions",
    "flicker": "flicker",
    "saturation": "saturation",
}
STILL = "standing still"
# two-sided 95 % points of Student's t for the mean of n paired differences
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True)
class Reference:
    """What real clips of the same captions measure: features [N, D], and the means that the others are divided by."""

    features: Tensor
    diversity: float
    motion: float
    flicker: float
    saturation: float

    @classmethod
    def of(cls, real: Mapping[str, Tensor], specs: Sequence[ClipSpec], each: int) -> Reference:
        """Measure them; `each` neighbours share a caption."""
        moving = torch.tensor([spec.motion != STILL for spec in specs])
        return cls(
            real["features"],
            diversity(real["features"], each),
            float(real["motion"][moving].mean()),
            float(real["flicker"].mean()),
            float(real["saturation"].mean()),
        )


def measured(found: Mapping[str, Tensor], real: Reference, specs: Sequence[ClipSpec], each: int) -> dict[str, float]:
    """All measures of one set of clips; diversity, motion, flicker and saturation relative to the real clips'."""
    right = torch.stack([found[f"right_{name}"] for name in ATTRIBUTES]).all(0).float()
    unseen = torch.tensor([held_out(spec) for spec in specs])
    still = torch.tensor([spec.motion == STILL for spec in specs])

    def mean(values: Tensor, where: Tensor) -> float:
        return float(values[where].mean()) if where.any() else math.nan

    return {
        "frechet": frechet(found["features"], real.features),
        "seen": mean(right, ~unseen),
        "held_out": mean(right, unseen),
        "shape": float(found["right_shape"].float().mean()),
        "diversity": diversity(found["features"], each) / real.diversity,
        "dynamic": mean(found["motion"], ~still) / real.motion,
        "still": mean(found["motion"], still) / real.motion,
        "flicker": float(found["flicker"].mean()) / real.flicker,
        "saturation": float(found["saturation"].mean()) / real.saturation,
    }


def summarise(folder: Path, settings: Sequence[Setting], plan: Plan) -> dict[str, Any]:
    """One row per setting that has results, the floor of real clips, and the verdicts."""
    specs = plan.specs()
    arrays = read_arrays(folder, REAL)
    real = Reference.of(arrays, plan.specs(REAL_EACH), REAL_EACH)
    floor = {name.removeprefix("floor_"): value for name, value in arrays.items() if name.startswith("floor_")}
    rows = []
    for setting in settings:
        have = [i for i in (Item(setting, seed) for seed in range(plan.seeds)) if done(folder, i.name)]
        if not have:
            continue
        made = [read_arrays(folder, item.name) for item in have]
        found = [measured(one, real, specs, plan.each) for one in made]
        records = [json.loads((folder / f"{item.name}.json").read_text()) for item in have]
        if any(record["guidance"] != setting.guidance for record in records):
            raise ValueError(f"{folder} holds {setting.name} with other arguments: {records[0]['guidance']}")
        rows.append(
            setting.to_dict()
            | {"seeds": [item.seed for item in have], "clips": len(specs) * len(have)}
            | {"cost": records[0]["cost"] if len(records) == 1 else statistics.fmean(r["cost"] for r in records)}
            | {"seconds_per_clip": statistics.fmean(record["seconds_per_clip"] for record in records)}
            | {"reuse_error": records[0]["stats"].get("reuse_error")}
            | {"pooled": frechet(torch.cat([one["features"] for one in made]), real.features)}
            | {name: spread(one[name] for one in found) for name in MEASURES}
        )
    result = {
        "plan": plan.__dict__,
        "floor": measured(floor, real, specs, plan.each),
        "missing": [s.name for s in settings if s.name not in {row["name"] for row in rows}],
        "rows": rows,
    }
    _judge(rows)
    result["best_cfg"] = best["name"] if (best := best_cfg(rows)) else None
    result["frontier"] = frontier(rows)
    result["winners"] = [row["name"] for row in rows if row.get("wins")]
    return result


def best_cfg(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The row of plain CFG with the smallest distance: what everything is measured against."""
    return min((row for row in rows if row["family"] == "cfg"), key=lambda row: row["frechet"]["mean"], default=None)


def difference(row: Mapping[str, Any], other: Mapping[str, Any], measure: str) -> tuple[float, float]:
    """Mean of the paired differences over common seeds, and half of their 95 % interval (infinite for one seed)."""
    seeds = [seed for seed in row["seeds"] if seed in other["seeds"]]
    pairs = [
        row[measure]["values"][row["seeds"].index(s)] - other[measure]["values"][other["seeds"].index(s)] for s in seeds
    ]
    if not pairs:
        return math.nan, math.inf
    half = T95.get(len(pairs), 2.6) * statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
    return statistics.fmean(pairs), half


def _judge(rows: Sequence[dict[str, Any]]) -> None:
    """Better, worse or a tie in Fréchet distance, and whether the aim is met: better, as diverse, no dearer.

    `paired` is the distance as it would be on the reference's seeds: seeds differ by more than settings do, so rows
    with fewer of them are placed by their difference to the reference on the seeds that they share.
    """
    reference = best_cfg(rows)
    for row in rows:
        row["paired"] = row["frechet"]["mean"]
        if reference is None or row is reference:
            row["verdict"] = "reference" if row is reference else "no plain CFG to compare with"
            continue
        gain, half = difference(row, reference, "frechet")
        row["paired"] = reference["frechet"]["mean"] + gain
        row["frechet_difference"] = [gain, half if math.isfinite(half) else None]
        if not math.isfinite(half):
            row["verdict"] = "one seed"
            continue
        row["verdict"] = "better" if gain + half < 0 else "worse" if gain - half > 0 else "tie"
        lost, slack = difference(row, reference, "diversity")
        as_diverse = lost + slack >= 0
        row["wins"] = row["verdict"] == "better" and as_diverse and row["cost"] <= 1 + 1e-9 and not row["control"]


def frontier(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that no other one beats in both cost and distance (controls aside)."""
    own = sorted((r for r in rows if not r["control"]), key=lambda r: (r["cost"], r["paired"]))
    kept: list[str] = []
    best = math.inf
    for row in own:
        if row["paired"] < best:
            best = row["paired"]
            kept.append(row["name"])
    return kept
