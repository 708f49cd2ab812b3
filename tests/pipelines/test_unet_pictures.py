"""Skip guidance on the pipelines of Stable Diffusion, 1.5 to XL, against a reference by hand."""

import pytest
from helpers.unet_reference import check, each

from zoo.pipes_unet_picture import PICTURE_PIPES

pytestmark = pytest.mark.numerics


@each(PICTURE_PIPES, ("sd", "sd_inpaint_masked", "sdxl", "lcm"))
def test_guided_pipeline_equals_the_reference(case):
    check(case)
