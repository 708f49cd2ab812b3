"""A forward that keeps state between calls (TeaCache, ParaAttention, WaveSpeed) cannot be guided, and says so.

It takes a skipped pass for the next of the pipeline's: it answers one from the other, mostly without an error.
"""

import pytest
import torch
from helpers.guider_calls import step
from helpers.stateful_forward import forget, keep_state
from helpers.stg_reference import close
from torch import nn

from skipguide import SkipError, Skipper, SkipPlan
from skipguide.hosts.compilation import holds_blocks
from skipguide.pipelines import SkipGuider, calibrate
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS

STACKS = {
    "ltx": ("transformer_blocks",),
    "wan": ("blocks",),
    "flux": ("transformer_blocks", "single_transformer_blocks"),
}
WAYS = [
    {},
    {"every": 2},
    {"prefix_reuse": False},
    {"tail": "batched"},
    {"formula": "wan"},
    {"part": "attn"},
    {"start": 0.4},
    {"every": 3, "prefix_reuse": False},
]
KEEPS = "keeps state between calls"


@pytest.mark.parametrize(
    ("name", "cfg"), [("ltx", True), ("ltx", False), ("wan", True), ("wan", False), ("flux", False)]
)
@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_a_forward_that_keeps_state_is_refused(name, cfg, settings):
    case = BY_PIPE[name]
    pipe = case.build()
    call = {"cfg": cfg, "num_inference_steps": 6}
    plain = case.run(pipe, **call)
    state = keep_state(pipe.transformer, STACKS[name])
    case.run(pipe, **call)
    assert 0 < state["answered"] < state["calls"]
    before = set(pipe.transformer.__dict__)
    with pytest.raises(SkipError, match=f"{KEEPS}.*TeaCache"), Stg([2], **settings).apply(pipe):
        case.run(pipe, **call)
    assert set(pipe.transformer.__dict__) == before
    forget(pipe.transformer)
    assert torch.equal(case.run(pipe, **call), plain)


def test_one_that_comes_during_the_guidance_is_refused():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([2]).apply(pipe):
        case.run(pipe)
        keep_state(pipe.transformer, STACKS["ltx"])
        with pytest.raises(SkipError, match=f"{KEEPS}|is now another module|when the plan was applied"):
            case.run(pipe, num_inference_steps=6)


@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"prefix_reuse": False}, {"formula": "uncond"}], ids=str)
@pytest.mark.parametrize("w", [1.0, 4.0])
def test_under_a_guider(settings, w):
    if w == 1 and "formula" in settings:
        pytest.skip("about the unconditional pass")
    model = MODELS["ltx"].build()
    inputs = MODELS["ltx"].inputs(2)
    keep_state(model, STACKS["ltx"])
    guider = SkipGuider([2], guidance_scale=w, **settings)
    with pytest.raises(SkipError, match=KEEPS):
        for number in range(4):
            step(guider, model, inputs, number)


def test_under_calibration():
    pipe = BY_PIPE["flux"].build()
    keep_state(pipe.transformer, STACKS["flux"])
    with pytest.raises(SkipError, match=KEEPS):
        calibrate(pipe, [None], call=BY_PIPE["flux"].call_kwargs() | {"num_inference_steps": 6})


def test_scale_0_leaves_it_alone():
    case = BY_PIPE["ltx"]
    pipe, other = case.build(), case.build()
    keep_state(pipe.transformer, STACKS["ltx"])
    keep_state(other.transformer, STACKS["ltx"])
    expected = case.run(other, num_inference_steps=6)
    with Stg([2], scale=0).apply(pipe):
        assert torch.equal(case.run(pipe, num_inference_steps=6), expected)


def test_blocks_that_a_plan_of_ones_own_leaves_out_are_no_fault():
    """What leaves them out is said, so guidance is that of the model without them."""
    case = BY_PIPE["ltx"]
    reference = case.build()
    reference.transformer = MODELS["ltx"].identity_block(reference.transformer, 3)
    with Stg([1]).apply(reference):
        expected = case.run(reference)
    pipe = case.build()
    with Stg([1]).apply(pipe), Skipper(pipe.transformer, SkipPlan([3])):
        close(case.run(pipe), expected)


# -- compiled graphs, where nothing can be counted --------------------------------------------------------------------


def names(model):
    return [f"transformer_blocks.{number}" for number in range(len(model.transformer_blocks))]


def test_what_counts_as_a_compiled_graph():
    def build():
        return MODELS["ltx"].build()

    model = build()
    assert not holds_blocks(model, names(model))
    assert holds_blocks(torch.compile(model, backend="eager"), names(model))
    model.compile(backend="eager")
    assert holds_blocks(model, names(model))
    model = build()
    model.forward = torch.compile(model.forward, backend="eager")
    assert holds_blocks(model, names(model))
    model = build()
    model.compile_repeated_blocks(backend="eager")
    assert holds_blocks(model, names(model))
    with Skipper(model, SkipPlan([1])):  # its gates stand around the compiled calls
        assert not holds_blocks(model, names(model))
    model = build()
    model.proj_out.compile(backend="eager")
    assert not holds_blocks(model, names(model))
    model.transformer_blocks[1].ff.compile(backend="eager")
    assert not holds_blocks(nn.Sequential(model)[0], names(model))


@pytest.mark.parametrize("how", ["repeated", "whole"])
def test_compiled_blocks_are_no_fault(how):
    torch._dynamo.reset()
    case = BY_PIPE["ltx"]
    with Stg([1]).apply(eager := case.build()):
        expected = case.run(eager)
    pipe = case.build()
    if how == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager")
    with Stg([1]).apply(pipe):
        close(case.run(pipe), expected)
    torch._dynamo.reset()
