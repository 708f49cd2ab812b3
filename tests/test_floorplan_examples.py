"""The modules of floor plans have examples that run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["", ".graph", ".net", ".regions", ".msd", ".generate"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"skipguide.vision.floorplan{name}"))
    assert result.attempted
    assert not result.failed
