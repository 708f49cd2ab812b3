"""Tangential amplifying guidance: every solver's step, its tangential part amplified; nothing else, and no trace."""

import copy

import diffusers
import pytest
import torch

from skipguide import LostGateError, SkipError
from skipguide.guidance import tangential_update
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines import TangentialAmplifyingGuidance as Tag
from zoo.pipes import BY_PIPE, STEPS
from zoo.pipes_unet import BY_UNET_PIPE
from zoo.pipes_video import BY_VIDEO

pytestmark = pytest.mark.numerics
ETA = 1.4


def by_hand(x, after, eta):
    """Row by row, with the projection matrix's definition: P d = x <x, d> / <x, x>."""
    rows = []
    for a, b in zip(x.double(), after.double(), strict=True):
        d = b - a
        radial = a * (a * d).sum() / (a * a).sum()
        rows.append(a + radial + eta * (d - radial))
    return torch.stack(rows)


def test_the_radial_part_stays():
    x, after = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    found = tangential_update(x, after, ETA)
    torch.testing.assert_close(found, by_hand(x, after, ETA).float())
    inner = lambda a, b: (a * b).flatten(1).sum(1)  # noqa: E731
    torch.testing.assert_close(inner(x, found), inner(x, after), atol=1e-4, rtol=1e-5)
    assert tangential_update(x, after, 1.0) is after
    half = tangential_update(x.bfloat16(), after.bfloat16(), ETA)
    assert half.dtype == torch.bfloat16


def stepped_by_hand(scheduler, window=range(STEPS)):
    """The same scheduler with its step written out anew."""
    plain, count = type(scheduler).step, iter(range(100))

    def step(model_output, timestep, sample, **how):
        out = plain(scheduler, model_output, timestep, sample, **how)
        inside = next(count) in window
        after = by_hand(sample, out[0], ETA).to(out[0].dtype) if inside else out[0]
        return (after, *out[1:]) if isinstance(out, tuple) else type(out)(prev_sample=after)

    scheduler.step = step


@pytest.mark.parametrize("name", ["ltx", "wan", "sd3", "flux", "latte"])
def test_a_pipeline_takes_the_amplified_steps(name):
    """Euler, UniPC with its memory of earlier steps, DDIM."""
    case = BY_PIPE[name]
    pipe = case.build()
    plain, attributes = case.run(pipe, 2), set(pipe.scheduler.__dict__)
    with Tag(ETA).apply(pipe) as applied:
        out = case.run(pipe, 2)
        assert applied.stats.steps == STEPS
    assert not torch.allclose(out, plain, atol=1e-3)
    assert "step" not in pipe.scheduler.__dict__
    assert set(pipe.scheduler.__dict__) == attributes
    assert torch.equal(case.run(pipe, 2), plain)
    stepped_by_hand(pipe.scheduler)
    torch.testing.assert_close(out, case.run(pipe, 2), atol=2e-5 * out.abs().max().item(), rtol=0)


def test_the_window_is_counted_in_steps():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Tag(ETA, start=0.3, stop=0.5).apply(pipe) as applied:
        out = case.run(pipe)
    assert applied.stats.steps == 1
    stepped_by_hand(pipe.scheduler, window=(1,))
    torch.testing.assert_close(out, case.run(pipe), atol=1e-4, rtol=0)


def test_a_scale_of_one_is_the_plain_pipeline():
    case = BY_PIPE["wan"]
    pipe = case.build()
    plain = case.run(pipe)
    with Tag(1.0).apply(pipe):
        assert torch.equal(case.run(pipe), plain)


def test_it_goes_together_with_skip_guidance():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe), Tag(ETA).apply(pipe):
        both = case.run(pipe)
    with Stg([1]).apply(pipe):
        stepped_by_hand(pipe.scheduler)
        torch.testing.assert_close(both, case.run(pipe), atol=1e-4, rtol=0)


def test_a_pipeline_that_copies_its_scheduler_keeps_them_apart():
    """LTX-2 steps sound with a copy of the scheduler that has a place in the table of its own."""
    case = BY_VIDEO["ltx2_own"]
    pipe = case.build()
    with Tag(ETA).apply(pipe) as applied:
        copied = copy.deepcopy(pipe.scheduler)
        assert copied.step.scheduler is copied
        case.run(pipe)
        assert applied.stats.steps == 2 * STEPS
    assert "step" not in pipe.scheduler.__dict__


def test_a_scheduler_that_returns_an_object():
    case = BY_UNET_PIPE["animatediff"]
    pipe = case.make()
    with Tag(ETA).apply(pipe) as applied:
        case.run(pipe)
    assert applied.stats.steps


def test_what_is_refused():
    pipe = BY_PIPE["ltx"].build()
    for wrong in ({"scale": 0.5}, {"scale": "a"}, {"start": 0.8, "stop": 0.2}):
        with pytest.raises(SkipError):
            Tag(**wrong)
    with pytest.raises(SkipError, match="expected a pipeline of diffusers"):
        Tag().apply(pipe.transformer)
    with Tag().apply(pipe), pytest.raises(SkipError, match="already applied"):
        Tag().apply(pipe)
    applied = Tag().apply(pipe)
    mine, pipe.scheduler.step = pipe.scheduler.step, lambda **how: None
    with pytest.raises(LostGateError, match="was replaced"):
        applied.remove()
    pipe.scheduler.step = mine
    applied.remove()
    applied.remove()
    with pytest.raises(SkipError, match="was removed"), applied:
        pass
    assert isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
