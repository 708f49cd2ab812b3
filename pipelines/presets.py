"""Data only: layers and scales to start from, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap


@dataclass(frozen=True)
class Preset:
    """Recommended settings of one model.

    Attributes:
        layers: blocks to skip, in execution order.
        scale: recommended skip scale.
        source: where the numbers come from.
        part: part of the blocks.
        formula: guidance formula.
    """

    layers: tuple[int, ...]
    scale: float
    source: str
    part: str = "block"
    formula: str = "stg"


_STG = "STG authors' code (github.com/junhahyung/STGuidance, HEAD)"
_COMMUNITY = "diffusers community pipeline pipeline_stg_wan, documentation example"

_TINY = (
    "measured on the bundled tiny-t2v (demos/quality/results.md): the best of its twelve layers, and the best part and "
    "scale but for one that is a tie, in Fréchet distance"
)

# (transformer class, number of blocks) -> preset
PRESETS: dict[tuple[str, int], Preset] = {
    ("LatteTransformer3DModel", 12): Preset((9,), 2.0, _TINY, part="attn_identity"),
    ("LTXVideoTransformer3DModel", 28): Preset((19,), 1.0, _STG),
    ("MochiTransformer3DModel", 48): Preset((34,), 1.0, _STG),
    ("CogVideoXTransformer3DModel", 30): Preset((11,), 1.0, _STG),
    ("CogVideoXTransformer3DModel", 42): Preset((11,), 1.0, _STG),
    ("HunyuanVideoTransformer3DModel", 60): Preset((2,), 1.0, _STG),
    ("WanTransformer3DModel", 30): Preset((8,), 1.0, _COMMUNITY),
    ("WanTransformer3DModel", 40): Preset((8,), 1.0, _COMMUNITY),
    ("SD3Transformer2DModel", 24): Preset(
        (7, 8, 9),
        2.8,
        "diffusers StableDiffusion3Pipeline's skip_guidance_layers for SD 3.5 medium (0.01 to 0.2 of the steps)",
    ),
}


# Settings that were measured to win, for `SpatiotemporalSkipGuidance.preset`; layers are those of the model's preset.
NAMED: dict[str, dict[str, Any]] = {
    # demos/quality/results.md, row interval-mid-attn, at guidance_scale=4
    "frugal": {"scale": 2.0, "part": "attn_identity", "cfg_interval": (0.2, 0.8)},
}


def named_settings(name: str) -> dict[str, Any]:
    """The arguments of a named preset.

    Raises:
        SkipError: if there is none of that name.
    """
    if name not in NAMED:
        raise SkipError(f"unknown preset {name!r}; expected one of {', '.join(map(repr, NAMED))}")
    return dict(NAMED[name])


def find_preset(transformer: Any) -> Preset:
    """The preset of a denoiser, by its class and number of blocks.

    Raises:
        SkipError: if there is none; `skipguide sweep` finds one.
    """
    blocks = find_blocks(transformer)
    name = type(unwrap(transformer)).__name__
    if (preset := PRESETS.get((name, len(blocks)))) is None:
        known = ", ".join(f"{n} ({b} blocks)" for n, b in PRESETS)
        raise SkipError(
            f"no preset for {name} with {len(blocks)} blocks: pass layers=[...]. `skipguide sweep "
            f"PROMPT --model ... --layers all` draws what every layer does, and layers='auto' takes the first of "
            f"`skipguide rank`. Presets exist for {known}"
        )
    return preset
