"""Guidance follows the described loop of a pipeline and no other: wrappers of it are guided, other loops refused.

Rows in another order, further rows, or a call through a method of another name would be guided without an error, and
wrongly.
"""

import functools
import inspect
import types

import diffusers
import pytest
import torch

from skipguide import SkipError
from skipguide.pipelines import PipelineSpec, calibrate, register_pipeline
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.registry import described as registry
from zoo.pipes import BY_PIPE as VIDEO
from zoo.pipes_image import IMAGE_PIPES

BY_PIPE = {**VIDEO, **{case.name: case for case in IMAGE_PIPES}}
REFUSED = "guidance follows the loop .*register_pipeline"


def as_subclass(pipe, **members):
    """The same pipeline as a subclass of its class, as users write one."""
    pipe.__class__ = type("Mine", (type(pipe),), members)
    return pipe


def swapped_source(cls, name="__call__"):
    """A copy of a class's loop, as a fork has it; compiled here, so that it is other code."""
    function = inspect.unwrap(vars(cls)["__call__"])
    source = inspect.getsource(function)
    source = inspect.cleandoc("def" + source.split("def", 1)[1]).replace("def __call__", f"def {name}")
    own = {**function.__globals__, "__name__": "their_fork"}
    exec(compile("from __future__ import annotations\n" + source, "their_fork.py", "exec"), own)
    return torch.no_grad()(own[name])


def guided(case, pipe, **settings):
    with Stg([1], **settings).apply(pipe):
        return case.run(pipe)


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})


# -- covered ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ltx", "wan", "flux_true_cfg"])
def test_a_subclass_that_inherits_the_call_is_guided(name):
    case = BY_PIPE[name]
    expected = guided(case, case.build())
    assert torch.equal(guided(case, as_subclass(case.build())), expected)


@pytest.mark.parametrize("name", ["ltx", "flux_true_cfg", "zimage"])
def test_a_call_around_the_described_one_is_guided(name):
    case = BY_PIPE[name]
    expected = guided(case, case.build())
    stock = type(case.build())

    def around(self, *args, **kwargs):
        self.seen = True
        return stock.__call__(self, *args, **kwargs)

    pipe = as_subclass(case.build(), __call__=around)
    assert torch.equal(guided(case, pipe), expected) and pipe.seen


@pytest.mark.parametrize("wraps", [False, True])
def test_a_call_that_was_put_around_the_class_is_guided(wraps, monkeypatch):
    """As cache-dit and profilers do, with functools.wraps and without."""
    case = BY_PIPE["flux_true_cfg"]
    expected = guided(case, case.build())
    stock = diffusers.FluxPipeline.__call__

    def around(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.FluxPipeline, "__call__", functools.wraps(stock)(around) if wraps else around)
    assert torch.equal(guided(case, case.build()), expected)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_true_cfg", "ltx", "cogvideox", "wan"])
@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"formula": "wan"}], ids=str)
def test_a_subclass_with_a_loop_of_its_own_is_refused(name, settings):
    case = BY_PIPE[name]
    pipe = case.build()
    as_subclass(pipe, __call__=swapped_source(type(pipe)))
    case.run(pipe)
    with pytest.raises(SkipError, match=REFUSED):
        guided(case, pipe, **settings)
    case.run(pipe)


@pytest.mark.parametrize("name", ["zimage", "lumina2", "pixart_alpha", "longcat", "ltx"])
def test_a_loop_of_another_name_is_refused(name):
    """There what is read from the running call would be None, which counted as "no CFG"."""
    case = BY_PIPE[name]
    pipe = case.build()
    other = types.MethodType(swapped_source(type(pipe), "sample"), pipe)
    with Stg([1]).apply(pipe), pytest.raises(SkipError, match=r"a method that is not __call__.*register_pipeline"):
        other(**case.call_kwargs())


def test_a_call_that_was_put_in_place_of_the_class_s_is_refused(monkeypatch):
    case = BY_PIPE["wan"]
    monkeypatch.setattr(diffusers.WanPipeline, "__call__", swapped_source(diffusers.WanPipeline))
    with pytest.raises(SkipError, match=REFUSED):
        guided(case, case.build())


def test_a_class_that_bears_a_described_name_is_refused_at_once():
    """Every author's fork keeps the name of what it was forked from."""
    pipe = BY_PIPE["ltx"].build()
    members = {**vars(diffusers.LTXPipeline), "__module__": "authors.pipeline_ltx"}
    pipe.__class__ = type("LTXPipeline", (diffusers.DiffusionPipeline,), members)
    with pytest.raises(SkipError, match=r"the LTXPipeline of authors.pipeline_ltx, not that of diffusers"):
        Stg([1]).apply(pipe)


def test_calibration_follows_no_other_loop():
    case = BY_PIPE["flux_true_cfg"]
    pipe = case.build()
    as_subclass(pipe, __call__=swapped_source(type(pipe)))
    with pytest.raises(SkipError, match=REFUSED):
        calibrate(pipe, [None], call=case.call_kwargs())


def test_the_loop_in_a_callback_of_another_pipeline_is_still_its_own():
    """The nearest pipeline on the stack calls; a loop that is not described is not taken for the one around it."""
    case = BY_PIPE["wan"]
    first, second = case.build(), case.build()
    second.transformer = first.transformer
    as_subclass(second, __call__=swapped_source(type(second)))

    def preview(pipe, step, timestep, given):
        case.run(second, num_inference_steps=2)
        return given

    with Stg([1]).apply(second), pytest.raises(SkipError, match=REFUSED):
        case.run(first, callback_on_step_end=preview)
    expected = guided(case, case.build())
    with Stg([1]).apply(first):
        assert torch.equal(case.run(first, callback_on_step_end=preview), expected)


# -- registered -------------------------------------------------------------------------------------------------------


def test_a_registered_loop_is_guided(own_registry):
    """The class itself, not those of its name elsewhere; and what is registered for it is what holds."""
    case = BY_PIPE["ltx"]
    expected = guided(case, case.build())
    pipe = case.build()
    as_subclass(pipe, __call__=swapped_source(type(pipe), "sample"))
    register_pipeline(type(pipe), registry.PIPELINES["LTXPipeline"])
    assert torch.equal(guided(case, pipe), expected)


def test_a_registered_fork_does_not_stand_for_the_stock_class(own_registry):
    """It has the name of a described pipeline and calls its denoiser in another way."""
    case = BY_PIPE["ltx"]
    fork = type("LTXPipeline", (), {"__module__": "authors.pipeline_ltx"})
    register_pipeline(fork, PipelineSpec("single", scales=((),)))
    assert registry.pipeline_spec(fork()).cfg == "single"
    assert registry.pipeline_spec(case.build()).cfg == "batched"
    register_pipeline("LTXPipeline", PipelineSpec("named", scales=((),)))  # a name is said to stand for all of them
    assert registry.pipeline_spec(case.build()).cfg == "named"


# -- what is read from the call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "words"), [("call.scale_w", "no variable of that name"), ("_scale", "has no _scale")]
)
def test_a_scale_that_is_not_there_is_not_taken_for_no_cfg(scales, words, own_registry):
    """A newer diffusers may rename a variable or an attribute."""
    case = BY_PIPE["ltx"]
    pipe = as_subclass(case.build())
    register_pipeline(type(pipe), PipelineSpec("batched", scales=((scales,),)))
    with pytest.raises(SkipError, match=words):
        guided(case, pipe)


def test_cfg_that_nothing_tells_of_is_refused():
    with pytest.raises(SkipError, match="without a scale or a switch"):
        PipelineSpec("batched", scales=((),))
    PipelineSpec("batched", scales=((),), switch="call.apply_cfg")
