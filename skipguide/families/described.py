"""Data only: the blocks of every supported model family, matched by class name.

Each entry is proven in the tests on a tiny random instance: block skip against the block replaced by an identity,
sublayer skips against zeroed output projections, attention identity against a reference written by hand.
"""

from __future__ import annotations

from skipguide.families.image import IMAGE_JOINT_FAMILIES
from skipguide.families.image_single import IMAGE_SINGLE_FAMILIES
from skipguide.families.unet import UNET_FAMILIES
from skipguide.families.video import VIDEO_FAMILIES
from skipguide.families.vision import VISION_FAMILIES
from skipguide.spec import ModelSpec

FAMILIES: dict[str, ModelSpec] = {
    **VIDEO_FAMILIES,
    **IMAGE_JOINT_FAMILIES,
    **IMAGE_SINGLE_FAMILIES,
    **UNET_FAMILIES,
    **VISION_FAMILIES,
}
