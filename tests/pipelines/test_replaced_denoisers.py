"""A denoiser that is replaced or wrapped during the guidance: an error where guidance would end, none elsewhere."""

import functools
import logging
import types

import pytest
import torch
from helpers.guider_calls import step
from helpers.stg_reference import close

from skipguide import SkipError
from skipguide.errors import LostGateError
from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS


def replace_forward(model):
    """What a patch does that knows nothing of gates: the class's forward, on the instance."""
    model.forward = types.MethodType(type(model).forward, model)


def remove_forward(model):
    del model.__dict__["forward"]


@pytest.mark.parametrize("name", ["ltx", "wan", "flux", "cogvideox"])
@pytest.mark.parametrize("change", [replace_forward, remove_forward])
@pytest.mark.parametrize("settings", [{}, {"cfg_interval": (0.0, 0.5)}], ids=str)
def test_a_forward_that_was_replaced_during_the_guidance_is_an_error(name, change, settings):
    case = BY_PIPE[name]
    if settings and name == "flux":
        pytest.skip("no CFG")
    pipe = case.build()
    plain = case.run(pipe)
    applied = Stg([1], **settings).apply(pipe)
    case.run(pipe)
    change(pipe.transformer)
    with pytest.raises(LostGateError, match="was replaced"):
        case.run(pipe)
    applied.remove()
    assert torch.equal(case.run(pipe), plain)


def test_in_a_callback():
    case = BY_PIPE["wan"]
    pipe = case.build()

    def change(pipe, number, timestep, given):
        replace_forward(pipe.transformer)
        return given

    with Stg([1]).apply(pipe), pytest.raises(LostGateError, match="was replaced"):
        case.run(pipe, callback_on_step_end=change)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_forward_around_the_gate_stays_guided(wraps):
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        expected = case.run(pipe)
        original = pipe.transformer.forward

        def around(*args, **kwargs):
            return original(*args, **kwargs)

        pipe.transformer.forward = functools.wraps(original)(around) if wraps else around
        assert torch.equal(case.run(pipe), expected)
        pipe.transformer.forward = original
    assert applied.stats.passes == 12


def test_a_guider_takes_the_forward_that_is_there_at_each_step():
    model, inputs = MODELS["wan"].build(), MODELS["wan"].inputs(1)
    guider = SkipGuider([1], guidance_scale=5.0)
    expected = step(guider, model, inputs, 0)[0].pred
    replace_forward(model)
    assert torch.equal(step(guider, model, inputs, 1)[0].pred, expected)
    guider.set_state(2, 4, torch.tensor(1.0))
    batches = guider.prepare_inputs({})
    guider.prepare_models(model)
    replace_forward(model)  # within a pass
    with torch.no_grad():
        model(**inputs)
    with pytest.raises(SkipError, match="was not called"):
        guider.cleanup_models(model)
    assert len(batches) == 3


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_a_denoiser_that_is_compiled_during_the_guidance_stays_guided(name, caplog):
    """It is another module around the same one, and no word that guidance had ended."""
    torch._dynamo.reset()
    case = BY_PIPE[name]
    pipe = case.build()
    with caplog.at_level(logging.WARNING, "skipguide"), Stg([1]).apply(pipe):
        expected = case.run(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        close(case.run(pipe), expected)
    assert not [record for record in caplog.records if record.name.startswith("skipguide")]
    torch._dynamo.reset()


def test_no_trace_is_left_at_the_block():
    pipe = BY_PIPE["wan"].build()
    block = pipe.transformer.blocks[0]
    before = set(block.__dict__)
    applied = Stg([1]).apply(pipe)
    from skipguide.gate import gate_of

    assert gate_of(block).everywhere
    applied.remove()
    assert not gate_of(block).everywhere and set(block.__dict__) == before
