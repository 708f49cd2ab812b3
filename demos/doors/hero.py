"""The hero: a clip plainly, as the model draws it with the layer left out, and guided away from that.

The rule by which the clip is chosen: of the four prompts of `demos.side_by_side`, with seed 0, the one that guidance
changes most in the mean over pixels and frames, for better or worse; its middle frame. The setting is the preset.
"""

from __future__ import annotations

import torch
from PIL import Image

from demos.doors.panels import Panel, row
from demos.side_by_side import PROMPTS
from skipguide import Skipper, SkipPlan
from skipguide.media import pictures
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline, find_preset

SEED = 0


def draw() -> Image.Image:
    """Three panels of the clip that changes most."""
    pipe, call = bundled_pipeline()
    preset = find_preset(pipe.transformer)

    def clips() -> list[list[Image.Image]]:
        generators = [torch.Generator().manual_seed(SEED) for _ in PROMPTS]
        found = pipe(list(PROMPTS), generator=generators, output_type="pt", **call).frames
        return [pictures.as_images(clip) for clip in found]

    plain = clips()
    with SpatiotemporalSkipGuidance(preset.layers, preset.scale, preset.part).apply(pipe) as applied:
        guided = clips()
    with Skipper(pipe.transformer, SkipPlan(preset.layers, preset.part)):
        left_out = clips()
    changes = [pictures.difference(*pair) for pair in zip(plain, guided, strict=True)]
    for prompt, change in zip(PROMPTS, changes, strict=True):
        print(f"{prompt}: {pictures.in_levels(change)}")
    chosen = changes.index(max(changes))
    costs = {"plain": 1.0, "layer left out": 1.0, "guided": applied.stats.blocks_run / applied.stats.blocks_plain}
    panels = [
        Panel(clips[chosen][len(clips[chosen]) // 2], words, cost / max(costs.values()), f"{cost:.2f} x the work")
        for (words, cost), clips in zip(costs.items(), (plain, left_out, guided), strict=True)
    ]
    return row(panels, PROMPTS[chosen])
