"""TeaCache as published, on LTX-Video: a state per branch, and the variants that are refused by name."""

import pytest
import torch
from helpers.cache_cases import LAYER, STEPS, run
from helpers.cached_branches import ByHand
from helpers.published_teacache import STATE, publish
from helpers.stg_reference import close

from skipguide import SkipError, find_blocks
from skipguide.hosts.diffusers_caches import cache_on
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE

LTX = BY_PIPE["ltx"]
HITS = 0.5


def test_the_forward_of_the_tests_is_the_models_where_it_never_answers(monkeypatch):
    expected = run(LTX, LTX.build())
    publish(monkeypatch, 0.0, STEPS)
    assert torch.equal(run(LTX, LTX.build()), expected)


@pytest.mark.parametrize("settings", [{}, {"part": "attn_identity"}, {"formula": "uncond"}], ids=str)
def test_a_threshold_of_zero_changes_nothing(monkeypatch, settings):
    pipe = LTX.build()
    with Stg([LAYER], **settings).apply(pipe) as without:
        expected = run(LTX, pipe)
    publish(monkeypatch, 0.0, STEPS)
    with Stg([LAYER], **settings).apply(pipe) as applied:
        assert torch.equal(run(LTX, pipe), expected)
    assert (applied.stats.blocks_run, applied.stats.blocks_cached) == (without.stats.blocks_run, 0)


@pytest.mark.parametrize("part", ["block", "attn_identity"])
def test_every_branch_has_a_state_of_its_own(monkeypatch, part):
    """Against two plain models, which keep their states apart because they are two."""
    publish(monkeypatch, HITS, STEPS)
    reference, pipe = LTX.build(), LTX.build()
    alone = run(LTX, pipe)
    ByHand(reference, LTX, part, lambda model, alone: None)
    expected = run(LTX, reference)
    with Stg([LAYER], part=part).apply(pipe) as applied:
        for _ in range(2):
            close(run(LTX, pipe), expected)
    assert applied.stats.blocks_cached > 0
    assert applied.stats.blocks_run > 0
    assert not set(STATE) & set(pipe.transformer.__dict__)
    assert torch.equal(run(LTX, pipe), alone)


def test_a_pass_that_is_answered_costs_nothing(monkeypatch):
    """Everything between the first step and the last is answered."""
    publish(monkeypatch, 1e9, STEPS)
    pipe = LTX.build()
    blocks = len(find_blocks(pipe.transformer))
    with Stg([LAYER]).apply(pipe) as applied:
        run(LTX, pipe)
    stats = applied.stats
    assert stats.blocks_run == 2 * (2 * blocks + blocks - 1 - LAYER)
    assert stats.blocks_cached == (STEPS - 2) * (2 * blocks + blocks - 1)


def test_a_run_that_failed_leaves_nothing(monkeypatch):
    publish(monkeypatch, HITS, STEPS)
    pipe = LTX.build()
    alone = run(LTX, pipe)

    def fail(*_):
        raise ZeroDivisionError

    with Stg([LAYER]).apply(pipe):
        expected = run(LTX, pipe)
        with pytest.raises(ZeroDivisionError):
            LTX.run(pipe, num_inference_steps=STEPS, callback_on_step_end=fail)
        assert torch.equal(run(LTX, pipe), expected)
        with pytest.raises(ZeroDivisionError):
            LTX.run(pipe, num_inference_steps=STEPS, callback_on_step_end=fail)
    assert torch.equal(run(LTX, pipe), alone)


@pytest.mark.parametrize("how", [{"every": 2}, {"stop": 0.5}, {"layers": "stochastic", "drop": 0.3}], ids=str)
def test_it_counts_passes_as_steps(monkeypatch, how):
    publish(monkeypatch, HITS, STEPS)
    with pytest.raises(SkipError, match=r"TeaCache enabled.*counts passes as steps"):
        Stg(**({"layers": [LAYER]} | how)).apply(LTX.build())


def test_variants_with_another_state_are_refused_by_name(monkeypatch):
    """That of Wan 2.1 tells its branches apart by counting calls, that of Lumina 2 by the text's length."""
    publish(monkeypatch, HITS, STEPS, previous_residual_even=None, previous_residual_odd=None)
    with pytest.raises(SkipError, match=r"TeaCache enabled.*every second call"):
        Stg([LAYER]).apply(LTX.build())
    monkeypatch.undo()
    publish(monkeypatch, HITS, STEPS, cache={})
    for name in ("previous_residual", "previous_modulated_input"):
        monkeypatch.delattr(type(LTX.build().transformer), name)
    with pytest.raises(SkipError, match=r"TeaCache enabled.*nobody has described"):
        Stg([LAYER]).apply(LTX.build())


def test_one_that_comes_after_the_guidance_is_refused(monkeypatch):
    """The class has another forward then, and guidance calls the one before: the cache would silently be off."""
    pipe = LTX.build()
    with Stg([LAYER]).apply(pipe):
        run(LTX, pipe)
        publish(monkeypatch, HITS, STEPS)
        with pytest.raises(SkipError, match=r"TeaCache enabled.*apply again"):
            run(LTX, pipe)


def test_it_is_seen_only_where_it_is_switched_on(monkeypatch):
    model = LTX.build().transformer
    assert cache_on(model) is None
    publish(monkeypatch, HITS, STEPS)
    assert cache_on(model) == "TeaCache"
    monkeypatch.setattr(type(model), "enable_teacache", False)
    assert cache_on(model) is None
    assert set(STATE) <= set(vars(type(model)))
