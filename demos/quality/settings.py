"""What is compared: every setting with everything that its clips depend on.

Tier 1 answers whether skip guidance beats plain CFG, with the controls; tier 2 says which layer; tier 3 is the
protocol and one look at everything else; tier 4 is other perturbations and other guiders.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STEPS = 12  # the row cfg-20-steps says whether that is enough
W = 3.0  # the CFG scale beside skip guidance
W_LOW, W_HIGH = 2.0, 4.0  # plain CFG is about as good at 3 and 4
LAYERS = 8
LAYER = 5  # what the scale grids skip: of the single layers that do least harm at scale 1 the cheaper one
SCALE = 0.5  # of the preset


@dataclass(frozen=True)
class Setting:
    """One way of sampling.

    Attributes:
        name: of its files.
        family: settings that one line of a figure joins.
        tier: 1 to 4; lower ones are made first.
        w: the pipeline's guidance_scale; 1 is without CFG.
        steps: of the sampler.
        guidance: arguments of `SpatiotemporalSkipGuidance`, or None.
        guider: of another guidance, the class and its arguments: `Guide` around one of diffusers, or one of ours.
        control: `"random"` (a random direction of the same norm in place of c - k), `"weak"` (an early checkpoint in
            place of the model without layers), or empty.
        scale: s of a control.
        precision: of the matrix products; `"bf16"` is autocast, 1.5 times as fast on this processor.
        once: the first seed only.
        note: what it is there for.
    """

    name: str
    family: str
    tier: int
    w: float = W
    steps: int = STEPS
    guidance: dict[str, Any] | None = None
    guider: tuple[str, dict[str, Any]] | None = None
    control: str = ""
    scale: float = 0.0
    precision: str = "bf16"
    once: bool = False
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class Catalogue:
    """Collects settings and refuses a name twice."""

    found: dict[str, Setting] = field(default_factory=dict)

    def add(self, name: str, family: str, tier: int, **how: Any) -> None:
        """One more setting."""
        if name in self.found:
            raise ValueError(f"two settings are called {name!r}")
        self.found[name] = Setting(name, family, tier, **how)

    def skip(
        self, name: str, family: str, tier: int, *, w: float = W, once: bool = False, note: str = "", **guidance: Any
    ) -> None:
        """One more setting with skip guidance."""
        self.add(name, family, tier, w=w, once=once, note=note, guidance=guidance)


def catalogue(layer: int = LAYER) -> dict[str, Setting]:
    """All settings; `layer` is the one that the scale grids skip (the best of the single layers)."""
    c = Catalogue()
    block, attn = {"layers": [layer]}, {"layers": [layer], "part": "attn_identity"}
    c.add("none", "none", 1, w=1.0, note="no guidance")
    for w in (2.0, 3.0, 4.0, 6.0):
        c.add(f"cfg-{w:g}", "cfg", 1, w=w, note="plain CFG")

    # the paper's claim, with its controls
    for s in (0.25, 0.5, 1.0):
        c.skip(f"stg-block-{s:g}", "stg block", 1, scale=s, note="the paper's STG-R", **block)
    for s in (0.25, 0.5):
        c.skip(f"stg-attn-{s:g}", "stg attn_identity", 1, scale=s, note="STG-A", **attn)
    pair = [layer, layer + 1 if layer + 1 < LAYERS else layer - 1]
    c.skip("two-blocks", "stg two blocks", 1, layers=pair, scale=SCALE, note="two neighbours left out together")
    c.add("cfg-equal", "cfg, more steps", 1, steps=14, note="the compute of stg-block, spent on steps of plain CFG")
    c.add("random-0.5", "random direction", 1, control="random", scale=0.5, note="norm of c - k, random direction")
    c.add("autoguidance-0.5", "autoguidance", 1, control="weak", scale=0.5, note="k from an early checkpoint")

    # less than the cost of CFG
    middle = {"w": W_HIGH, "cfg_interval": [0.2, 0.8]}
    c.skip("interval-mid", "cfg_interval", 1, scale=0, **middle)
    c.skip("interval-mid-stg", "cfg_interval + stg", 1, scale=SCALE, **middle, **block)
    c.skip("interval-mid-stg-in", "cfg_interval + stg", 1, scale=SCALE, start=0.2, stop=0.8, **middle, **block)
    c.skip("interval-early", "cfg_interval", 1, w=W_HIGH, scale=0, cfg_interval=[0.0, 0.5])
    c.skip("segmented-0.5", "segmented", 1, scale=SCALE, formula="segmented", **block)
    c.skip("uncond", "uncond", 1, formula="uncond", note="no third pass", **block)
    c.skip("stochastic-0.5", "stochastic", 1, layers="stochastic", scale=0.5)

    # which layer; also what the scores of `skipguide rank` are judged by
    for other in range(LAYERS):
        if other != layer:
            c.skip(f"layer-{other}", "single layers", 2, once=True, layers=[other], note="stg-block-1, another layer")

    # the protocol, and one look at everything else
    c.add("cfg-1.5", "cfg", 3, once=True, w=1.5, note="plain CFG")
    c.add("cfg-20-steps", "protocol", 3, once=True, steps=20, note="are 12 steps enough?")
    c.add("cfg-fp32", "protocol", 3, once=True, precision="fp32", note="is bf16 autocast enough?")
    c.add("cfg-naive", "cfg, more steps", 3, once=True, steps=18, note="the compute of a full third pass, on steps")
    c.skip("stg-attn-1", "stg attn_identity", 3, once=True, scale=1.0, **attn)
    c.skip("stg-block-0.5-low", "stg block, less CFG", 3, once=True, w=W_LOW, scale=0.5, **block)
    c.skip("stg-alone-0.5", "stg without CFG", 3, once=True, w=1.0, scale=0.5, note="no unconditional pass", **block)
    c.skip("stg-alone-1", "stg without CFG", 3, once=True, w=1.0, scale=1.0, **block)
    c.skip("interval-mid-low", "cfg_interval", 3, once=True, scale=0, cfg_interval=[0.2, 0.8])
    c.skip("interval-early-low", "cfg_interval", 3, once=True, scale=0, cfg_interval=[0.0, 0.5])
    c.skip("segmented-1", "segmented", 3, once=True, formula="segmented", **block)
    c.skip("uncond-high", "uncond", 3, once=True, w=W_HIGH, formula="uncond", **block)
    c.add("autoguidance-1", "autoguidance", 3, once=True, control="weak", scale=1.0)
    c.add("random-1", "random direction", 3, once=True, control="random", scale=1.0)
    c.skip("every-2", "every", 3, once=True, scale=SCALE, every=2, **block)
    c.skip("stochastic-cheap-0.5", "stochastic", 3, once=True, layers="stochastic", scale=0.5, prefer_cheap=True)
    c.skip("every-4", "every", 3, once=True, scale=SCALE, every=4, **block)
    c.skip("window", "window", 3, once=True, scale=SCALE, start=0.2, stop=0.8, **block)
    c.skip("apg", "projected", 3, once=True, scale=SCALE, apg=0.0, **block)
    c.skip("rescale", "rescaled", 3, once=True, scale=SCALE, rescale=0.7, **block)
    c.skip("zero-star", "cfg zero*", 3, once=True, scale=0, zero_star=True)
    groups = [{"version": 1, "layers": [number], "scale": SCALE / 2, "part": "block"} for number in pair]
    c.skip("two-groups", "groups", 3, once=True, groups=groups, note="each left out in a pass of its own")
    _others(c, layer)
    return c.found


def _others(c: Catalogue, layer: int) -> None:
    """Other parts of the same block, and other guiders."""
    for name, part, more in (
        ("blur", "attn_blur", {"part_options": {"sigma": None}}),
        ("blur-1", "attn_blur", {"part_options": {"sigma": 1.0}}),
        ("window-time", "window_time", {}),
        ("window-space", "window_space", {}),
        ("cross", "cross_attn", {}),
        ("token-shuffle", "token_shuffle", {}),
        ("self-swap", "self_swap", {}),
        ("mlp", "mlp", {}),
        ("attn", "attn", {}),
        ("strength", "attn_identity", {"strength": 0.5}),
        ("heads", "attn_identity", {"heads": [0]}),
    ):
        c.skip(f"part-{name}", f"part {part}", 4, layers=[layer], part=part, scale=SCALE, **more)
    for name, guider, settings in (
        ("tcfg", "TangentialClassifierFreeGuidance", {"guidance_scale": W}),
        ("fdg", "FrequencyDecoupledGuidance", {"guidance_scales": [W_HIGH, W]}),
        ("apg", "AdaptiveProjectedGuidance", {"guidance_scale": W_HIGH, "eta": 0.0}),
        ("tag", "TangentialAmplifyingGuidance", {"scale": 1.15}),
    ):
        c.add(f"guider-{name}", "other guiders", 4, guider=(guider, settings), note=guider)


def single_layers(layer: int = LAYER) -> dict[int, str]:
    """Layer -> the name of the setting that skips it alone, at scale 1."""
    return {n: f"layer-{n}" if n != layer else "stg-block-1" for n in range(LAYERS)}


QUICK = ("none", "cfg-2", "cfg-3", "stg-block-0.5", "stg-attn-0.5", "random-0.5", "interval-mid", "segmented-0.5")
