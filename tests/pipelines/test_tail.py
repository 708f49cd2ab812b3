"""The batched tail: the skipped rows in one batch with the others, against passes of their own."""

import pytest
import torch
from helpers.stg_reference import WITH_CFG, close, guided, named
from torch import nn

from skipguide import SkipError, SkipPlan, find_blocks
from skipguide.cli import arguments
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.sampling import tail
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import DenoiserPasses
from skipguide.pipelines.sampling.predictions import first
from skipguide.pipelines.sampling.shared_prefixes import share_prefixes
from zoo import FAMILIES
from zoo.pipes import BY_PIPE, PIPES

STEPS = 3


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_every_family_in_one_batch(family):
    """Two skipped passes of row 1 of 2, each the model with the block taken out; the other rows are the plain ones."""
    model, inputs = family.build(), family.inputs(2)
    plans = [SkipPlan([layer]) for layer in dict.fromkeys([max(1, family.layers[0]), family.layers[-1]])]
    stats, blocks = GuidanceStats(), len(find_blocks(model))
    passes = DenoiserPasses(model, True, stats, tail="batched")
    passes.install()
    try:
        path = passes.prepared(plans)

        def together(**call):
            return passes.plain(model, (), call, 1, step=path, rows=slice(1, 2), counted=2)

        made = family.run(together, inputs)
        found = passes.skipped(path, model, (), inputs, slice(1, 2), 2)
    finally:
        passes.remove()
    plain = family.run(model, inputs)
    slack = max(family.slack, 1e-5 * plain.abs().max().item())
    torch.testing.assert_close(made, plain, atol=slack, rtol=0)
    with torch.no_grad():
        plain = first(model(**inputs, return_dict=False))
        for plan in plans:
            taken_out = first(family.identity_block(model, plan.layers[0])(**inputs, return_dict=False))
            torch.testing.assert_close(found[plan], taken_out[1:], atol=slack, rtol=0)
            assert not torch.allclose(found[plan], plain[1:], atol=10 * slack)
    assert stats.passes == stats.batched == 1
    assert stats.blocks_run == 2 * blocks + sum(leg.blocks for leg in share_prefixes(plans, blocks))


@named(PIPES)
def test_every_pipeline_to_rounding_and_for_the_same_work(case):
    separate, alone = guided(case, Stg([1], scale=1.5))
    together, stats = guided(case, Stg([1], scale=1.5, tail="batched"))
    close(together, separate)
    assert (stats.blocks_run, stats.blocks_plain, stats.blocks_naive, stats.delivery) == (
        alone.blocks_run,
        alone.blocks_plain,
        alone.blocks_naive,
        alone.delivery,
    )
    assert alone.passes - stats.passes == stats.batched == STEPS
    assert alone.batched == 0


SOME = [BY_PIPE[name] for name in ("ltx", "wan", "latte", "hunyuan", "cogvideox")]


@named(SOME)
@pytest.mark.parametrize(
    "settings",
    [
        {"layers": [1, 2], "part": "attn"},
        {"layers": [2], "part": "attn_identity"},
        {"groups": [SkipGroup([1, 2]), SkipGroup([1, 3], scale=0.5), SkipGroup([2], part="mlp")]},
        {"layers": [1], "prefix_reuse": False},
        {"layers": [1], "every": 2},
        {"layers": [1], "rescale": 0.7},
        {"layers": [1], "start": 0.3, "stop": 0.7},
    ],
    ids=lambda s: " ".join(s),
)
def test_together_with_the_other_settings(case, settings):
    if "rescale" in settings and case not in WITH_CFG:
        settings = {**settings, "layers": [2]}
    separate, alone = guided(case, Stg(**settings))
    together, stats = guided(case, Stg(**settings, tail="batched"))
    close(together, separate)
    assert stats.blocks_run == alone.blocks_run
    assert stats.batched > 0


@named([case for case in SOME if case in WITH_CFG])
@pytest.mark.parametrize("settings", [{"formula": "wan"}, {"cfg_interval": (0.0, 0.5)}], ids=lambda s: next(iter(s)))
def test_other_rows_are_the_ones_that_skip(case, settings):
    separate, alone = guided(case, Stg([1], **settings))
    together, stats = guided(case, Stg([1], **settings, tail="batched"))
    close(together, separate)
    assert (stats.blocks_run, stats.batched) == (alone.blocks_run, STEPS)


def test_rows_have_the_result_of_the_pass_that_they_share_the_beginning_with():
    """Rows u, c, and three passes of c: without 1, without 1 and 3 (which begins like it), without 2."""
    legs = share_prefixes([SkipPlan([1]), SkipPlan([1, 3]), SkipPlan([2])], blocks=4)
    assert tail.sources(legs, slice(1, 2), 2, 4) == {
        0: (0, 1, 1, 1, 1),
        1: (0, 1, 2, 2, 1),
        2: (0, 1, 2, 2, 4),
    }
    assert tail.sources(share_prefixes([SkipPlan([0])], 4), slice(1, 2), 2, 4) == {}
    assert tail.sources(share_prefixes([SkipPlan([2])], 4, reuse=False), slice(0, 1), 1, 4) == {}


def test_auto_goes_by_the_size(monkeypatch):
    case = BY_PIPE["ltx"]
    pipe = case.build()
    monkeypatch.setitem(tail.AUTO, "cpu", 10**6)
    _, stats = guided(case, Stg([1], tail="auto"))
    assert stats.batched == STEPS
    seen = []
    monkeypatch.setattr(tail, "tokens", lambda model, hidden: seen.append(hidden.shape) or 18)
    monkeypatch.setitem(tail.AUTO, "cpu", 18 * 6)
    assert guided(case, Stg([1], tail="auto"))[1].batched == STEPS, "two prompts: [u, u, c, c, k, k]"
    monkeypatch.setitem(tail.AUTO, "cpu", 18 * 6 - 1)
    assert guided(case, Stg([1], tail="auto"))[1].batched == 0
    assert seen[0][0] == 4
    assert find_blocks(pipe.transformer)


@pytest.mark.parametrize(
    ("config", "shape", "tokens"),
    [
        ({}, (2, 77, 8), 77),
        ({"patch_size": (1, 2, 2)}, (1, 4, 3, 6, 8), 36),
        ({"patch_size": 2, "patch_size_t": 1}, (1, 4, 3, 6, 8), 36),
        ({"patch_size": 2, "patch_size_t": None}, (1, 4, 3, 6, 8), 36),
        ({"patch_size": 2}, (1, 4, 6, 8), 12),
    ],
)
def test_tokens_are_counted(config, shape, tokens):
    model = nn.Identity()
    model.config = type("Config", (), config)()
    assert tail.tokens(model, torch.zeros(shape)) == tokens


def test_bad_input():
    with pytest.raises(SkipError, match="unknown tail 'both'; expected one of separate, batched, auto"):
        Stg([1], tail="both")
    with pytest.raises(SkipError, match="formula='uncond' has no third pass"):
        Stg([1], formula="uncond", tail="batched")
    with pytest.raises(SkipError, match="ran 3 rows, and the denoiser returned 2"):
        tail.part_of(torch.zeros(2, 1), slice(0, 2), 3)
    with pytest.raises(SkipError, match="cannot take rows out of a Tensor output"):
        tail.part_of((torch.zeros(3), torch.zeros(2)), slice(0, 2), 3)


def test_nothing_is_left_after_an_exception():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    plain = case.run(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            raise KeyError("stop")
        return kwargs

    with pytest.raises(KeyError), Stg([1], tail="batched").apply(pipe):
        case.run(pipe, callback_on_step_end=stop)
    assert torch.equal(case.run(pipe), plain)
    assert "forward" not in pipe.transformer.__dict__
    assert not any("forward" in block.module.__dict__ for block in find_blocks(pipe.transformer))


def test_json_round_trip():
    stg = Stg([1], tail="batched")
    assert Stg.from_dict(stg.to_dict()) == stg


def test_the_command_line_has_the_same_choices():
    assert arguments.TAILS == tail.TAILS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@named([BY_PIPE["ltx"], BY_PIPE["wan"]])
def test_on_a_gpu(case):
    pipe = case.build().to("cuda")
    with Stg([1], prefix_reuse=True).apply(pipe):
        separate = case.run(pipe, 2)
    for how in ("batched", "auto"):
        with Stg([1], tail=how).apply(pipe) as applied:
            torch.testing.assert_close(case.run(pipe, 2), separate, atol=1e-3, rtol=1e-3)
        assert applied.stats.batched == STEPS
