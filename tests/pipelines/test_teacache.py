"""TeaCache as published: a state per branch on the models it is published for, and the variants that are refused."""

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
CASES = {"LTX": LTX, "Flux": BY_PIPE["flux_true_cfg"], "CogVideoX": BY_PIPE["cogvideox"]}
HITS = {case.family: 0.5 for case in CASES.values()}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def put_on(monkeypatch, case, threshold):
    publish(monkeypatch, threshold, STEPS, type(case.build().transformer))


@cases
def test_the_forward_of_the_tests_is_the_models_where_it_never_answers(monkeypatch, case):
    expected = run(case, case.build())
    put_on(monkeypatch, case, 0.0)
    assert torch.equal(run(case, case.build()), expected)


@cases
@pytest.mark.parametrize("settings", [{}, {"part": "attn_identity"}, {"formula": "uncond"}], ids=str)
def test_a_threshold_of_zero_changes_nothing(monkeypatch, case, settings):
    pipe = case.build()
    with Stg([LAYER], **settings).apply(pipe) as without:
        expected = run(case, pipe)
    put_on(monkeypatch, case, 0.0)
    with Stg([LAYER], **settings).apply(pipe) as applied:
        assert torch.equal(run(case, pipe), expected)
    assert (applied.stats.blocks_run, applied.stats.blocks_cached) == (without.stats.blocks_run, 0)


@cases
@pytest.mark.parametrize("part", ["block", "attn_identity"])
def test_every_branch_has_a_state_of_its_own(monkeypatch, case, part):
    """Against plain models, one a branch, which keep their states apart because they are several."""
    put_on(monkeypatch, case, HITS[case.family])
    reference, pipe = case.build(), case.build()
    alone = run(case, pipe)
    ByHand(reference, case, part, lambda model, alone: None)
    expected = run(case, reference)
    with Stg([LAYER], part=part).apply(pipe) as applied:
        for _ in range(2):
            close(run(case, pipe), expected)
    assert applied.stats.blocks_cached > 0
    assert applied.stats.blocks_run > 0
    assert not set(STATE) & set(pipe.transformer.__dict__)
    assert torch.equal(run(case, pipe), alone)


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
    publish(monkeypatch, HITS["ltx"], STEPS)
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
    publish(monkeypatch, HITS["ltx"], STEPS)
    with pytest.raises(SkipError, match=r"TeaCache enabled.*counts passes as steps"):
        Stg(**({"layers": [LAYER]} | how)).apply(LTX.build())


def test_variants_with_another_state_are_refused_by_name(monkeypatch):
    """That of Wan 2.1 tells its branches apart by counting calls, that of Lumina 2 by the text's length."""
    publish(monkeypatch, HITS["ltx"], STEPS, previous_residual_even=None, previous_residual_odd=None)
    with pytest.raises(SkipError, match=r"TeaCache enabled.*every second call"):
        Stg([LAYER]).apply(LTX.build())
    monkeypatch.undo()
    publish(monkeypatch, HITS["ltx"], STEPS, cache={})
    for name in ("previous_residual", "previous_modulated_input"):
        monkeypatch.delattr(type(LTX.build().transformer), name)
    with pytest.raises(SkipError, match=r"TeaCache enabled.*nobody has described"):
        Stg([LAYER]).apply(LTX.build())


def test_one_that_comes_after_the_guidance_is_refused(monkeypatch):
    """The class has another forward then, and guidance calls the one before: the cache would silently be off."""
    pipe = LTX.build()
    with Stg([LAYER]).apply(pipe):
        run(LTX, pipe)
        publish(monkeypatch, HITS["ltx"], STEPS)
        with pytest.raises(SkipError, match=r"TeaCache enabled.*apply again"):
            run(LTX, pipe)


def test_it_is_seen_only_where_it_is_switched_on(monkeypatch):
    model = LTX.build().transformer
    assert cache_on(model) is None
    publish(monkeypatch, HITS["ltx"], STEPS)
    assert cache_on(model) == "TeaCache"
    monkeypatch.setattr(type(model), "enable_teacache", False)
    assert cache_on(model) is None
    assert set(STATE) <= set(vars(type(model)))
