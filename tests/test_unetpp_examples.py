"""UNet++ and segmentation have examples that run."""

import doctest

import pytest

import skipguide.vision.segmentation as segmentation
import skipguide.vision.unetpp as unetpp


@pytest.mark.parametrize("module", [unetpp, segmentation], ids=lambda m: m.__name__)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
