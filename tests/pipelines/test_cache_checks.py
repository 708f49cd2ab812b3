"""One check for caches, whatever guidance is applied by: cache-dit, told by its marks, and those of diffusers.

What cache-dit leaves on a model and on a pipeline is written here as its version 1.5 does, but for the contexts: so it
stands for a version that keeps them elsewhere, and is refused. That version itself is in test_cache_dit.py.
"""

import functools

import diffusers
import pytest
import torch
from helpers.guider_calls import step

from skipguide import SkipError
from skipguide.hosts.diffusers_caches import CACHES, KNOWN, cache_on
from skipguide.pipelines import SkipGuider, calibrate
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.pipes import BY_PIPE, MODELS


def on_a_model(model):
    """What cache-dit 1.5 leaves on a transformer: a forward around its own, and marks."""
    original = model.forward

    def new_forward(self, *args, **kwargs):
        return original(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), new_forward)
    model._original_forward, model._context_manager, model._is_cached = original, object(), True


def on_a_pipeline(pipe, monkeypatch):
    """What it leaves on a pipeline: a mark on the class, the rest on the instance."""
    monkeypatch.setattr(type(pipe), "_is_cached", True, raising=False)
    pipe._context_manager = object()


def by_pipeline(pipe, case):
    Stg([1]).apply(pipe)


def by_calibration(pipe, case):
    calibrate(pipe, [None], call=case.call_kwargs())


def by_branches(pipe, case):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        Stg([1]).apply(pipe, branch_parallel=True)
    finally:
        torch.distributed.destroy_process_group()


def by_guider(pipe, case):
    step(SkipGuider([1], guidance_scale=5.0), pipe.transformer, MODELS[case.family].inputs(1))


def by_modular_guider(pipe, case):
    other = modular.build("wan", transformer=pipe.transformer, guider=SkipGuider([1]))
    modular.run(other)


WAYS = [by_pipeline, by_calibration, by_branches, by_guider, by_modular_guider]
ways = pytest.mark.parametrize("way", WAYS)


@ways
def test_cache_dit_on_the_model_is_refused(way):
    case = BY_PIPE["wan"]
    pipe = case.build()
    on_a_model(pipe.transformer)
    before = sorted(pipe.transformer.__dict__)
    with pytest.raises(SkipError, match=r"cache-dit enabled.*cache_dit\.disable_cache"):
        way(pipe, case)
    assert sorted(pipe.transformer.__dict__) == before


@ways
def test_a_cache_of_diffusers_that_hooked_nothing_is_refused(way):
    case = BY_PIPE["wan"]
    pipe = case.build()
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(diffusers.hooks.ModelHook(), "text_kv_cache_transformer")
    with pytest.raises(SkipError, match=r"TextKVCache enabled.*disable_cache"):
        way(pipe, case)


def test_cache_dit_on_the_pipeline_is_refused_for_that_pipeline_only(monkeypatch):
    case = BY_PIPE["wan"]
    pipe, other = case.build(), case.build()
    on_a_pipeline(pipe, monkeypatch)
    with pytest.raises(SkipError, match="cache-dit enabled"):
        Stg([1]).apply(pipe)
    Stg([1]).apply(other).remove()  # the mark is on their class


@pytest.mark.parametrize("wrapped", [False, True])
def test_cache_dit_that_comes_during_the_guidance_is_refused(wrapped):
    case = BY_PIPE["wan"]
    pipe = case.build()
    with Stg([1]).apply(pipe):
        case.run(pipe)
        on_a_model(pipe.transformer)
        with pytest.raises(SkipError, match="cache-dit enabled"):
            case.run(pipe)
    if wrapped:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert cache_on(pipe.transformer) == "cache-dit"


def test_under_a_guider_a_cache_that_comes_between_steps_is_refused():
    model, inputs = MODELS["wan"].build(), MODELS["wan"].inputs(1)
    guider = SkipGuider([1], guidance_scale=5.0)
    step(guider, model, inputs, 0)
    on_a_model(model)
    with pytest.raises(SkipError, match="cache-dit enabled"):
        step(guider, model, inputs, 1)


def test_the_known_caches():
    assert set(KNOWN) == {*CACHES, "cache-dit", "TeaCache"}
