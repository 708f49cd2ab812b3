"""The study's judge as a scorer of `skipguide bench`: real clips are right and near, noise and other words are not."""

import pytest
import torch

from demos.bundled_model.clips import caption, render
from demos.quality import scorer
from demos.quality.sampling import prompts
from skipguide import SkipError
from skipguide.bench.scorer import Scorer
from skipguide.media.frames import as_images


@pytest.fixture(scope="module")
def real():
    specs = prompts(6, 1)
    return [as_images(clip) for clip in render(specs, 5)], [caption(spec) for spec in specs]


def test_real_clips_are_right_and_near(real):
    clips, captions = real
    noise = [as_images(torch.rand(16, 3, 64, 64)) for _ in clips]
    right, frechet = Scorer("demos.quality.scorer:right"), Scorer("demos.quality.scorer:frechet")
    assert (right.better, frechet.better) == ("higher", "lower")
    assert right(clips, captions)["right"] > 0.8
    assert right(clips, captions[::-1])["right"] < 0.2, "other captions than the clips'"
    assert frechet(clips, captions)["frechet"] < 0.5 * frechet(noise, captions)["frechet"]


def test_other_words_are_refused(real):
    with pytest.raises(SkipError, match=r"'a tram' is no caption of the bundled model's clips"):
        scorer.right(real[0], ["a tram"] * len(real[0]))
