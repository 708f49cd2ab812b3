"""A prediction that is no number after the first guided step: noticed at the end of the run, whichever it is.

The first guided step is looked at right away; a float16 overflow comes later, as latents grow.
"""

import pytest
import torch
from helpers.guider_calls import step

from skipguide import SkipError
from skipguide.pipelines import SkipGroup, SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from zoo import modular
from zoo.pipes import BY_PIPE, MODELS, STEPS

WRONG = {
    "plain": "the denoiser's own prediction",
    "skipped": "the prediction without layers",
}
LAYER = 2


class Spoiled:
    """A last block that returns NaN in one pass of one step, told by how many of the model's passes came before."""

    def __init__(self, model, at, value=float("nan")):
        self.calls, self.at, self.value = 0, at, value
        model.proj_out.register_forward_hook(self)

    def __call__(self, module, args, out):
        self.calls += 1
        return torch.full_like(out, self.value) if self.calls - 1 == self.at else out


def passes(name, cfg):
    """The passes of a step, in order, and which of them is the skipped one."""
    if not cfg or name == "ltx":
        return ["plain", "skipped"]
    return ["plain", "skipped", "uncond"]


CASES = [
    (name, cfg, number, which)
    for name, cfg in (("ltx", True), ("ltx", False), ("wan", True), ("wan", False), ("flux", False))
    for number in (1, STEPS - 1)
    for which in passes(name, cfg)
]


@pytest.mark.parametrize(("name", "cfg", "number", "which"), CASES)
def test_each_pass_of_each_later_step(name, cfg, number, which):
    case = BY_PIPE[name]
    pipe = case.build()
    order = passes(name, cfg)
    with Stg([LAYER]).apply(pipe) as applied:
        expected = case.run(pipe, cfg=cfg)
        Spoiled(pipe.transformer, number * len(order) + order.index(which))
        with pytest.raises(SkipError, match=f"from step {number} .*{WRONG.get(which, 'the guided prediction')}"):
            case.run(pipe, cfg=cfg)
        assert torch.equal(case.run(pipe, cfg=cfg), expected), "the next call is whole"
    assert applied.stats.passes


SETTINGS = [
    {},
    {"rescale": 0.7},
    {"apg": 0.0, "apg_norm": 1.0},
    {"every": 2},
    {"prefix_reuse": False},
    {"part": "attn"},
    {"start": 0.0, "stop": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["ltx", "wan", "flux"])
def test_the_first_skipped_pass_is_looked_at_right_away(name, settings):
    """NaN in nothing but the first skipped prediction: the run ends there, and says which layers were left out."""
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([LAYER], **settings).apply(pipe):
        spoiled = Spoiled(pipe.transformer, 1)
        with pytest.raises(SkipError, match=rf"the prediction without layers \[{LAYER}\] is not finite: skip others"):
            case.run(pipe, cfg=name != "flux")
        assert spoiled.calls == 2, "no further pass was run"


def test_the_skipped_pass_of_each_group():
    case = BY_PIPE["ltx"]
    for number, layer in ((1, 1), (2, 2)):  # passes that begin alike run one after the other, the longer first
        pipe = case.build()
        with Stg(groups=[SkipGroup([1]), SkipGroup([2])]).apply(pipe):
            Spoiled(pipe.transformer, number)
            with pytest.raises(SkipError, match=r"the prediction without layers \[(1|2)\] is not finite") as error:
                case.run(pipe)
        assert f"[{layer}]" in str(error.value)


class SpoiledRows(Spoiled):
    """NaN in the last row alone: that of a skipped pass in one batch with the others."""

    def __call__(self, module, args, out):
        self.calls += 1
        if self.calls - 1 == self.at:
            out = out.clone()
            out[-1] = self.value
        return out


@pytest.mark.parametrize(("number", "says"), [(0, r"without layers \[2\] is not finite"), (1, "from step 1 .*without")])
def test_a_skipped_row_in_one_batch_with_the_others(number, says):
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([LAYER], tail="batched").apply(pipe):
        SpoiledRows(pipe.transformer, number)
        with pytest.raises(SkipError, match=says):
            case.run(pipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("settings", [{"rescale": 0.7}, {"formula": "wan"}, {"every": 2}, {"start": 0.5}], ids=str)
def test_in_other_ways_of_delivery_and_at_steps_without_a_skipped_pass(value, settings):
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([LAYER], **settings).apply(pipe):
        Spoiled(pipe.transformer, 3, value)
        with pytest.raises(SkipError, match="not finite"):
            case.run(pipe)


def test_a_formula_inside_the_unconditional_pass():
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([LAYER], formula="uncond").apply(pipe):
        Spoiled(pipe.transformer, 3)
        with pytest.raises(SkipError, match="from step 1"):
            case.run(pipe)


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_a_scale_that_nothing_can_be_made_of(name):
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([LAYER], scale=1e30).apply(pipe), pytest.raises(SkipError, match=r"from step 0.*smaller scale"):
        case.run(pipe, num_inference_steps=1)


def stop_after(number):
    def stop(pipe, step, timestep, given):
        pipe._interrupt = step >= number
        return given

    return stop


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_an_interrupted_call_is_read_at_the_next_one(name):
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        expected = case.run(pipe)
        Spoiled(pipe.transformer, len(passes(name, True)))
        case.run(pipe, callback_on_step_end=stop_after(1))
        with pytest.raises(SkipError, match=r"from step 1 .*the call before this one, which was interrupted"):
            case.run(pipe)
        assert torch.equal(case.run(pipe), expected)


def test_an_interrupted_call_is_read_when_guidance_ends():
    case = BY_PIPE["wan"]
    pipe = case.build()
    plain = case.run(pipe)
    before = set(pipe.transformer.__dict__)
    applied = Stg([LAYER]).apply(pipe)
    spoiled = Spoiled(pipe.transformer, 3)
    case.run(pipe, callback_on_step_end=stop_after(1))
    with pytest.raises(SkipError, match="the last call, which was interrupted"):
        applied.remove()
    applied.remove()
    assert set(pipe.transformer.__dict__) == before and spoiled.calls
    assert torch.equal(case.run(pipe), plain)


def test_another_error_is_not_hidden():
    case = BY_PIPE["wan"]
    pipe = case.build()
    Spoiled(pipe.transformer, 3)

    def fail(pipe, step, timestep, given):
        if step == 1:
            raise KeyboardInterrupt
        return given

    with pytest.raises(KeyboardInterrupt), Stg([LAYER]).apply(pipe):
        case.run(pipe, callback_on_step_end=fail)


def test_what_failed_in_another_way_is_not_told_of_twice():
    """NaN at one step, and a pass of the next one fails: the error has been seen, and the next call is a new one."""
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        expected = case.run(pipe)
        Spoiled(pipe.transformer, 3)
        hook = pipe.transformer.proj_out.register_forward_pre_hook(FailsAt(6))
        with pytest.raises(RuntimeError, match="out of luck"):
            case.run(pipe)
        hook.remove()
        assert torch.equal(case.run(pipe), expected)


class FailsAt:
    def __init__(self, at):
        self.left = at

    def __call__(self, module, args):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of luck")


def test_nothing_is_read_before_the_last_step(monkeypatch):
    """Reading waits for the device: the first guided step is checked right away, and the last one reads the rest."""
    read, settle = [], FiniteWatch.settle
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([LAYER]).apply(pipe) as applied:
        monkeypatch.setattr(
            FiniteWatch, "settle", lambda self, *a: read.append(applied.stats.passes) or settle(self, *a)
        )
        case.run(pipe)
        assert read == [0, 3 * STEPS]  # at the beginning nothing is noted, so nothing is waited for


def test_without_guidance_nothing_is_watched():
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([LAYER], scale=0).apply(pipe):
        Spoiled(pipe.transformer, 2)
        assert not torch.isfinite(case.run(pipe)).all()


# -- under a guider ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "which"), [(0, "plain"), (1, "skipped"), (2, "plain")])
@pytest.mark.parametrize("number", [1, 3])
def test_under_a_guider(place, which, number):
    model, inputs = MODELS["wan"].build(), MODELS["wan"].inputs(1)
    guider = SkipGuider([1], guidance_scale=5.0)
    Spoiled(model, 3 * number + place)
    with pytest.raises(SkipError, match=f"from step {number} .*{WRONG[which]}"):
        for each in range(4):
            step(guider, model, inputs, each)
    for each in range(4):  # the next run is whole
        assert torch.isfinite(step(guider, model, inputs, each)[0].pred).all()


def test_a_guider_s_scale_and_a_run_that_was_interrupted():
    pipe = modular.build("wan", guider=SkipGuider([1], scale=1e30))
    with pytest.raises(SkipError, match="smaller scale"):
        modular.run(pipe)
    model, inputs = MODELS["wan"].build(), MODELS["wan"].inputs(1)
    guider = SkipGuider([1], guidance_scale=5.0)
    Spoiled(model, 3)
    for each in range(2):
        step(guider, model, inputs, each)
    with pytest.raises(SkipError, match="the run before this one, which was interrupted"):
        step(guider, model, inputs, 0)
    assert torch.isfinite(step(guider, model, inputs, 0)[0].pred).all()
