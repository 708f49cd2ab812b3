"""Layer masking: leave out a region of the image in every layer (arXiv 2211.14646), and explain with it."""

from skipguide.vision.layer_masking.attribution import SENTINEL, lime, lime_classifier, occlusion, rise, spread
from skipguide.vision.layer_masking.baselines import BASELINES
from skipguide.vision.layer_masking.layer_mask import (
    FILLS,
    AppliedMask,
    LayerMask,
    MaskedForward,
    MaskStats,
    mask_of,
    masked_forward,
)
from skipguide.vision.layer_masking.mask_batches import many_masks
from skipguide.vision.layer_masking.segments import grid_segments, segment_masks, slic_segments

__all__ = [
    "BASELINES",
    "FILLS",
    "SENTINEL",
    "AppliedMask",
    "LayerMask",
    "MaskStats",
    "MaskedForward",
    "grid_segments",
    "lime",
    "lime_classifier",
    "many_masks",
    "mask_of",
    "masked_forward",
    "occlusion",
    "rise",
    "segment_masks",
    "slic_segments",
    "spread",
]
