"""Skip guidance that cannot be: refused when applied or during the run, never a silent nothing."""

import pytest
import torch
from helpers.stg_reference import named

from skipguide import NoEffectError, SkipError, Timetable
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS


def test_refused_at_apply():
    pipe = BY_PIPE["ltx"].build()
    before = [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()]
    with pytest.raises(SkipError, match="out of range"):
        Stg([7]).apply(pipe)
    with pytest.raises(SkipError, match="sweep"):
        Stg().apply(pipe)
    with pytest.raises(SkipError, match="cross_attn"):
        Stg([1], part="cross_attn").apply(BY_PIPE["mochi"].build())
    with pytest.raises(SkipError, match="not described"):
        Stg([1]).apply(object())
    with pytest.raises(SkipError, match=r"names transfromer_2, but the denoisers of LTXPipeline are transformer"):
        Stg({"transformer": [1], "transfromer_2": [1]}).apply(pipe)
    with pytest.raises(SkipError, match="no denoiser"):
        Stg([1]).apply(type("LTXPipeline", (), {"transformer": None})())
    with Stg([1]).apply(pipe), pytest.raises(SkipError, match="already applied"):
        Stg([2]).apply(pipe)
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == before


def test_other_guiders_are_refused():
    import diffusers

    pipe = BY_PIPE["hunyuan15"].build()
    pipe.guider = diffusers.AdaptiveProjectedGuidance()
    with pytest.raises(SkipError, match="AdaptiveProjectedGuidance"):
        Stg([1]).apply(pipe)


@named([BY_PIPE[n] for n in ("ltx", "wan", "hunyuan")])
@pytest.mark.parametrize(
    "settings",
    [
        {"start": 0.4, "stop": 0.6},
        {"scale": Timetable([(0.0, 0.0), (0.9, 2.0)])},
        {"formula": "segmented", "cfg_interval": (0.0, 0.9)},
        {"formula": "uncond", "start": 0.5, "cfg_interval": (0.0, 0.5)},
    ],
)
def test_a_run_in_which_no_step_is_guided_is_refused(case, settings):
    pipe = case.build()
    with pytest.raises(SkipError, match="none of the 3 steps"), Stg([1], **settings).apply(pipe):
        case.run(pipe)


def test_a_skip_without_effect_raises():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    pipe.transformer = MODELS["ltx"].identity_block(pipe.transformer, 3)
    with pytest.raises(NoEffectError, match="did not change"), Stg([3]).apply(pipe):
        case.run(pipe)


def test_nan_in_the_weights_is_not_silent():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(SkipError, match="not finite"), Stg([1]).apply(pipe):
        case.run(pipe)


@named([BY_PIPE[n] for n in ("ltx", "wan")])
def test_a_denoiser_that_is_called_outside_of_the_pipeline_is_noticed(case):
    pipe, family = case.build(), MODELS[case.family]
    with Stg([1]).apply(pipe):
        case.run(pipe)
        with pytest.raises(SkipError, match="not a pipeline"):
            family.run(pipe.transformer, family.inputs(2))


@named([BY_PIPE[n] for n in ("ltx", "wan", "hunyuan")])
def test_uncond_formula_needs_cfg(case):
    pipe = case.build()
    with pytest.raises(SkipError, match="CFG"), Stg([1], formula="uncond").apply(pipe):
        case.run(pipe, cfg=False)


@pytest.mark.parametrize("window", [{}, {"stop": 0.1}])
def test_solve_needs_a_scale_that_stays(window):
    """Said at the first step, where w is not changed yet, even if that is the only one with guidance."""
    dynamic = BY_PIPE["cogvideox_dynamic"]
    pipe = dynamic.build()
    with pytest.raises(SkipError, match="use_dynamic_cfg"), Stg([1], rescale=0.7, **window).apply(pipe):
        dynamic.run(pipe)
