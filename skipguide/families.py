"""Data only: the blocks of every supported model family, matched by class name.

Each entry is proven in the tests on a tiny random instance: block skip against the block replaced by an identity,
sublayer skips against zeroed output projections, attention identity against a reference written by hand.
"""

from __future__ import annotations

from skipguide.blocks import ModelSpec
from skipguide.families_image import IMAGE_JOINT_FAMILIES
from skipguide.families_image_single import IMAGE_SINGLE_FAMILIES
from skipguide.families_unet import UNET_FAMILIES
from skipguide.families_video import VIDEO_FAMILIES
from skipguide.families_vision import VISION_FAMILIES

FAMILIES: dict[str, ModelSpec] = {
    **VIDEO_FAMILIES,
    **IMAGE_JOINT_FAMILIES,
    **IMAGE_SINGLE_FAMILIES,
    **UNET_FAMILIES,
    **VISION_FAMILIES,
}
