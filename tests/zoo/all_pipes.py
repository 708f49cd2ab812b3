"""How to make every tested pipeline, so that a described one without a test is noticed."""

from zoo.pipes import PIPES
from zoo.pipes_control import CONTROL_PIPES
from zoo.pipes_image import IMAGE_PIPES
from zoo.pipes_unet import UNET_PIPES
from zoo.pipes_unet_added_keys import ADDED_KEYS_PIPES
from zoo.pipes_unet_control import UNET_CONTROL_PIPES
from zoo.pipes_unet_picture import PICTURE_PIPES
from zoo.pipes_video import VIDEO_PIPES

UNET_CASES = (*PICTURE_PIPES, *ADDED_KEYS_PIPES, *UNET_CONTROL_PIPES)
CASES = (*PIPES, *IMAGE_PIPES, *VIDEO_PIPES, *CONTROL_PIPES, *UNET_CASES)
MAKERS = [case.build for case in CASES] + [case.make for case in UNET_PIPES]
