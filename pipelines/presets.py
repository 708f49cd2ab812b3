"""Data only: layers and scales to start from, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap
from skipguide.plan import Part
from skipguide.schedule import Timetable

Origin = Literal["authors", "community", "measured here"]


@dataclass(frozen=True)
class Preset:
    """Recommended settings of one model.

    Attributes:
        layers: blocks to skip, in execution order; a `Timetable` of them where they change with the step.
        scale: recommended skip scale, or a `Timetable` of it.
        source: where the numbers come from.
        part: part of the blocks.
        formula: guidance formula.
        start: first step with skip guidance, as a fraction of the steps.
        stop: end of the skip guidance, as a fraction of the steps.
        origin: `"authors"` (of the method or the model), `"community"` or `"measured here"`.
        rescale: towards the deviation of the conditional prediction, or a `Timetable` of it.
        guidance_scale: CFG scale, where it is part of the recipe; None is the pipeline's.
    """

    layers: tuple[int, ...] | Timetable
    scale: float | Timetable
    source: str
    part: Part = "block"
    formula: str = "stg"
    start: float = 0.0
    stop: float = 1.0
    origin: Origin = "authors"
    rescale: float | Timetable = 0.0
    guidance_scale: float | Timetable | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """Every block that is skipped at some step."""
        if isinstance(self.layers, Timetable):
            return tuple(sorted({int(layer) for layers in self.layers.values for layer in layers}))
        return self.layers


@dataclass(frozen=True)
class KnownModel:
    """One published model, told by its config, and what is known of skipping in it.

    Attributes:
        name: as people call it.
        model: class of its denoiser.
        blocks: number of blocks, over all stacks.
        width: channels of a block: heads times the channels of a head.
        preset: the recommended settings; None where no source is known.
        config: further entries that tell it from models which agree in the rest; a set holds several values.
        experts: whether the pipeline has a second denoiser of the same kind (`transformer_2`); None: either.
    """

    name: str
    model: str
    blocks: int
    width: int
    preset: Preset | None
    config: Mapping[str, Any] = field(default_factory=dict)
    experts: bool | None = None

    def matches(self, model: Any, blocks: int, experts: bool) -> bool:
        """Whether a denoiser is this model, by its config."""
        config = getattr(model, "config", {})
        width = (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0)
        width = width or config.get("dim") or config.get("model_dim")
        return (
            (type(model).__name__, blocks, width) == (self.model, self.blocks, self.width)
            and self.experts in (None, experts)
            and all(_agrees(config.get(name), value) for name, value in self.config.items())
        )


def _agrees(found: Any, wanted: Any) -> bool:
    found = tuple(found) if isinstance(found, list) else found
    return found in wanted if isinstance(wanted, frozenset) else found == wanted


_STG = "STG authors' code (github.com/junhahyung/STGuidance, HEAD)"
_TINY = (
    "measured on the bundled tiny-t2v (demos/quality/results.md): of the layers that do least harm at scale 1 the "
    "cheaper one, at a scale that is a tie with plain CFG in Fréchet distance; none was found that beats it"
)
_LTX2 = "Lightricks' recommendation in the documentation of diffusers' LTX2Pipeline (spatio_temporal_guidance_blocks)"
_LTX_13B = (
    "Lightricks' preset '13b Balanced' (ComfyUI-LTXVideo, presets/stg_advanced_presets.json), whose rescale looks at "
    "denoised samples, over the whole batch; here it looks at what the model predicts"
)
_SIGMAS = (1.0, 0.9933, 0.985, 0.9767, 0.9008, 0.618)


def _by_sigma(*values: Any) -> Timetable:
    return Timetable(tuple(zip(_SIGMAS, values, strict=True)), over="sigma")


PRESETS: tuple[KnownModel, ...] = (
    KnownModel(
        "tiny-t2v",
        "WanTransformer3DModel",
        8,
        192,
        Preset((5,), 0.5, _TINY, origin="measured here"),
    ),
    KnownModel("LTX-Video 2B", "LTXVideoTransformer3DModel", 28, 2048, Preset((19,), 1.0, _STG)),
    KnownModel(
        "LTX-Video 13B",
        "LTXVideoTransformer3DModel",
        48,
        4096,
        Preset(
            _by_sigma((12,), (12,), (5,), (5,), (28,), (29,)),
            _by_sigma(0.0, 4.0, 4.0, 4.0, 2.0, 1.0),
            _LTX_13B,
            part="attn_identity",
            rescale=_by_sigma(1.0, 0.5, 0.5, 1.0, 1.0, 1.0),
            guidance_scale=_by_sigma(1.0, 6.0, 8.0, 6.0, 1.0, 1.0),
        ),
    ),
    KnownModel(
        "LTX-2.0",
        "LTX2VideoTransformer3DModel",
        48,
        4096,
        Preset((29,), 1.0, _LTX2, part="attn_identity"),
        {"gated_attn": False},
    ),
    KnownModel(
        "LTX-2.3",
        "LTX2VideoTransformer3DModel",
        48,
        4096,
        Preset((28,), 1.0, _LTX2, part="attn_identity"),
        {"gated_attn": True},
    ),
    KnownModel("Mochi", "MochiTransformer3DModel", 48, 3072, Preset((34,), 1.0, _STG)),
    KnownModel("CogVideoX 2B", "CogVideoXTransformer3DModel", 30, 1920, Preset((11,), 1.0, _STG)),
    KnownModel(
        "CogVideoX 5B",
        "CogVideoXTransformer3DModel",
        42,
        3072,
        Preset((11,), 1.0, f"{_STG}, whose comment counts 42 layers although its example is the 2B model"),
        {"patch_size_t": None},
    ),
    KnownModel("CogVideoX 1.5 5B", "CogVideoXTransformer3DModel", 42, 3072, None, {"patch_size_t": 2}),
    KnownModel("HunyuanVideo", "HunyuanVideoTransformer3DModel", 60, 3072, Preset((2,), 1.0, _STG)),
    KnownModel("HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel", 54, 2048, None),
    KnownModel(
        "Wan 2.1 1.3B",
        "WanTransformer3DModel",
        30,
        1536,
        Preset((8,), 1.0, "diffusers community pipeline pipeline_stg_wan, documentation example", origin="community"),
    ),
    KnownModel(
        "Wan 2.1 14B",
        "WanTransformer3DModel",
        40,
        5120,
        Preset(
            (9, 10),
            1.0,
            "what users of ComfyUI and Wan2GP report (reddit.com/r/StableDiffusion, 1jac3wm and 1k3tudz): 9 and 10 "
            "left out in the unconditional pass, after the first steps",
            formula="uncond",
            start=0.1,
            origin="community",
        ),
        experts=False,
    ),
    KnownModel("Wan 2.2 A14B", "WanTransformer3DModel", 40, 5120, None, experts=True),
    KnownModel("Wan 2.2 5B", "WanTransformer3DModel", 30, 3072, None),
    KnownModel("SD 3 medium", "SD3Transformer2DModel", 24, 1536, None, {"dual_attention_layers": ()}),
    KnownModel(
        "SD 3.5 medium",
        "SD3Transformer2DModel",
        24,
        1536,
        Preset(
            (7, 8, 9),
            2.8,
            "diffusers StableDiffusion3Pipeline's skip_guidance_layers for SD 3.5 medium, with its window",
            start=0.01,
            stop=0.2,
        ),
        {"dual_attention_layers": tuple(range(13))},
    ),
    KnownModel("SD 3.5 large", "SD3Transformer2DModel", 38, 2432, None),
    KnownModel("Flux", "FluxTransformer2DModel", 57, 3072, None),
    KnownModel("Flux 2", "Flux2Transformer2DModel", 56, 6144, None),
    KnownModel("Qwen-Image", "QwenImageTransformer2DModel", 60, 3072, None),
    KnownModel("Z-Image", "ZImageTransformer2DModel", 34, 3840, None),
    KnownModel("Kandinsky 5 Video Lite", "Kandinsky5Transformer3DModel", 34, 1792, None),
    KnownModel("Kandinsky 5 Video Pro", "Kandinsky5Transformer3DModel", 64, 4096, None),
)


# Settings for `SpatiotemporalSkipGuidance.preset`; what they do not say is the model's preset.
NAMED: dict[str, dict[str, Any]] = {
    # demos/quality/results.md, row interval-mid-stg, at guidance_scale=4
    "frugal": {"cfg_interval": (0.2, 0.8)},
}


def named_settings(name: str) -> dict[str, Any]:
    """The arguments of a named preset.

    Raises:
        SkipError: if there is none of that name.
    """
    if name not in NAMED:
        raise SkipError(f"unknown preset {name!r}; expected one of {', '.join(map(repr, NAMED))}")
    return dict(NAMED[name])


def find_preset(transformer: Any, pipe: Any = None) -> Preset:
    """The preset of a denoiser, by its class and config: depth, width, and what else tells published models apart.

    Args:
        transformer: the denoiser.
        pipe: its pipeline, where that tells models apart: Wan 2.2 has two denoisers of Wan 2.1's kind.

    Raises:
        SkipError: if no source gives one; `skipguide rank` and `skipguide sweep` find one.
    """
    blocks = len(find_blocks(transformer))
    model = unwrap(transformer)
    experts = getattr(pipe, "transformer_2", None) is not None
    known = next((each for each in PRESETS if each.matches(model, blocks, experts)), None)
    if known is not None and known.preset is not None:
        return known.preset
    who = f"{type(model).__name__} with {blocks} blocks and this config"
    if known is not None:
        who = f"{known.name} ({known.model}, {blocks} blocks of {known.width} channels): none known"
    others = ", ".join(each.name for each in PRESETS if each.preset is not None)
    raise SkipError(
        f"no preset for {who}: pass layers=[...]. `skipguide rank` "
        f"scores every layer, and layers='auto' takes its first; `skipguide sweep PROMPT --model ... --layers all` "
        f"draws what each does. Presets exist for {others}"
    )
