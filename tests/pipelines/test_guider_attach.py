"""A guider is attached where it is called, and refused where it would never be."""

import pytest
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

from skipguide import SkipError
from skipguide.pipelines import SkipGuider, calibrate
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.pipes import BY_PIPE
from zoo.pipes_image import IMAGE_PIPES
from zoo.pipes_video import VIDEO_PIPES

WITH_GUIDER = {case.name: case for case in (*IMAGE_PIPES, *VIDEO_PIPES)} | BY_PIPE


def test_on_a_modular_pipeline():
    expected = modular.run(modular.build("wan", guider=SkipGuider([1])))
    pipe = modular.build("wan")
    guider = SkipGuider([1])
    assert guider.attach(pipe) is guider and pipe.guider is guider
    assert torch.equal(modular.run(pipe), expected) and guider.stats.passes == 9


def test_on_a_modular_pipeline_with_two():
    pipe = modular.build("wan22")
    first, second = SkipGuider([1]).attach(pipe), SkipGuider([2]).attach(pipe, "guider_2")
    modular.run(pipe)
    assert pipe.guider is first and pipe.guider_2 is second
    assert first.stats.passes and second.stats.passes


@pytest.mark.parametrize("name", ["hunyuan15", "motif", "hunyuan_image"])
def test_on_a_classic_pipeline_with_a_guider(name):
    case = WITH_GUIDER[name]
    pipe = case.build()
    guider = SkipGuider([1], guidance_scale=4.0).attach(pipe)
    case.run(pipe)
    assert pipe.guider is guider and guider.stats.passes


@pytest.mark.parametrize("name", ["wan", "ltx", "flux", "sd3"])
def test_a_pipeline_without_a_guider_is_refused(name):
    """There an assigned guider is an attribute that nobody reads."""
    pipe = BY_PIPE[name].build()
    sentence = rf"{type(pipe).__name__} has no guider.*SpatiotemporalSkipGuidance\(...\)\.apply\(pipe\)"
    with pytest.raises(SkipError, match=sentence):
        SkipGuider([1]).attach(pipe)
    assert not hasattr(pipe, "guider")
    Stg([1]).apply(pipe).remove()


def test_what_is_no_pipeline_or_has_no_such_guider_is_refused():
    pipe = modular.build("wan")
    with pytest.raises(
        SkipError, match=r"expected a pipeline with a component 'guider_2'; .*SpatiotemporalSkipGuidance"
    ):
        SkipGuider([1]).attach(pipe, "guider_2")
    assert isinstance(pipe.blocks, WanCoreDenoiseStep)
    for other in (BY_PIPE["wan"].build().transformer, None, "wan", type(pipe)):
        with pytest.raises(SkipError, match="pass the pipeline"):
            SkipGuider([1]).attach(other)


def test_every_entry_that_takes_a_pipeline_says_so():
    """A denoiser, nothing, a class or a name instead: one short sentence, not the list of all pipelines."""
    pipe = BY_PIPE["wan"].build()
    model = pipe.transformer
    others = {"a WanTransformer3DModel": model, "None": None, "the class WanPipeline": type(pipe), "a str": "wan"}
    for got, other in others.items():
        for entry in (Stg([1]).apply, Stg([1]).cost, calibrate, SkipGuider([1]).attach):
            with pytest.raises(SkipError, match=f"expected a pipeline .*; got {got}.*: pass the pipeline") as error:
                entry(other)
            assert len(str(error.value)) < 200
    with pytest.raises(SkipError, match="is not described"):
        Stg([1]).apply(object())
