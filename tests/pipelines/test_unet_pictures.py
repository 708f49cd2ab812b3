"""Skip guidance on the pipelines of Stable Diffusion, 1.5 to XL, against a reference by hand."""

import pytest
from helpers.unet_reference import check

from zoo.pipes_unet_picture import PICTURE_PIPES

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("case", PICTURE_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    check(case)
