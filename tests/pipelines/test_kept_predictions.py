"""Predictions and activations are held no longer than a step needs them, and never into another one."""

from types import SimpleNamespace

import pytest
import torch

from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.guider.combination import Combination
from skipguide.pipelines.registry.spec import PipelineSpec
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from zoo.pipes import BY_PIPE


def test_a_step_does_not_take_over_the_shift_of_the_last():
    times = torch.arange(3)
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=times))
    call = PipelineCall(times, steps=3)
    call.extra = torch.ones(1)
    call.enter(pipe, PipelineSpec(cfg="single"), "")
    assert call.extra is None


@pytest.mark.parametrize("every", [1, 2])
def test_directions_are_held_only_where_they_are_used_again(every):
    case, held = BY_PIPE["ltx"], []
    pipe = case.build()
    with Stg([1], every=every).apply(pipe) as applied:
        state = applied._parts[0].state
        model = pipe.transformer
        hook = model.register_forward_pre_hook(lambda *_: held.append(state.directions is not None))
        case.run(pipe)
        hook.remove()
    assert any(held) == (every > 1)


def test_an_exception_in_a_pass_frees_the_captured_activations():
    class Odd(Exception):  # noqa: N818
        pass

    case, seen = BY_PIPE["ltx"], []
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        passes = applied._parts[0].passes

        def fails(module, args):  # the last block, in a pass whose prefix is captured by then
            seen.extend(prefix for step in passes._prepared.values() for prefix in step.captured.values() if prefix)
            raise Odd

        hook = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(fails)
        with pytest.raises(Odd):
            case.run(pipe)
        hook.remove()
        assert seen and not any(prefix.streams for prefix in seen)


def test_a_run_that_begins_at_the_step_of_the_last_keeps_nothing_of_it():
    """One step, then one step again: the second run is a new one."""
    guider = SkipGuider([1], every=2)
    guider.set_state(0, 1, torch.tensor(1.0))
    guider._combinations[""] = Combination(guider.settings, guider.stats, "")
    guider.set_state(0, 1, torch.tensor(1.0))
    assert not guider._combinations
