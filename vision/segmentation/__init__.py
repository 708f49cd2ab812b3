"""Segmentation, for UNet++ and floor plans: losses, measures over a whole data set, and images larger than memory.

Example:
    >>> import torch
    >>> logits, target = torch.full((1, 1, 4, 4), 50.0), torch.ones(1, 1, 4, 4)
    >>> meter = MaskMeter(1)
    >>> meter.update(logits, target)
    >>> meter.iou.item(), round(bce_dice_loss(logits, target).item(), 6)
    (1.0, 0.0)
"""

from skipguide.vision.segmentation.losses import bce_dice_loss, deep_supervision_loss
from skipguide.vision.segmentation.meters import ClassMeter, MaskMeter
from skipguide.vision.segmentation.pictures import inside_of, overlay
from skipguide.vision.segmentation.tiles import predict_tiled

__all__ = [
    "ClassMeter",
    "MaskMeter",
    "bce_dice_loss",
    "deep_supervision_loss",
    "inside_of",
    "overlay",
    "predict_tiled",
]
