"""How guidance reaches the pipeline: as exactly as float32 allows, said anew by every call, and with nothing held."""

import gc
import weakref

import pytest
import torch
from helpers.stg_reference import close, expected, guided

from skipguide.guidance import rescale
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS

pytestmark = pytest.mark.numerics


def by_hand(case, pipe, w, formula, amount):
    """Both branches are the result: CFG of two equal branches is that branch."""
    plain, weak = pipe.transformer.forward, MODELS[case.family].identity_block(pipe.transformer, 1)

    def forward(*args, **kwargs):
        u, c = plain(*args, **kwargs)[0].chunk(2)
        weak_u, weak_c = weak(*args, **kwargs)[0].chunk(2)
        cfg = u + w * (c - u)
        y = cfg + (cfg - weak_u if formula == "wan" else c - weak_c)
        y = rescale(y, c, amount) if amount else y
        return (torch.cat([y, y]),)

    pipe.transformer.forward = forward


@pytest.mark.parametrize(("formula", "amount"), [("wan", 0.0), ("stg", 0.7), ("wan", 0.7)])
def test_a_scale_just_above_one_is_as_exact_as_any(formula, amount):
    """Solved for, u' is a difference over 1 - w: at w = 1.0001 that would cost four digits."""
    case, w = BY_PIPE["ltx"], 1.0001
    pipe = case.build()
    with Stg([1], formula=formula, rescale=amount).apply(pipe) as applied:
        guided = case.run(pipe, guidance_scale=w)
    assert applied.delivery == "solve"
    by_hand(case, pipe, w, formula, amount)
    expected = case.run(pipe, guidance_scale=w)
    torch.testing.assert_close(guided, expected, atol=5e-6 * expected.abs().max().item(), rtol=0)


def test_each_call_says_its_own_delivery():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        first = case.run(pipe)
        seen = [applied.delivery]
        case.run(pipe, guidance_rescale=0.7)
        seen.append(applied.delivery)
        again = case.run(pipe)
        seen.append(applied.delivery)
    assert seen == ["shift", "solve", "shift"]
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_a_handle_kept_for_its_stats_does_not_keep_the_model(name):
    case = BY_PIPE[name]
    pipe = case.build()
    model = weakref.ref(pipe.transformer)
    with Stg([1]).apply(pipe) as applied:
        case.run(pipe)
    del pipe
    gc.collect()
    assert model() is None
    assert applied.stats.passes and applied.layers == {"transformer": (1,)}


@pytest.mark.parametrize("how", [{"rescale": 0.7}, {"formula": "wan"}, {"formula": "uncond"}], ids=str)
def test_a_true_cfg_scale_is_read_from_the_running_call(how):
    """HunyuanVideo and Flux keep it in a local variable."""
    for name in ("hunyuan_true_cfg", "flux_true_cfg"):
        case = BY_PIPE[name]
        out, stats = guided(case, Stg([1], **how))
        close(out, expected(case, **how))
        assert stats.delivery == ("shift" if how == {"formula": "uncond"} else "solve")


def test_a_scale_that_a_callback_changes_is_no_dynamic_cfg():
    case = BY_PIPE["cogvideox"]
    pipe = case.build()

    def louder(pipe, step, timestep, values):
        pipe._guidance_scale = 9.0
        return {}

    with Stg([1], rescale=0.7).apply(pipe):
        guided_with = case.run(pipe, callback_on_step_end=louder)
        assert not torch.equal(guided_with, case.run(pipe))


@pytest.mark.parametrize("over", ["sample", "batch"])
def test_an_expert_without_cfg_beside_one_with_it_is_rescaled_too(over):
    """Wan 2.2 calls for both branches at guidance_scale_2=1, where the unconditional one has no weight."""
    case, w = BY_PIPE["wan22"], {"transformer": 5.0, "transformer_2": 1.0}
    pipe = case.build()
    with Stg([1], scale=2.0, rescale=0.7, rescale_over=over).apply(pipe):
        out = case.run(pipe, guidance_scale_2=1.0)
    by_calls(case, pipe, w, over)
    close(out, case.run(pipe, guidance_scale_2=1.0))


def by_calls(case, pipe, scales, over):
    """The conditional call is made by hand, with both prompts; the unconditional one has the same answer."""
    negative, answer = case.call_kwargs()["negative_prompt_embeds"], []

    def guided_by_hand(model, weak, w):
        plain = model.forward

        def forward(*args, **kwargs):
            if answer:
                return (answer.pop(),)
            c, k = plain(*args, **kwargs)[0], weak(*args, **kwargs)[0]
            u = plain(*args, **kwargs | {"encoder_hidden_states": negative})[0]
            y = rescale(u + w * (c - u) + 2.0 * (c - k), c, 0.7, over)
            answer.append(y)
            return (y,)

        return forward

    for name, w in scales.items():
        model = getattr(pipe, name)
        model.forward = guided_by_hand(model, MODELS[case.family].identity_block(model, 1), w)
