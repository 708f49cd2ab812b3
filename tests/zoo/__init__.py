"""Tiny random models of every supported family, with reference edits that do not use skipguide."""

from zoo.family import BlockKind, Family, randomise, rows
from zoo.image_joint import IMAGE_JOINT
from zoo.image_single import IMAGE_SINGLE
from zoo.joint import JOINT
from zoo.one_stream import ONE_STREAM
from zoo.unet import UNETS
from zoo.unet_picture import UNET_PICTURES
from zoo.video_av import VIDEO_AUDIO
from zoo.video_cross import VIDEO_CROSS
from zoo.video_joint import VIDEO_JOINT
from zoo.video_wan import VIDEO_WAN

VIDEOS = VIDEO_WAN + VIDEO_CROSS + VIDEO_JOINT + VIDEO_AUDIO
IMAGES = IMAGE_JOINT + IMAGE_SINGLE
FAMILIES = ONE_STREAM + JOINT + VIDEOS + IMAGES + UNETS + UNET_PICTURES
BY_NAME = {family.name: family for family in FAMILIES}

__all__ = [
    "BY_NAME",
    "FAMILIES",
    "IMAGES",
    "IMAGE_JOINT",
    "JOINT",
    "ONE_STREAM",
    "UNETS",
    "UNET_PICTURES",
    "VIDEOS",
    "BlockKind",
    "Family",
    "randomise",
    "rows",
]
