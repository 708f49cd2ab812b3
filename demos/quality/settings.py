"""What is compared: every setting with everything that its clips depend on.

Tier 1 answers whether skip guidance beats plain CFG, with the controls; tier 2 says which layer; tier 3 is the
protocol and one look at everything else; tier 4 is other perturbations and other guiders.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STEPS = 12  # as good as the 20 that `skipguide generate` takes: the row cfg-3-20-steps
W = 3.0  # the CFG scale beside skip guidance
W_LOW, W_HIGH = 2.0, 4.0  # plain CFG is about as good at 3 and 4
LAYERS = 12


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


def catalogue(layer: int = 9) -> dict[str, Setting]:
    """All settings; `layer` is the one that the scale grids skip (the best of the single layers)."""
    c = Catalogue()
    attn = {"layers": [layer], "part": "attn_identity"}
    c.add("none", "none", 1, w=1.0, note="no guidance")
    for w in (2.0, 3.0, 4.0, 6.0):
        c.add(f"cfg-{w:g}", "cfg", 1, w=w, note="plain CFG")

    # the paper's claim, with its controls
    for s in (0.5, 1.0):
        c.skip(f"stg-block-{s:g}", "stg block", 1, layers=[layer], scale=s, note="the paper's STG-R")
    for s in (1.0, 2.0, 4.0):
        c.skip(f"stg-attn-{s:g}", "stg attn_identity", 1, scale=s, note="STG-A", **attn)
    c.add("cfg-equal", "cfg, more steps", 1, steps=13, note="the compute of stg-block, spent on steps of plain CFG")
    c.add("random-1", "random direction", 1, control="random", scale=1.0, note="same norm as c - k, random direction")
    c.add("autoguidance-0.5", "autoguidance", 1, control="weak", scale=0.5, note="k from an early checkpoint")

    # better than CFG at less than its cost
    middle = {"w": W_HIGH, "cfg_interval": [0.2, 0.8]}
    c.skip("interval-mid", "cfg_interval", 1, scale=0, **middle)
    c.skip("interval-mid-attn", "cfg_interval + stg", 1, scale=2.0, **middle, **attn)
    c.skip("interval-mid-attn-in", "cfg_interval + stg", 1, scale=2.0, start=0.2, stop=0.8, **middle, **attn)
    c.skip("interval-early", "cfg_interval", 1, w=W_HIGH, scale=0, cfg_interval=[0.0, 0.5])
    c.skip("segmented-attn-2", "segmented", 1, scale=2.0, formula="segmented", **attn)
    c.skip("uncond", "uncond", 1, layers=[layer], formula="uncond", note="no third pass")
    c.skip("stochastic-0.5", "stochastic", 1, layers="stochastic", scale=0.5)

    # which layer; also what the scores of `skipguide rank` are judged by
    for other in range(LAYERS):
        if other != layer:
            c.skip(f"layer-{other}", "single layers", 2, once=True, layers=[other], note="stg-block-1, another layer")

    # the protocol, and one look at everything else
    c.add("cfg-1.5", "cfg", 3, once=True, w=1.5, note="plain CFG")
    c.skip("stg-block-2", "stg block", 3, once=True, layers=[layer], scale=2.0)
    c.skip("stg-block-1-low", "stg block, less CFG", 3, once=True, w=W_LOW, layers=[layer])
    c.skip("stg-alone-1", "stg without CFG", 3, once=True, w=1.0, layers=[layer], note="no unconditional pass")
    c.skip("segmented-1", "segmented", 3, once=True, layers=[layer], formula="segmented")
    c.skip("interval-mid-low", "cfg_interval", 3, once=True, scale=0, cfg_interval=[0.2, 0.8])
    c.skip("interval-early-low", "cfg_interval", 3, once=True, scale=0, cfg_interval=[0.0, 0.5])
    for name, w in (("interval-early-attn-low", W), ("interval-early-attn", W_HIGH)):
        c.skip(name, "cfg_interval + stg", 3, once=True, w=w, scale=2.0, cfg_interval=[0.0, 0.5], **attn)
    c.skip("every-2", "every", 3, once=True, layers=[layer], every=2)
    c.add("cfg-20-steps", "protocol", 3, once=True, steps=20, note="are 12 steps enough?")
    c.add("cfg-fp32", "protocol", 3, once=True, precision="fp32", note="is bf16 autocast enough?")
    c.add("cfg-naive", "cfg, more steps", 3, once=True, steps=18, note="the compute of a full third pass, on steps")
    c.skip("stg-attn-0.5", "stg attn_identity", 3, once=True, scale=0.5, **attn)
    c.skip("stg-block-0.5-low", "stg block, less CFG", 3, once=True, w=W_LOW, layers=[layer], scale=0.5)
    c.skip("stg-alone-0.5", "stg without CFG", 3, once=True, w=1.0, layers=[layer], scale=0.5)
    c.skip("uncond-high", "uncond", 3, once=True, w=W_HIGH, layers=[layer], formula="uncond")
    c.add("autoguidance-1", "autoguidance", 3, once=True, control="weak", scale=1.0)
    c.add("random-2", "random direction", 3, once=True, control="random", scale=2.0)
    c.skip("stochastic-cheap-0.5", "stochastic", 3, once=True, layers="stochastic", scale=0.5, prefer_cheap=True)
    c.skip("every-4", "every", 3, once=True, layers=[layer], every=4)
    c.skip("window", "window", 3, once=True, layers=[layer], start=0.2, stop=0.8)
    c.skip("apg", "projected", 3, once=True, layers=[layer], apg=0.0)
    c.skip("rescale", "rescaled", 3, once=True, layers=[layer], rescale=0.7)
    c.skip("zero-star", "cfg zero*", 3, once=True, scale=0, zero_star=True)
    groups = [
        {"version": 1, "layers": [4], "scale": 0.5, "part": "block", "stack": stack}
        for stack in ("transformer_blocks", "temporal_transformer_blocks")
    ]
    c.skip("space-and-time", "groups", 3, once=True, groups=groups, note="a spatial and a temporal block, 0.5 each")
    _others(c, layer)
    return c.found


def _others(c: Catalogue, layer: int) -> None:
    """Other parts of the same block, one of a spatial block where the part is about places, and other guiders."""
    spatial = layer - layer % 2  # Latte's blocks are of space and time by turns
    for name, part, scale, more in (
        ("blur", "attn_blur", 2.0, {"part_options": {"sigma": None}}),
        ("blur-1", "attn_blur", 2.0, {"part_options": {"sigma": 1.0}}),
        ("window-time", "window_time", 2.0, {}),
        ("token-shuffle", "token_shuffle", 1.0, {}),
        ("self-swap", "self_swap", 1.0, {}),
        ("mlp", "mlp", 1.0, {}),
        ("attn", "attn", 1.0, {}),
        ("strength", "attn_identity", 4.0, {"strength": 0.5}),
        ("heads", "attn_identity", 2.0, {"heads": [0, 1]}),
    ):
        c.skip(f"part-{name}", f"part {part}", 4, layers=[layer], part=part, scale=scale, **more)
    for name, part in (("blur", "attn_blur"), ("window", "window_space"), ("cross", "cross_attn")):
        c.skip(f"space-{name}", f"part {part}", 4, layers=[spatial], part=part, scale=2.0)
    for name, guider, settings in (
        ("tcfg", "TangentialClassifierFreeGuidance", {"guidance_scale": W}),
        ("fdg", "FrequencyDecoupledGuidance", {"guidance_scales": [W_HIGH, W]}),
        ("apg", "AdaptiveProjectedGuidance", {"guidance_scale": W_HIGH, "eta": 0.0}),
        ("tag", "TangentialAmplifyingGuidance", {"scale": 1.15}),
    ):
        c.add(f"guider-{name}", "other guiders", 4, guider=(guider, settings), note=guider)


def single_layers(layer: int = 9) -> dict[int, str]:
    """Layer -> the name of the setting that skips it alone, at scale 1."""
    return {n: f"layer-{n}" if n != layer else "stg-block-1" for n in range(LAYERS)}


QUICK = ("none", "cfg-2", "cfg-3", "stg-block-1", "stg-attn-1", "random-1", "interval-mid", "segmented-1")
