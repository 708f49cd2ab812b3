"""What skip guidance costs: nothing at scale zero, what was foretold, less with the prefix used again."""

import pytest
import torch
from helpers.stg_reference import LAYER, WITH_CFG, close, guided, named

from skipguide import SkipError
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, PIPES


@named(WITH_CFG)
def test_prefix_reuse_changes_nothing_but_the_cost(case):
    out, stats = guided(case, Stg([LAYER, 2]), prompts=1)
    full, naive = guided(case, Stg([LAYER, 2], prefix_reuse=False), prompts=1)
    close(out, full)
    if case.cfg_modes[0] == "two_calls":
        assert torch.equal(out, full)
    assert naive.blocks_run - stats.blocks_run == 3 * LAYER


@named(PIPES)
def test_scale_zero_is_bit_equal_and_free(case):
    pipe = case.build()
    plain = case.run(pipe)
    with Stg([LAYER], scale=0).apply(pipe) as applied:
        assert torch.equal(case.run(pipe), plain)
    assert applied.stats.blocks_run == applied.stats.blocks_plain == applied.stats.blocks_naive


@named(PIPES)
def test_cost_is_foretold(case):
    pipe = case.build()
    for stg in (Stg([LAYER, 3]), Stg([LAYER], part="attn"), Stg([2], prefix_reuse=False)):
        cost = stg.cost(pipe, guidance=case in WITH_CFG)
        with stg.apply(pipe) as applied:
            case.run(pipe)
        assert applied.stats.blocks_run == 3 * cost.blocks_per_step
        assert applied.stats.blocks_naive == 3 * cost.blocks_naive
        assert applied.stats.to_dict()["blocks_plain"] == 3 * cost.blocks_plain


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_a_cost_is_of_some_steps(steps):
    with pytest.raises(SkipError, match="steps as a whole number of at least 1"):
        Stg([1]).cost(BY_PIPE["ltx"].build(), steps=steps)
