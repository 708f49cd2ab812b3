"""Checks that resumed passes give what the model itself gives."""

from __future__ import annotations

import torch

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.precision import autocast
from skipguide.vision.skip_tuning.prefixes import ImagePrefixes
from skipguide.vision.skip_tuning.step import TextPrefix
from skipguide.vision.skip_tuning.trainable_classifier import TrainableClassifier


@torch.no_grad()
def check_exact(tuner: TrainableClassifier, prefixes: ImagePrefixes, texts: TextPrefix) -> float:
    """Compare the resumed passes with the model's own on two images and two texts.

    Returns:
        The largest difference relative to the features.

    Raises:
        SkipError: if a resumed pass is not what the model computes.
    """
    worst = 0.0
    tokens, where = tuner.tokens()
    some = sorted({0, min(1, len(prefixes.examples) - 1)})
    pixels = torch.stack([prefixes.pixels(i, 0) for i in some]).to(tuner.device)
    wide = torch.zeros(len(some), dtype=torch.long, device=tuner.device)
    own = next(tuner.pretrained.parameters()).dtype
    compute = prefixes.compute if own == torch.float32 else own
    low = compute != torch.float32
    hidden = tuner.towers.image.prefix(tuner.cast(pixels), tuner.image_layer)
    pairs = [
        (
            tuner.towers.image.full,
            tuner.cast(pixels),
            tuner.towers.image.suffix(hidden.float(), wide, tuner.image_layer),
        ),
        (tuner.towers.text.full, tokens[:2], tuner.towers.text.suffix(texts.hidden[:2], where[:2], tuner.text_layer)),
    ]
    for full, inputs, resumed in pairs:
        with autocast(tuner.device, compute):
            whole = full(inputs).float()
        error = ((resumed.float() - whole).abs().max() / whole.abs().max().clamp(min=1e-12)).item()
        worst = max(worst, error)
        if not error <= (5e-2 if low else 1e-3):
            raise SkipError(
                f"expected the resumed pass to equal the model's own; they differ by {error:.2g} of the features: "
                "the model's forward does something that its towers do not describe"
            )
    return worst
