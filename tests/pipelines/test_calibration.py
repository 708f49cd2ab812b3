"""What calibration calls a pipeline with: its folder's own settings, eight steps, and above all what it is told."""

import functools
import json

import numpy as np
import pytest
import torch

from skipguide.errors import SkipError
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines import calibrate, calibration
from skipguide.pipelines.calibration import own_call
from skipguide.pipelines.sampling.predictions import first
from zoo.pipes import BY_PIPE
from zoo.pipes_image import IMAGE_PIPES


@pytest.mark.parametrize("name", ["zimage", "latte"])
def test_the_rows_of_each_branch_are_told_apart(name, monkeypatch):
    """Z-Image puts the conditional rows first, the others last."""
    case = next(each for each in (*IMAGE_PIPES, *BY_PIPE.values()) if each.name == name)
    pipe, seen, outputs = case.build(), [], []
    measured = calibration.measure_skip
    monkeypatch.setattr(
        calibration, "measure_skip", lambda c, k, u, grid: seen.append((c, u)) or measured(c, k, u, grid)
    )
    call = {"guidance_scale": 4.0} | case.call_kwargs(1, True)
    pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(first(out)))
    calibrate(pipe, [None], parts=["block"], levels=1, call=call | {"num_inference_steps": 1})
    upper, lower = outputs[0].chunk(2)
    c, u = (upper, lower) if name == "zimage" else (lower, upper)
    assert not torch.equal(c, u) and seen
    assert all(torch.equal(one, c) and torch.equal(other, u) for one, other in seen)


@pytest.fixture
def case():
    return BY_PIPE["latte"]


@pytest.fixture
def pipe(case, tmp_path):
    """As loaded from a folder that says how it is meant to be called."""
    made = case.build()
    made.register_to_config(_name_or_path=str(tmp_path))
    settings = {"guidance_scale": 2.5, "num_inference_steps": 20, "fps": 8}
    (tmp_path / "generation.json").write_text(json.dumps(settings))
    return made


def test_the_folder_says_what_a_call_takes(pipe, tmp_path):
    assert own_call(pipe) == {"guidance_scale": 2.5, "num_inference_steps": 20}  # a pipeline is not told of frame rates
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(SkipError, match="expected JSON"):
        own_call(pipe)
    (tmp_path / "generation.json").unlink()
    assert own_call(pipe) == {}


def test_without_a_folder_nothing_of_the_working_directory_is_read(case, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert own_call(case.build()) == own_call(object()) == {}


def test_calibration_uses_them_below_what_it_is_told(case, pipe, monkeypatch):
    seen, plain = [], type(pipe).__call__

    @functools.wraps(plain)
    def spy(self, *args, **kwargs):
        seen.append(kwargs)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", spy)
    told = case.call_kwargs(1, True) | {"num_inference_steps": np.int64(3)}
    del told["guidance_scale"], told["generator"]
    scores = calibrate(pipe, [None], parts=["block"], levels=np.int64(1), call=told, seed=np.int64(5))
    assert json.loads(json.dumps(scores.about)) == {"prompts": 1, "steps": 3, "levels": 1, "seed": 5}
    del told["num_inference_steps"]
    calibrate(pipe, [None], parts=["block"], levels=1, call=told | {"guidance_scale": 4.0})
    assert [each["guidance_scale"] for each in seen] == [2.5, 4.0]
    assert [each["num_inference_steps"] for each in seen] == [3, 8]


@pytest.mark.parametrize("levels", [0, -1, 1.5, "2", True])
def test_levels_are_counted(pipe, levels):
    with pytest.raises(SkipError, match="levels as a whole number of at least 1"):
        calibrate(pipe, [None], levels=levels)


def test_a_cost_takes_any_whole_number_of_steps(pipe):
    stg = Stg([1], start=0.5)
    assert stg.cost(pipe, steps=np.int64(3)) == stg.cost(pipe, steps=3)
    for steps in (0, 2.0, True, "3"):
        with pytest.raises(SkipError, match="steps as a whole number of at least 1"):
            stg.cost(pipe, steps=steps)
