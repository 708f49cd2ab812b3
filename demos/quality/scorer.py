"""The judge of this study as scorers for `skipguide bench --scorer`: what README's table counts, on the bundled model.

    skipguide bench tiny-t2v --scorer demos.quality.scorer:frechet --prompts captions.txt --grid 1.5 2 3 4 6 \\
        --steps 12 --seeds 6 -o runs/bench        # the full form: about four processor hours
    python -m demos.quality.scorer > captions.txt # the study's 96 captions

Against the study: single clips in float32 instead of batches in bfloat16, other noise, one clip per caption and seed
instead of two (so that distances are larger: fewer clips per set), diversity in pixels instead of features, and the
baseline's CFG scale beside skip guidance as it was found instead of 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from demos.bundled_model.autoencoder import FRAMES
from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import ATTRIBUTES, ClipSpec, all_specs, caption, render
from demos.quality import measures
from demos.quality.sampling import prompts as study_prompts
from demos.quality.work import REAL_EACH
from skipguide.bench.scores import as_array
from skipguide.errors import SkipError


@cache
def _judge() -> AttributeClassifier:
    return AttributeClassifier.load()


@cache
def _by_caption() -> dict[str, ClipSpec]:
    return {caption(spec): spec for spec in all_specs()}


def _specs(prompts: Sequence[str]) -> list[ClipSpec]:
    known = _by_caption()
    if strange := [prompt for prompt in prompts if prompt not in known]:
        raise SkipError(
            f"{strange[0]!r} is no caption of the bundled model's clips: expected words such as {next(iter(known))!r}"
        )
    return [known[prompt] for prompt in prompts]


def _pixels(clips: Sequence[Any]) -> Tensor:
    """Clips as the classifier takes them, [N, 17, 3, 64, 64]."""
    return torch.stack([torch.from_numpy(as_array(clip)).permute(0, 3, 1, 2) for clip in clips])


@cache
def _real(prompts: tuple[str, ...]) -> Tensor:
    """Features of real clips of these captions, as many of each as the study has."""
    specs = [spec for spec in _specs(prompts) for _ in range(REAL_EACH)]
    with torch.no_grad():
        pieces = [render(specs[at : at + 32], 810_000 + at, FRAMES) for at in range(0, len(specs), 32)]
        return torch.cat([_judge().features(piece) for piece in pieces])


def right(clips: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Whether the classifier reads all five attributes of each clip as its caption says."""
    found = measures.read(_judge(), _pixels(clips), _specs(prompts))
    return torch.stack([found[f"right_{name}"] for name in ATTRIBUTES]).all(0).float().tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def frechet(clips: Sequence[Any], prompts: Sequence[str]) -> float:
    """Fréchet distance to real clips of the same captions, in the classifier's features: one number for a seed."""
    return measures.frechet(_judge().features(_pixels(clips)), _real(tuple(prompts)))


frechet.better = "lower"  # type: ignore[attr-defined]


if __name__ == "__main__":
    print("\n".join(caption(spec) for spec in study_prompts(96, 1)))
