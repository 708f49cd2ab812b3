"""What is compared: ways to run fewer blocks, each at a few of its own settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from demos.quality.settings import LAYER, SCALE

STEPS, W = 12, 4.0
PRESET: dict[str, Any] = {"layers": [LAYER], "scale": SCALE}
FRUGAL: dict[str, Any] = PRESET | {"cfg_interval": [0.2, 0.8]}
STARTS = {"frugal": FRUGAL, "stg": PRESET}
SHARES = (0.92, 0.77, 0.61, 0.46)  # of plain CFG's blocks: those of `frugal` at 12, 10, 8 and 6 steps


@dataclass(frozen=True)
class Way:
    """One way of sampling.

    Attributes:
        name: of its files.
        family: what one line of the figure joins.
        steps: of the sampler.
        guidance: arguments of `SpatiotemporalSkipGuidance`; empty is plain CFG.
        start: the guidance that a tuned schedule imitates; empty is no such schedule.
        share: of plain CFG's blocks, for a tuned schedule.
        cache: a cache of diffusers, by the name of its config.
        options: of the cache.
    """

    name: str
    family: str
    steps: int = STEPS
    guidance: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    share: float = 0.0
    cache: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def ways() -> list[Way]:
    """All of them, the most worth having first."""
    return [*_frugal(), *_cfg(), *_caches(), *_tuned("stg", (SHARES[1], SHARES[3]))]


def _tuned(start: str, shares: tuple[float, ...]) -> list[Way]:
    return [Way(f"tuned-{start}-{share:g}", f"tuned from {start}", start=start, share=share) for share in shares]


def _frugal() -> Iterator[Way]:
    yield from (Way(f"frugal-{n}", "frugal, fewer steps", n, FRUGAL) for n in (12, 10, 8, 6))
    yield from _tuned("frugal", SHARES[1:])


def _cfg() -> Iterator[Way]:
    yield from (Way(f"cfg-{n}", "plain CFG, fewer steps", n) for n in (12, 7))
    yield Way("stg-every-3", "every", guidance=PRESET | {"every": 3})
    yield Way("interval-mid", "limited interval", guidance={"scale": 0, "cfg_interval": [0.2, 0.8]})
    yield Way("cfg-every-2", "cfg_every", guidance={"scale": 0, "cfg_every": 2})


def _caches() -> Iterator[Way]:
    yield Way("first-block", "FirstBlockCache", cache="FirstBlockCacheConfig", options={"threshold": 0.1})
    flat = {"mag_ratios": [1.0] * STEPS, "num_inference_steps": STEPS, "threshold": 0.1, "retention_ratio": 0.2}
    yield Way("mag", "MagCache", cache="MagCacheConfig", options=flat | {"max_skip_steps": 1})
    blocks = {"cache_identifiers": [r"blocks\.\d+"], "disable_cache_before_step": 2}
    yield Way("taylor-seer", "TaylorSeer", cache="TaylorSeerCacheConfig", options=blocks | {"cache_interval": 2})
