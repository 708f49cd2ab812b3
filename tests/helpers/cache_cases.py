"""Caches on the families that the laws are for: how each is enabled, and what is to be expected of the two together.

The configurations are for random weights: `"never"` is the cache's own way to say that nothing is answered, `"hits"`
answers some steps and computes others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch

from zoo.pipes import BY_PIPE, PipeCase
from zoo.pipes_video import BY_VIDEO
from zoo.video_case import VideoCase

STEPS, LAYER = 8, 2
FAMILIES: dict[str, PipeCase | VideoCase] = {
    "LTX": BY_PIPE["ltx"],
    "Wan": BY_PIPE["wan"],
    "Flux": BY_PIPE["flux_true_cfg"],
    "CogVideoX": BY_PIPE["cogvideox"],
    "HunyuanVideo": BY_PIPE["hunyuan_true_cfg"],
    "LTX-2": BY_VIDEO["ltx2"],
}
TWO_CALLS = ("Wan", "Flux", "HunyuanVideo")
ATTENTION = r".*blocks\.\d+\.attn\d?"
THRESHOLDS = {"LTX": 0.8, "Wan": 0.3, "Flux": 0.9, "CogVideoX": 0.5, "HunyuanVideo": 1.5}
NEVER = 10**6


@dataclass(frozen=True)
class CacheCase:
    """One cache.

    Attributes:
        make: (family, pipeline, `"never"` or `"hits"`, whether for a branch without unconditional rows) -> its config.
        absent: family -> why the two cannot be together; what diffusers or skipguide says begins with `raises`.
        blocks: whether it answers for whole blocks, so that the ledger shows it.
        notes: family -> what is to be known where they are together.
    """

    make: Callable[..., object] | None
    absent: dict[str, str]
    blocks: bool = True
    notes: dict[str, str] = field(default_factory=dict)


def first_block(family, pipe, how, alone):
    return diffusers.FirstBlockCacheConfig(threshold=0.0 if how == "never" else THRESHOLDS.get(family, 0.5))


def mag(family, pipe, how, alone):
    """Ratios of 1 say that a step adds what the one before added: three in a row are answered, then one is not."""
    ratio = 1.5 if how == "never" else 1.0
    return diffusers.MagCacheConfig(
        mag_ratios=[ratio] * STEPS, num_inference_steps=STEPS, threshold=0.01, retention_ratio=0.25, max_skip_steps=1
    )


def taylor_seer(family, pipe, how, alone):
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=NEVER if how == "never" else 2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[ATTENTION],
    )


def now(pipe):
    return float(torch.as_tensor(pipe.current_timestep).flatten()[0])


def broadcast(family, pipe, how, alone):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=1 if how == "never" else 2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: now(pipe),
    )


def faster(family, pipe, how, alone):
    never = how == "never"
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, -1) if never else (-1, 800),
        unconditional_batch_skip_range=1 if never else 2,
        unconditional_batch_timestep_skip_range=(-1, 800),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BFCHW",
        is_guidance_distilled=alone or family != "CogVideoX",
        current_timestep_callback=lambda: now(pipe),
    )


def sea(family, pipe, how, alone):
    return diffusers.SeaCacheConfig(threshold=0.0 if how == "never" else 100.0, max_consecutive_cached=1)


def text_kv(family, pipe, how, alone):
    return diffusers.TextKVCacheConfig()


# Where the two cannot be together, and why. What begins with "raises" is an error of skipguide, "cannot" of diffusers.
UNREGISTERED = {"LTX-2": "cannot: diffusers has not registered its blocks"}
SILENT = "never answers: the pipeline does not say at which noise level a pass is, which diffusers logs"
DISTILLED = tuple(family for family in FAMILIES if family != "CogVideoX")
DISTILLED_WORDS = "with `is_guidance_distilled=True`: diffusers makes up unconditional rows for a batch of frames only"
CACHE_CASES = {
    "FirstBlockCache": CacheCase(first_block, UNREGISTERED),
    "MagCache": CacheCase(mag, UNREGISTERED),
    "SeaCache": CacheCase(sea, dict.fromkeys(("LTX", "Flux", "CogVideoX", "HunyuanVideo"), SILENT) | UNREGISTERED),
    "TaylorSeerCache": CacheCase(
        taylor_seer,
        {},
        blocks=False,
        notes=dict.fromkeys(
            ("LTX", "Wan", "CogVideoX"), "with `cache_identifiers`: its defaults match no module there"
        ),
    ),
    "PyramidAttentionBroadcast": CacheCase(broadcast, {}, blocks=False),
    "FasterCache": CacheCase(faster, {}, blocks=False, notes=dict.fromkeys(DISTILLED, DISTILLED_WORDS)),
    "TextKVCache": CacheCase(text_kv, dict.fromkeys(FAMILIES, "raises: none of its hooks is on a block")),
}
# put there by other libraries: their laws have files of their own
ELSEWHERE = {
    "cache-dit": CacheCase(
        None, {"LTX-2": "cannot: cache-dit 1.5.3's forward for it lacks an argument of diffusers 0.42"}
    ),
    "TeaCache": CacheCase(
        None,
        {
            "Wan": "not published for it: the scripts are for Wan's own code, and keep two states by counting calls",
            "HunyuanVideo": "not published for it: the script is for Hunyuan's own code",
            "LTX-2": "not published for it",
        },
    ),
}


def run(case, pipe):
    """A run of as many steps as the caches are set for; LTX-2's two streams as one tensor."""
    return case.run(pipe, num_inference_steps=STEPS)
