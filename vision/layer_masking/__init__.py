"""Layer masking: leave out a region of the image in every layer (arXiv 2211.14646), and explain with it."""

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

__all__ = ["BASELINES", "FILLS", "AppliedMask", "LayerMask", "MaskStats", "MaskedForward", "mask_of", "masked_forward"]
