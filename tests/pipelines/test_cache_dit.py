"""cache-dit together with guidance: its laws on six families, what else it can do, and what moved in a new version."""

import copy
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.cache_cases import FAMILIES, LAYER, STEPS, TWO_CALLS, run
from helpers.cached_branches import ByHand
from helpers.stg_reference import close
from packaging.specifiers import SpecifierSet

from skipguide import SkipError
from skipguide.gate import Gate
from skipguide.hosts.cache_dit import TESTED
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg

cache_dit = pytest.importorskip("cache_dit")

ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = {"LTX": 0.8, "Wan": 0.3, "Flux": 0.97, "CogVideoX": 0.5, "HunyuanVideo": 1.5}
WAYS = {"stg": {}, "uncond": {"formula": "uncond"}, "attn_identity": {"part": "attn_identity"}}
families = pytest.mark.parametrize("family", THRESHOLDS)
ways = pytest.mark.parametrize("way", WAYS)


def config(threshold, **settings):
    given = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "max_continuous_cached_steps": 2} | settings
    return cache_dit.DBCacheConfig(residual_diff_threshold=threshold, **given)


def prune(threshold):
    return cache_dit.DBPruneConfig(residual_diff_threshold=threshold, Fn_compute_blocks=1, max_warmup_steps=2)


@contextmanager
def cached(target, cache_config, **more):
    """cache-dit changes the class of a pipeline, so it is always taken off again."""
    cache_dit.enable_cache(target, cache_config=cache_config, **more)
    try:
        yield target
    finally:
        cache_dit.disable_cache(target)


@families
@ways
def test_a_threshold_of_zero_changes_nothing(family, way):
    """Bit for bit; where a model has two lists of blocks the passes start from the beginning."""
    case, settings = FAMILIES[family], WAYS[way]
    pipe = case.build()
    with cached(pipe, config(0.0)), Stg([LAYER], **settings).apply(pipe) as applied:
        out = run(case, pipe)
    plain = case.build()
    with Stg([LAYER], prefix_reuse=family not in ("Flux", "HunyuanVideo"), **settings).apply(plain) as without:
        assert torch.equal(run(case, plain), out)
    assert applied.stats.blocks_cached == 0
    assert applied.stats.blocks_run == without.stats.blocks_run


def by_hand(family, way, make, **more):
    case = FAMILIES[family]
    reference = case.build()

    def enable(model, alone):
        made = make()
        made.enable_separate_cfg = False  # a branch of its own has one call per step
        cache_dit.enable_cache(model, cache_config=made, **copy.deepcopy(more))

    part = WAYS[way].get("part", "block")
    ByHand(reference, case, part, enable, WAYS[way].get("formula", "stg"))
    return run(case, reference)


def agree(family, way, make, more=(), **settings):
    """Guided runs with cache-dit, twice, against plain models with a cache each."""
    case, more = FAMILIES[family], dict(more)
    expected = by_hand(family, way, make, **more)
    pipe = case.build()
    with cached(pipe, make(), **copy.deepcopy(more)), Stg([LAYER], **WAYS[way], **settings).apply(pipe) as applied:
        for _ in range(2):
            close(run(case, pipe), expected)
    assert applied.stats.blocks_cached > 0
    assert not hasattr(pipe, "_context_manager")
    return applied.stats


@families
@ways
def test_every_branch_has_contexts_of_its_own(family, way):
    if way == "uncond" and family not in TWO_CALLS:
        pytest.skip("rows of one batch skip and others do not")
    agree(family, way, lambda: config(THRESHOLDS[family]))


@pytest.mark.parametrize("family", ["LTX", "Wan"])
@pytest.mark.parametrize(("first", "last"), [(2, 0), (3, 0), (1, 1), (1, 2)])
def test_first_and_last_blocks_that_always_run(family, first, last):
    """The layer that is skipped lies behind the first ones, among them, and among the last ones."""
    agree(family, "stg", lambda: config(0.99, Fn_compute_blocks=first, Bn_compute_blocks=last))


def test_the_calibrator_and_a_mask_of_steps():
    more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)}
    agree("LTX", "stg", lambda: config(THRESHOLDS["LTX"]), more)
    mask = {"steps_computation_mask": [1, 1, 0, 1, 0, 0, 1, 0], "steps_computation_policy": "static"}
    stats = agree("Wan", "stg", lambda: config(0.1, **mask))
    blocks, answered, computed = 4, 4, 4
    # the first block runs in every plain pass; the skipped one has its result, and none at a step that is answered
    assert stats.blocks_run == 2 * (2 * answered + computed * (2 * blocks + blocks - 1 - LAYER))


def test_dbprune():
    """It decides block by block, so that its passes start from the beginning."""
    agree("LTX", "stg", lambda: prune(0.8))
    agree("Wan", "stg", lambda: prune(0.5))


def test_ltx2_is_not_offered():
    """The forward that cache-dit 1.5.3 has for LTX-2 lacks an argument of diffusers 0.42: it fails by itself."""
    pipe = FAMILIES["LTX-2"].build()
    with cached(pipe, config(0.5)), Stg([LAYER]).apply(pipe), pytest.raises(TypeError, match="sigma"):
        run(FAMILIES["LTX-2"], pipe)


def test_the_summary_is_that_of_the_pipeline():
    """A skipped pass is no step of it."""
    case, pipe = FAMILIES["Wan"], FAMILIES["Wan"].build()
    with cached(pipe, config(0.0)):
        run(case, pipe)
        alone = steps_of(cache_dit.summary(pipe))
        with Stg([LAYER], scale=1e-9).apply(pipe):
            run(case, pipe)
            assert steps_of(cache_dit.summary(pipe)) == alone


def steps_of(summary):
    return [(each.cached_steps, list(each.residual_diffs), list(each.cfg_residual_diffs)) for each in summary]


def test_only_the_model_is_cached_without_its_pipeline():
    """`enable_cache(pipe.transformer)`: its contexts outlive the run, and guidance begins them anew with the next."""
    case = FAMILIES["LTX"]
    expected = by_hand("LTX", "stg", lambda: config(THRESHOLDS["LTX"]))
    pipe = case.build()
    with cached(pipe.transformer, config(THRESHOLDS["LTX"])), Stg([LAYER]).apply(pipe):
        for _ in range(2):
            close(run(case, pipe), expected)


@pytest.mark.parametrize("family", [name for name in THRESHOLDS if name != "Flux"])
def test_one_that_comes_after_the_guidance(family):
    """The guidance moves in front of it, and nothing of either is left."""
    case = FAMILIES[family]
    expected = by_hand(family, "stg", lambda: config(THRESHOLDS[family]))
    pipe = case.build()
    plain = run(case, pipe)
    with Stg([LAYER]).apply(pipe) as applied:
        guided = run(case, pipe)
        with cached(pipe, config(THRESHOLDS[family])):
            close(run(case, pipe), expected)
            close(run(case, pipe), expected)
            assert applied.stats.blocks_cached > 0
            applied.remove()
            assert "forward" in vars(pipe.transformer)  # that of cache-dit, which calls the model's own
            alone = run(case, pipe)
        # cache-dit leaves the forward that it had wrapped
        assert vars(pipe.transformer)["forward"] == type(pipe.transformer).forward.__get__(pipe.transformer)
    assert torch.equal(run(case, pipe), plain)
    with cached(pipe, config(THRESHOLDS[family])):
        assert torch.equal(run(case, pipe), alone)
    with Stg([LAYER]).apply(pipe):
        assert torch.equal(run(case, pipe), guided)


def test_one_that_comes_after_the_guidance_with_forwards_of_its_own():
    """For Flux it replaces the forwards of the model and its blocks, and with them what stood there."""
    case = FAMILIES["Flux"]
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        run(case, pipe)
        with cached(pipe, config(0.0)), pytest.raises(SkipError, match=r"was replaced: cache_dit.*after hooks, caches"):
            run(case, pipe)
    assert not any(isinstance(vars(module).get("forward"), Gate) for module in pipe.transformer.modules())


def test_a_mask_of_steps_needs_a_skipped_pass_at_each():
    case, pipe = FAMILIES["Wan"], FAMILIES["Wan"].build()
    mask = {"steps_computation_mask": [1, 1] + [0] * (STEPS - 2)}
    with cached(pipe, config(0.3, **mask)):
        with pytest.raises(SkipError, match="steps_computation_mask counts passes as steps"):
            Stg([LAYER], every=2).apply(pipe)
        with Stg([LAYER]).apply(pipe):
            run(case, pipe)


def test_the_range_that_was_tested():
    """The canary: what the records go by, and the range of the extra. A version out of it says here what moved."""
    pipe = FAMILIES["Wan"].build()
    with cached(pipe, config(0.1)):
        model, manager = pipe.transformer, pipe.transformer._context_manager
        marks = {"_is_cached", "_context_manager", "_context_names", "_context_kwargs", "_original_forward"}
        assert marks <= set(vars(model))
        assert {"_cached_context_manager", "_current_context", "_persistent_context"} <= set(vars(manager))
        assert model._context_kwargs["cache_config"].Fn_compute_blocks == 1
        name = model._context_names[0]
        made = manager.reset_context(name, **model._context_kwargs)
        assert manager._cached_context_manager[name] is made
        assert set(made._init_kwargs) >= {"cache_config", "name"}
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extra["caches"] == [f"cache-dit>={TESTED[0]},<{TESTED[1]}"]
    assert cache_dit.__version__ in SpecifierSet(f">={TESTED[0]},<{TESTED[1]}")
