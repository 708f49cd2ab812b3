"""The door to video: what skip guidance costs, by who runs the further pass."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from demos.doors.bars import bars

DATA = Path(__file__).parents[1] / "benchmarks" / "stg_cost.json"
# what the benchmark calls a way to run it -> how a stranger would
WAYS = {
    "plain": "no guidance",
    "ours": "skipguide",
    "one_batch": "one larger batch",
    "naive": "a full third pass",
    "diffusers": "diffusers' own",
}


def times() -> dict[str, float]:
    """Time of a step over the plain pipeline's, on LTX-Video's shape."""
    models = json.loads(DATA.read_text())["models"]
    (ltx,) = (model["variants"] for model in models if model["name"] == "ltx")
    return {way: ltx[way]["time_to_plain"]["median"] for way in WAYS}


def draw() -> Image.Image:
    """Five bars."""
    found = {WAYS[way]: time for way, time in times().items()}
    return bars(found, {WAYS["ours"]}, "Time of a step with skip guidance\n(LTX-Video's shape, on a CPU)", "%.2f x")
