"""Tiny stock pipelines around the zoo's further video transformers."""

from zoo.pipes_video_av import AUDIO_PIPES
from zoo.pipes_video_cross import CROSS_PIPES
from zoo.pipes_video_joint import JOINT_PIPES
from zoo.pipes_video_wan import WAN_PIPES
from zoo.video_case import MODELS

VIDEO_PIPES = WAN_PIPES + JOINT_PIPES + CROSS_PIPES + AUDIO_PIPES
BY_VIDEO = {case.name: case for case in VIDEO_PIPES}

__all__ = ["BY_VIDEO", "MODELS", "VIDEO_PIPES"]
