"""Skip guidance where text and pictures share a sequence, and what a denoiser keeps of its first step."""

import diffusers
import pytest
import torch
from helpers.image_reference import reference
from helpers.residue import no_gates
from helpers.stg_reference import LAYER, close

from skipguide import SkipError, find_blocks
from skipguide.pipelines import Guide
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes_packed import PACKED_PIPES

pytestmark = pytest.mark.numerics
BY_NAME = {case.name: case for case in PACKED_PIPES}
# Lumina's scale is not that of all channels, so both branches are moved
W = {"lumina_next": None, "fibo2": 5.0, "qwen21": 4.0, "nucleus": 4.0}
RENORM = {"nucleus"}  # brings the result to the norm of c, so that only `solve` is exact
CACHED = ("qwen21", "klein_kv")


def by_hand(case, cfg=True, prompts=1, **how):
    """Without Qwen-Image 2.1's cache; Flux 2 Klein's cannot be turned off: there each model has its own."""
    pipe = case.build()
    guide = reference(pipe, case, W.get(case.name), cfg and case.name in W, **how)
    if case.name == "ideogram4":  # the other model's prediction has the rest
        weights, plain_delta = [7.0, 5.0, 3.0], guide.delta
        guide.delta = lambda plain, weak: plain_delta(plain, weak) / weights[guide.steps - 1]
    if case.name == "klein_kv":
        weak, own = guide.weak, {}

        def with_own_cache(*args, **kwargs):
            out = weak(*args, **kwargs | (own if kwargs["kv_cache_mode"] == "cached" else {}))
            if kwargs["kv_cache_mode"] == "extract":
                own["kv_cache"] = out[1]
            return out

        guide.weak = with_own_cache
    return case.run(pipe, prompts, cfg, **({"use_kv_cache": False} if case.name == "qwen21" else {}))


@pytest.mark.parametrize("case", PACKED_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    pipe = case.build()
    plain, cfg = case.run(pipe, 2), case.name in W
    with Stg([LAYER], scale=1.5).apply(pipe) as applied:
        out = case.run(pipe, 2)
        assert torch.equal(case.run(pipe, 2), out), "something is kept from one run to the next"
    assert torch.equal(case.run(pipe, 2), plain)
    no_gates(pipe.transformer)
    close(out, by_hand(case, prompts=2, s=1.5))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    n, branches = len(find_blocks(pipe.transformer)), 2 if cfg else 1
    assert applied.stats.delivery == ("solve" if case.name in RENORM else "shift")
    assert applied.stats.blocks_run == 2 * 3 * (branches * n + n - 1 - LAYER)
    with Stg([LAYER], scale=0).apply(pipe):
        assert torch.equal(case.run(pipe, 2), plain)


@pytest.mark.parametrize("case", [case for case in PACKED_PIPES if case.name in W], ids=repr)
def test_without_cfg(case):
    pipe = case.build()
    with Stg([LAYER]).apply(pipe) as applied:
        out = case.run(pipe, 1, False)
    close(out, by_hand(case, False))
    assert applied.stats.passes == 6


@pytest.mark.parametrize("name", ["fibo2", "qwen21"])
def test_rescale(name):
    pipe = BY_NAME[name].build()
    with Stg([LAYER], rescale=0.7).apply(pipe):
        out = BY_NAME[name].run(pipe)
    if name == "fibo2":
        close(out, by_hand(BY_NAME[name], rescale=0.7))
    assert torch.isfinite(out).all()


def test_what_needs_the_scale_is_refused_where_it_is_not_that_of_all_channels():
    """Lumina's CFG leaves one of its four channels as it is in the conditional prediction."""
    case = BY_NAME["lumina_next"]
    with pytest.raises(SkipError, match="scale"), Stg([LAYER], rescale=0.7).apply(pipe := case.build()):
        case.run(pipe)


def test_what_looks_at_a_result_that_two_models_make_is_refused():
    case = BY_NAME["ideogram4"]
    with pytest.raises(SkipError, match="two models"), Stg([LAYER], rescale=0.7).apply(pipe := case.build()):
        case.run(pipe)
    with pytest.raises(SkipError, match="weight 0 at step 1"), Stg([LAYER]).apply(pipe):
        case.run(pipe, guidance_schedule=[7.0, 0.0, 3.0])
    with pytest.raises(SkipError, match="second model"):
        Guide(diffusers.ClassifierFreeGuidance()).apply(pipe)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(
    "how",
    [
        {"layers": [0, LAYER]},
        {"layers": [LAYER], "prefix_reuse": False},
        {"layers": [LAYER], "part": "attn"},
        {"layers": [LAYER], "every": 2},
        {"layers": [LAYER], "stop": 0.5},
    ],
    ids=str,
)
def test_each_pass_has_a_cache_of_its_own(name, how):
    """However the passes are run, it is as if nothing were kept."""
    case = BY_NAME[name]
    if name == "klein_kv" and how.get("every"):
        pytest.skip("its cache cannot be turned off, to compare with")
    pipe = case.build()
    with Stg(**how).apply(pipe):
        out = case.run(pipe)
    other = case.build()
    if name == "qwen21" and not how.get("every"):
        with Stg(**{**how, "prefix_reuse": False}).apply(other):
            close(out, case.run(other, use_kv_cache=False))
    else:
        with Stg(**{**how, "prefix_reuse": False}).apply(other):
            close(out, case.run(other))


@pytest.mark.parametrize(
    "how", [{"start": 0.5}, {"formula": "uncond", "start": 0.5}, {"cfg_interval": (0.5, 1.0)}], ids=str
)
def test_a_pass_that_did_not_run_in_the_first_step_is_refused(how):
    case = BY_NAME["qwen21"]
    with pytest.raises(SkipError, match=r"use_kv_cache=False"), Stg([LAYER], **how).apply(pipe := case.build()):
        case.run(pipe)
    with Stg([LAYER], **how).apply(pipe):
        assert torch.isfinite(case.run(pipe, use_kv_cache=False)).all()


def test_skipping_inside_the_unconditional_pass_has_its_cache():
    case = BY_NAME["qwen21"]
    outs = []
    for cache in (True, False):
        with Stg([LAYER], formula="uncond").apply(pipe := case.build()):
            outs.append(case.run(pipe, use_kv_cache=cache))
    close(*outs)


def test_rows_in_one_batch_and_a_cache_of_each_are_refused():
    case = BY_NAME["qwen21"]
    with pytest.raises(SkipError, match="tail"), Stg([LAYER], tail="batched").apply(pipe := case.build()):
        case.run(pipe)
    with Stg([LAYER], tail="auto").apply(pipe):
        case.run(pipe)
