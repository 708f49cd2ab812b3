"""The door to language models: how often the next token stays the same, by which sublayers are left out."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from PIL import Image

from demos.doors.bars import bars
from demos.real.llm_report import rows_of

DATA = Path(__file__).parents[1] / "real" / "llm.json"
COUNT = 8
# what the study calls a way to choose -> how a stranger would
WAYS = {
    "measured search": "found by a search",
    "AdaSkip": "chosen by AdaSkip",
    "random, ends kept": "at random",
    "late layers": "the last ones",
    "Unified, balanced": "evenly spread",
}


def shares() -> dict[str, float]:
    """How often the most probable next token of English is the whole model's, by how the sublayers were chosen."""
    rows = rows_of(json.loads(DATA.read_text()), "prefill", text="english", count=COUNT)
    of = {way: [row for row in rows if row["method"] == way] for way in WAYS}
    scaled = {way: [row for row in found if row["compensate"]] or found for way, found in of.items()}
    return {way: mean(row["agreement"] for row in found) for way, found in scaled.items()}


def draw() -> Image.Image:
    """Five bars, the longest first."""
    ordered = sorted(shares().items(), key=lambda each: -each[1])
    found = {WAYS[way]: 100 * share for way, share in ordered}
    title = f"{COUNT} of 60 sublayers left out:\nhow often is the next word the same?"
    return bars(found, {WAYS["measured search"], WAYS["AdaSkip"]}, title, "%.0f %%")
