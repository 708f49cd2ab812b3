"""Scores of pixels on clips whose values are known by arithmetic."""

import types

import numpy as np
import pytest

from skipguide import SkipError
from skipguide.bench import scores
from skipguide.bench.scorer import Scorer
from skipguide.media.frames import as_images


def clip(*frames):
    """A clip [T, 4, 4, 3] of frames of one colour each."""
    return np.stack([np.broadcast_to(np.asarray(frame, np.float32), (4, 4, 3)) for frame in frames])


def test_a_still_grey_clip_has_nothing():
    found = scores.clip_scores(clip(0.5, 0.5, 0.5))
    assert found == {"sharpness": pytest.approx(0, abs=1e-9), "saturation": 0.0, "motion": 0.0, "flicker": 0.0}


def test_saturation_is_the_spread_of_the_channels():
    assert scores.saturation(clip((0.9, 0.2, 0.4), (0.5, 0.5, 0.5))) == pytest.approx((0.7 + 0) / 2)


def test_motion_and_flicker():
    steady = clip(0.0, 0.1, 0.2, 0.3)  # goes on: motion without flicker
    assert scores.motion(steady) == pytest.approx(10)
    assert scores.flicker(steady) == pytest.approx(0, abs=1e-5)
    blinking = clip(0.0, 0.1, 0.0, 0.1)  # second differences of -0.2 and 0.2
    assert scores.motion(blinking) == pytest.approx(10)
    assert scores.flicker(blinking) == pytest.approx(20)


def test_sharpness_is_the_variance_of_the_laplacian():
    frame = np.zeros((1, 5, 5, 3), np.float32)
    frame[0, 2, 2] = 1.0  # inside: -4 in the middle, 1 at its four neighbours, 0 at the four corners of 3 x 3
    values = [-4.0] + 4 * [1.0] + 4 * [0.0]
    assert scores.sharpness(frame) == pytest.approx(1000 * np.var(values), rel=1e-5)
    blurred = frame * 0.5
    assert scores.sharpness(blurred) == pytest.approx(scores.sharpness(frame) / 4, rel=1e-5)
    with pytest.raises(SkipError, match="3 pixels a side"):
        scores.sharpness(frame[:, :2])


def test_a_picture_has_no_motion():
    assert set(scores.clip_scores(clip(0.5))) == {"sharpness", "saturation"}
    assert set(scores.clip_scores(clip(0.5, 0.6))) == {"sharpness", "saturation", "motion"}


def test_diversity_is_the_mean_distance_of_pairs():
    a, b, c = clip(0.0), clip(0.3), clip(0.9)  # distances 0.3, 0.9, 0.6
    assert scores.diversity([a, b, c]) == pytest.approx(60)
    assert scores.diversity([a, a]) == 0
    assert scores.diversity([a]) is None
    with pytest.raises(SkipError, match="one shape"):
        scores.diversity([a, clip(0.0, 0.0)])


def test_clips_are_compared_small():
    images = as_images((np.random.default_rng(0).random((2, 40, 30, 3)) * 255).astype(np.uint8))
    assert scores.small(images).shape == (2, 16, 16, 3)
    assert scores.as_array(images).max() <= 1


# --- a score of the user's own


@pytest.fixture
def module(monkeypatch):
    found = types.ModuleType("my_scores")
    monkeypatch.setitem(__import__("sys").modules, "my_scores", found)
    return found


def test_a_scorer_gives_a_number_for_each_clip_or_one_for_all(module):
    module.each = lambda clips, prompts: [float(len(clip)) for clip in clips]
    module.one = lambda clips, prompts: len(prompts)
    module.several = lambda clips, prompts: {"a": np.asarray([1.0, 2.0]), "b": 5}
    clips, prompts = [["frame"], ["frame", "frame", "frame"]], ["p", "q"]
    assert Scorer("my_scores:each")(clips, prompts) == {"each": 2.0}
    assert Scorer("my_scores:one")(clips, prompts) == {"one": 2.0}
    assert Scorer("my_scores:several")(clips, prompts) == {"a": 1.5, "b": 5.0}
    module.each.better = "lower"
    assert Scorer("my_scores:each").score("each").better == "lower"
    assert Scorer("my_scores:one").score("one").better == "higher"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_scores", "as module:function"),
        ("my_scores:", "as module:function"),
        ("no_such_module:f", "cannot import the scorer's module 'no_such_module'"),
        ("my_scores:missing", "has no function 'missing'"),
        ("my_scores:number", "has no function 'number'"),
        ("my_scores:best", "'higher' or 'lower'; got 'most'"),
    ],
)
def test_scorers_that_are_none(module, name, expected):
    module.number = 5
    module.best = lambda clips, prompts: 1.0
    module.best.better = "most"
    with pytest.raises(SkipError, match=expected):
        Scorer(name)


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("nan")], "good", None, [1.0, "x"], float("inf")])
def test_answers_that_are_no_scores(module, answer):
    module.f = lambda clips, prompts: answer
    with pytest.raises(SkipError, match=r"my_scores:f gave .*expected a number for every clip"):
        Scorer("my_scores:f")([["a"], ["b"]], ["p", "q"])
