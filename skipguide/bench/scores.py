"""Scores of clips that need no other model: pure functions on pixels, and what is known of each score.

A clip is `[T, H, W, 3]` floats in 0 to 1, a picture one of a single frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from skipguide.bench.intervals import Better
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SIDE = 16  # pixels: clips are compared with each other at this size


@dataclass(frozen=True)
class Score:
    """What is known of a score.

    Attributes:
        name: of its columns.
        what: in words, for the report.
        better: which direction is better; None where neither is by itself.
        over: what its pairs are over: `"seeds"`, or `"prompts"` for a score that needs all seeds of a prompt.
    """

    name: str
    what: str
    better: Better | None = None
    over: str = "seeds"


CONSISTENCY, MARGIN, DIVERSITY = "self-consistency error", "prompt margin", "diversity"
SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score(
            CONSISTENCY,
            "the finished clip is noised again and the model takes one step back without CFG: how far that is off, "
            "relative to the step. No other model is needed; but a model is no judge of its own faults, flat pictures "
            "are easy for it, and it prefers less CFG than people do",
            "lower",
        ),
        Score(
            MARGIN,
            "how much larger that error is without the prompt: whether the model sees its prompt in the clip. It falls "
            "again where too much CFG makes clips that the model does not know",
            "higher",
        ),
        Score("sharpness", "variance of the Laplacian of the luma, times 1000; noise counts as sharp too"),
        Score("saturation", "mean spread of the colour channels, 0 to 1; too much CFG shows here first"),
        Score("motion", "mean change of a pixel from frame to frame, times 100"),
        Score(
            "flicker",
            "mean second difference over time, times 100: change that does not go on; look at it beside motion",
        ),
        Score(
            DIVERSITY,
            "mean distance of the clips of one prompt from each other, at 16 pixels, times 100: guidance that is too "
            "strong makes them alike",
            over="prompts",
        ),
    )
}


def as_array(images: Sequence[Image]) -> Any:
    """`[T, H, W, 3]` float32 in 0 to 1 of a clip's frames."""
    import numpy as np

    return np.stack([np.asarray(image.convert("RGB")) for image in images]).astype(np.float32) / 255


def sharpness(clip: Any) -> float:
    """Variance of the Laplacian of the luma, averaged over frames, times 1000.

    Raises:
        SkipError: for frames of less than three pixels a side.
    """
    import numpy as np

    luma = clip @ np.asarray(LUMA, np.float32)
    if min(luma.shape[1:]) < 3:
        raise SkipError(f"expected frames of at least 3 pixels a side; got {luma.shape[2]}x{luma.shape[1]}")
    middle = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return 1000 * float((around - 4 * middle).var(axis=(1, 2)).mean())


def saturation(clip: Any) -> float:
    """Mean spread of the colour channels."""
    return float((clip.max(-1) - clip.min(-1)).mean())


def motion(clip: Any) -> float | None:
    """Mean absolute change from frame to frame, times 100; None for a picture."""
    import numpy as np

    return 100 * float(np.abs(np.diff(clip, axis=0)).mean()) if len(clip) > 1 else None


def flicker(clip: Any) -> float | None:
    """Mean absolute second difference over time, times 100; None for less than three frames."""
    import numpy as np

    return 100 * float(np.abs(np.diff(clip, n=2, axis=0)).mean()) if len(clip) > 2 else None


OF_PIXELS: dict[str, Callable[[Any], float | None]] = {
    "sharpness": sharpness,
    "saturation": saturation,
    "motion": motion,
    "flicker": flicker,
}


def clip_scores(clip: Any) -> dict[str, float]:
    """Every score of one clip's pixels that it can have."""
    found = {name: score(clip) for name, score in OF_PIXELS.items()}
    return {name: value for name, value in found.items() if value is not None}


def small(images: Sequence[Image]) -> Any:
    """The frames at a few pixels, which is how clips are compared with each other."""
    from PIL import Image

    return as_array([image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images])


def diversity(clips: Sequence[Any]) -> float | None:
    """Mean distance (root of the mean square, times 100) of clips of one prompt; None for less than two.

    Raises:
        SkipError: for clips of different shapes.
    """
    if len(clips) < 2:
        return None
    if len({clip.shape for clip in clips}) > 1:
        raise SkipError(f"expected clips of one shape; got {sorted({clip.shape for clip in clips})}")
    distances = [float(((a - b) ** 2).mean() ** 0.5) for a, b in combinations(clips, 2)]
    return 100 * sum(distances) / len(distances)
