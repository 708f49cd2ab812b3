"""Skip guidance on UNets with a ControlNet, a T2I-Adapter or an IP-Adapter, against a reference by hand."""

import pytest
from helpers.unet_reference import check

from zoo.pipes_unet_control import UNET_CONTROL_PIPES

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("case", UNET_CONTROL_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    check(case)
