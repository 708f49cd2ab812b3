"""Skip guidance on a denoiser with one of diffusers' caches, against plain code with two cached models side by side.

The reference calls the pipeline's cached denoiser, then a deep copy with the block taken out and the same cache of its
own, in a context of its own. It knows nothing of gates, prefixes or contexts that have to be kept apart.
"""

import copy

import diffusers
import pytest
import torch
from diffusers.hooks import apply_first_block_cache
from helpers.stg_reference import close

from skipguide import SkipError, find_blocks
from skipguide.hosts.diffusers_caches import CACHES, cache_on
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

STEPS, LAYER = 8, 2
CALL = {"num_inference_steps": STEPS}
THRESHOLDS = {"ltx": 0.8, "wan": 0.3, "flux": 0.9}  # random weights: some steps are answered, and some are not
CONFIGS = {
    "FirstBlockCache": lambda case: diffusers.FirstBlockCacheConfig(threshold=THRESHOLDS[case.name]),
    "MagCache": lambda case: diffusers.MagCacheConfig(
        mag_ratios=[1.0, *[0.97] * (STEPS - 1)], threshold=0.2, num_inference_steps=STEPS, max_skip_steps=2
    ),
    "TaylorSeerCache": lambda case: diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*blocks\.\d+\.attn\d?"],
    ),
}
CASES = [BY_PIPE[name] for name in ("ltx", "wan", "flux")]
cases = pytest.mark.parametrize("case", CASES, ids=repr)
caches = pytest.mark.parametrize("cache", CONFIGS)


class Reference:
    """The formula by hand at a denoiser: the shift that any CFG lets through."""

    def __init__(self, pipe, case, cache, scale=1.0):
        self.model, self.scale, self.mode = pipe.transformer, scale, case.cfg_modes[0]
        self.weak = copy.deepcopy(self.model)
        block = find_blocks(self.weak)[LAYER].module
        block.forward = self.pass_by if case.name != "flux" else self.pass_both_by
        for model in (self.model, self.weak):
            model.enable_cache(CONFIGS[cache](case))
        self.forward, self.calls, self.delta = self.model.forward, 0, None
        self.model.forward = self

    @staticmethod
    def pass_by(hidden_states, *args, **kwargs):
        return hidden_states

    @staticmethod
    def pass_both_by(hidden_states, encoder_hidden_states, **kwargs):
        return encoder_hidden_states, hidden_states

    def __call__(self, *args, **kwargs):
        out = self.forward(*args, **kwargs)
        self.calls += 1
        if self.mode == "two_calls" and self.calls % 2 == 0:
            return (out[0] + self.delta, *out[1:])
        c, given = out[0], kwargs
        if self.mode == "batched":
            half = len(c) // 2
            c = c[half:]
            given = {
                k: v[half:] if isinstance(v, torch.Tensor) and len(v) == 2 * half else v for k, v in kwargs.items()
            }
        with self.weak.cache_context("skip"):
            self.delta = self.scale * (c - self.weak(**given)[0])
        shift = torch.cat([self.delta] * 2) if self.mode == "batched" else self.delta
        return (out[0] + shift, *out[1:])


@cases
@caches
@pytest.mark.parametrize("first", ["cache", "guidance"])
def test_cached_plain_passes_and_a_skipped_pass_with_a_cache_of_its_own(case, cache, first):
    reference = case.build()
    Reference(reference, case, cache)
    expected = case.run(reference, **CALL)
    pipe = case.build()
    without = case.run(pipe, **CALL)
    if first == "cache":
        pipe.transformer.enable_cache(CONFIGS[cache](case))
        cached = case.run(pipe, **CALL)
        assert not torch.allclose(cached, without, atol=1e-4), "the cache never answered"
    with Stg([LAYER]).apply(pipe) as applied:
        if first == "guidance":
            pipe.transformer.enable_cache(CONFIGS[cache](case))
        for _ in range(2):  # the caches begin anew with every run
            close(case.run(pipe, **CALL), expected)
    if first == "cache":
        assert torch.equal(case.run(pipe, **CALL), cached), "the skipped passes have left something in the cache"
    pipe.transformer.disable_cache()
    assert torch.equal(case.run(pipe, **CALL), without)
    blocks, branches = len(find_blocks(pipe.transformer)), 1 if case.name == "flux" else 2
    stats = applied.stats
    assert stats.passes == 2 * STEPS * (2 if case.cfg_modes[0] != "two_calls" else 3)
    if cache == "TaylorSeerCache":  # answers for attention only: every block runs, and the prefix is shared
        assert stats.blocks_run == 2 * STEPS * (branches * blocks + blocks - 1 - LAYER)
    else:
        assert 2 * STEPS <= stats.blocks_run < 2 * STEPS * ((branches + 1) * blocks - 1) - blocks


@caches
def test_sublayers_and_several_passes(cache):
    """Every skipped pass has a context of its own; the first of two is what it is alone."""
    case = BY_PIPE["wan"]
    pipe = case.build()
    pipe.transformer.enable_cache(CONFIGS[cache](case))
    alone = []
    for layer, part in ((1, "attn"), (2, "mlp"), (3, "attn_identity")):
        with Stg([layer], part=part).apply(pipe):
            alone.append(case.run(pipe, **CALL))
        with Stg([layer], part=part, prefix_reuse=False).apply(pipe):
            close(case.run(pipe, **CALL), alone[-1])
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
    groups = [SkipGroup([1], part="attn"), SkipGroup([2], part="mlp", scale=1e-9)]
    with Stg(groups=groups).apply(pipe):
        close(case.run(pipe, **CALL), alone[0])


def test_a_cache_that_answers_for_blocks_by_name():
    """TaylorSeer's lite mode replaces every block: nothing can be captured, so the skipped pass runs whole."""
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, use_lite_mode=True
    )
    case = BY_PIPE["wan"]
    pipe = case.build()
    pipe.transformer.enable_cache(config)
    with Stg([LAYER]).apply(pipe) as applied:
        out = case.run(pipe, **CALL)
    assert applied.stats.blocks_run < applied.stats.blocks_plain
    with Stg([LAYER], prefix_reuse=False).apply(pipe):
        close(case.run(pipe, **CALL), out)


@pytest.mark.parametrize("cache", ["FirstBlockCache", "TaylorSeerCache"])
def test_window_and_every(cache):
    """Steps without a skipped pass are the cached pipeline's own."""
    case = BY_PIPE["wan"]
    pipe = case.build()
    pipe.transformer.enable_cache(CONFIGS[cache](case))
    with Stg([LAYER], every=2, stop=0.5).apply(pipe) as applied:
        out = case.run(pipe, **CALL)
    assert torch.isfinite(out).all()
    assert applied.stats.passes == 2 * STEPS + 2


def test_caches_and_compiled_blocks():
    """A gate stands behind the cache's hook inside the compiled block."""
    torch._dynamo.reset()
    case = BY_PIPE["wan"]
    reference = case.build()
    Reference(reference, case, "MagCache")
    expected = case.run(reference, **CALL)
    pipe = case.build()
    pipe.transformer.enable_cache(CONFIGS["MagCache"](case))
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with Stg([LAYER]).apply(pipe):
        close(case.run(pipe, **CALL), expected)
    torch._dynamo.reset()


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "settings", "words"),
    [
        ("FirstBlockCache", {"layers": [0, 2]}, "block 0 is to be skipped"),
        ("MagCache", {"layers": [2], "every": 2}, "counts passes as steps"),
        ("MagCache", {"layers": [2], "stop": 0.5}, "counts passes as steps"),
        ("MagCache", {"layers": "stochastic", "drop": 0.3}, "counts passes as steps"),
        ("TaylorSeerCache", {"layers": [2], "cfg_interval": (0.0, 0.5)}, "leaves passes of the pipeline out"),
        ("TaylorSeerCache", {"layers": [2], "formula": "uncond", "start": 0.5}, "mix skipped and plain"),
        ("FirstBlockCache", {"layers": [2], "tail": "batched"}, "changes the batch"),
    ],
)
def test_settings_that_a_cache_cannot_follow(cache, settings, words):
    case = BY_PIPE["wan"]
    pipe = case.build()
    pipe.transformer.enable_cache(CONFIGS[cache](case))
    with pytest.raises(SkipError, match=f"{cache} enabled.*{words}"):
        Stg(**settings).apply(pipe)
    pipe.transformer.disable_cache()
    Stg(**settings).apply(pipe).remove()


def test_a_cache_that_was_put_there_without_enable_cache_is_seen():
    pipe = BY_PIPE["wan"].build()
    assert cache_on(pipe.transformer) is None
    apply_first_block_cache(pipe.transformer, diffusers.FirstBlockCacheConfig())
    assert cache_on(pipe.transformer) == "FirstBlockCache"
    with pytest.raises(SkipError, match="FirstBlockCache"):
        Stg([0]).apply(pipe)


def test_every_cache_of_diffusers_is_listed():
    """A new one in diffusers is neither together nor refused until somebody has looked at it."""
    listed = {cache for cache in dir(diffusers.hooks) if cache.endswith("CacheConfig")} | {
        "PyramidAttentionBroadcastConfig"
    }
    assert {name.removesuffix("Config") for name in listed} == set(CACHES)
