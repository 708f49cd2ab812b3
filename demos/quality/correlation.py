"""Which score of `skipguide rank` predicts what skipping a layer does for quality? Rank correlation over the layers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from demos.bundled_model.clips import caption
from demos.quality.sampling import load, prompts
from demos.quality.settings import STEPS, W, single_layers
from skipguide.assets import bundled
from skipguide.pipelines import calibrate
from skipguide.pipelines.bundled import call_of
from skipguide.select import LIMIT, SCORES, LayerScores


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end + 1 < len(order) and values[order[end + 1]] == values[order[at]]:
            end += 1
        for place in range(at, end + 1):
            found[order[place]] = (at + end) / 2
        at = end + 1
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; 0 if one side is constant."""
    x, y = ranks(a), ranks(b)
    n = len(x)
    mx, my = sum(x) / n, sum(y) / n
    sx, sy = sum((v - mx) ** 2 for v in x), sum((v - my) ** 2 for v in y)
    top = sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True))
    return float(top / (sx * sy) ** 0.5) if sx and sy else 0.0


def interval(a: Sequence[float], b: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the rank correlation, drawing layers with replacement."""
    rng = random.Random(seed)
    found = []
    for _ in range(rounds):
        drawn = [rng.randrange(len(a)) for _ in a]
        found.append(spearman([a[i] for i in drawn], [b[i] for i in drawn]))
    found.sort()
    return found[int(0.025 * rounds)], found[int(0.975 * rounds) - 1]


def correlate(rows: Sequence[Mapping[str, Any]], layer: int, scores: LayerScores | None = None) -> list[dict[str, Any]]:
    """Each score against the gain of every single layer over plain CFG at the same w, on the first seed.

    Returns nothing until all single layers were measured.
    """
    by_name = {row["name"]: row for row in rows}
    names = single_layers(layer)
    plain = by_name.get(f"cfg-{W:g}")
    if plain is None or not all(name in by_name for name in names.values()):
        return []
    gains = [plain["frechet"]["values"][0] - by_name[names[n]]["frechet"]["values"][0] for n in names]
    if scores is None:
        words = [caption(spec) for spec in prompts(8, 1)]
        pipe = load(bundled())
        call = call_of(bundled(), type(pipe)) | {"guidance_scale": W, "num_inference_steps": STEPS}
        scores = calibrate(pipe, words, parts=["block"], call=call)
    of = {row.layer: row for row in scores.select("block")}
    found = []
    control = {"depth (control)": lambda row: float(row.layer)}
    for name, score in (SCORES | control).items():
        # as `rank` does: what is too strong comes last
        values = [score(of[n]) if of[n].effect <= LIMIT else -1e3 - of[n].effect for n in names]
        low, high = interval(values, gains)
        found.append({"score": name, "rho": spearman(values, gains), "low": low, "high": high})
    return sorted(found, key=lambda row: -row["rho"])
