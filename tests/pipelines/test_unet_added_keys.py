"""Skip guidance on Kandinsky 2 and DeepFloyd IF, whose predictions have variances, against a reference by hand."""

import pytest
from helpers.unet_reference import check

from zoo.pipes_unet_added_keys import ADDED_KEYS_PIPES

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("case", ADDED_KEYS_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    check(case)
