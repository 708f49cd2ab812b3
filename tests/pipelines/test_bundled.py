"""The bundled text-to-video model with what a call of it should say."""

import inspect
import json

import pytest

from skipguide import SkipError
from skipguide.assets import bundled
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline
from skipguide.pipelines.bundled import call_of


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' scheduler, numpy 2
def test_the_pipeline_draws_what_its_call_says():
    pipe, call = bundled_pipeline()
    said = json.loads((bundled() / "generation.json").read_text())
    assert {name: said[name] for name in call} == call
    assert set(call) <= set(inspect.signature(type(pipe).__call__).parameters)
    assert {"height", "width", "num_inference_steps", "guidance_scale"} <= set(call)
    with SpatiotemporalSkipGuidance([2]).apply(pipe):
        clip = pipe("a red circle", **call | {"num_inference_steps": 1, "output_type": "pt"}).frames[0]
    assert len(clip) == call["num_frames"]
    assert clip.shape[2:] == (call["height"], call["width"])


def test_the_call_is_the_caller_s_own(tmp_path):
    (tmp_path / "generation.json").write_text('{"height": 64, "fps": 8}')
    cls = type("Pipeline", (), {"__call__": lambda self, prompt, height=512: None})
    first = call_of(tmp_path, cls)
    assert first == {"height": 64}, "what is for playing the clip is no argument of the pipeline"
    first["height"] = 1
    assert call_of(tmp_path, cls) == {"height": 64}
    assert call_of(tmp_path / "elsewhere", cls) == {}


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(SkipError, match=r"'tiny-lm' is not a pipeline of diffusers; tiny-t2v is"):
        bundled_pipeline("tiny-lm")
    with pytest.raises(SkipError, match="no bundled model 'huge'"):
        bundled_pipeline("huge")
