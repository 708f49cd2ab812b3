"""The blocks that each way to guide runs, counted on paper."""

from __future__ import annotations

from typing import Any

from skipguide.pipelines.presets import PRESETS

VARIANTS = ("plain", "scale_0", "naive", "ours", "ours_deep", "one_batch", "diffusers")


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


def preset_layer(model: Any, blocks: int) -> int:
    """The first layer of the preset of the published model of this class and depth, whose width may be another here."""
    known = (each for each in PRESETS if (each.model, each.blocks) == (type(model).__name__, blocks))
    return next(each.preset.numbers[0] for each in known if each.preset is not None)


def deep_layer(blocks: int, preset: int) -> int:
    """A layer at 2/3 of the depth, or at 5/6 where the preset is there already."""
    deep = round(2 * blocks / 3)
    return deep if preset < 0.6 * blocks else round(5 * blocks / 6)
