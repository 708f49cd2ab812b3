"""`SkipGuider` with a cache on the denoiser: every pass that the guider asks for is a branch with a state of its own.

It gives what `SpatiotemporalSkipGuidance` gives on the classic pipeline with the same cache, whose laws are in
test_cache_laws.py. Wan's modular pipeline opens no cache context by itself.
"""

import diffusers
import pytest
import torch
from helpers.cache_cases import CACHE_CASES, FAMILIES, LAYER, STEPS
from helpers.residue import no_gates
from helpers.stg_reference import close

from skipguide import SkipError
from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular

WAN = FAMILIES["Wan"]
CLOCK = type("Pipe", (), {"current_timestep": 500.0})
WORKING = ("FirstBlockCache", "MagCache", "TaylorSeerCache", "PyramidAttentionBroadcast", "FasterCache")


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(modular, "STEPS", STEPS)
    return modular.build("wan")


def config(cache, how, pipe=CLOCK):
    return CACHE_CASES[cache].make("Wan", pipe, how, True)


def by_apply(cache, **settings):
    """The same guidance on the classic pipeline."""
    classic = WAN.build()
    classic.transformer.enable_cache(config(cache, "hits"))
    with Stg([LAYER], **settings).apply(classic) as applied:
        out = WAN.run(classic, num_inference_steps=STEPS, latents=modular.latents(1))
    return out, applied.stats


@pytest.mark.parametrize("cache", WORKING)
def test_what_guidance_on_the_classic_pipeline_gives(pipe, cache):
    expected, stats = by_apply(cache)
    pipe.transformer.enable_cache(config(cache, "hits"))
    guider = SkipGuider([LAYER], scale=1.0, guidance_scale=5.0).attach(pipe)
    for _ in range(2):
        close(modular.run(pipe), expected)
    no_gates(pipe.transformer)
    found = guider.stats
    assert (found.blocks_run, found.blocks_cached) == (2 * stats.blocks_run, 2 * stats.blocks_cached)
    assert found.blocks_skipped == 2 * stats.blocks_skipped


@pytest.mark.parametrize("cache", WORKING)
def test_a_cache_that_never_answers_changes_nothing(pipe, cache):
    guider = SkipGuider([LAYER], scale=1.0, guidance_scale=5.0).attach(pipe)
    expected = modular.run(pipe)
    ran = guider.stats.blocks_run
    pipe.transformer.enable_cache(config(cache, "never"))
    assert torch.equal(modular.run(pipe), expected)
    assert (guider.stats.blocks_run, guider.stats.blocks_cached) == (2 * ran, 0)


def test_some_steps_only(pipe):
    """FirstBlockCache's states of the other branches go on where no pass is skipped."""
    settings = {"stop": 0.5, "every": 2}
    expected, _ = by_apply("FirstBlockCache", **settings)
    pipe.transformer.enable_cache(config("FirstBlockCache", "hits"))
    SkipGuider([LAYER], scale=1.0, guidance_scale=5.0, **settings).attach(pipe)
    close(modular.run(pipe), expected)


def test_what_does_not_go_together(pipe):
    SkipGuider([LAYER], scale=1.0, guidance_scale=5.0).attach(pipe)
    refused = {
        "hooks": (diffusers.TextKVCacheConfig(), "none of its hooks"),
        "half": (CACHE_CASES["FasterCache"].make("CogVideoX", CLOCK, "hits", False), "set is_guidance_distilled"),
    }
    for made, words in refused.values():
        pipe.transformer.enable_cache(made)
        with pytest.raises(SkipError, match=words):
            modular.run(pipe)
        no_gates(pipe.transformer)
        pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(config("MagCache", "hits"))
    SkipGuider([LAYER], scale=1.0, guidance_scale=5.0, every=2).attach(pipe)
    with pytest.raises(SkipError, match="counts passes as steps"):
        modular.run(pipe)


def test_cache_dit(pipe):
    """On the transformer alone, as there is no classic pipeline; it said "nothing was captured" once."""
    cache_dit = pytest.importorskip("cache_dit")

    def made():
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, residual_diff_threshold=0.3, max_warmup_steps=2, enable_separate_cfg=True
        )

    classic = WAN.build()
    cache_dit.enable_cache(classic.transformer, cache_config=made())
    with Stg([LAYER]).apply(classic) as applied:
        expected = WAN.run(classic, num_inference_steps=STEPS, latents=modular.latents(1))
    cache_dit.enable_cache(pipe.transformer, cache_config=made())
    guider = SkipGuider([LAYER], scale=1.0, guidance_scale=5.0).attach(pipe)
    for _ in range(2):
        close(modular.run(pipe), expected)
    assert guider.stats.blocks_cached == 2 * applied.stats.blocks_cached > 0
    cache_dit.disable_cache(pipe.transformer)
    no_gates(pipe.transformer)
