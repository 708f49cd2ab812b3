"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import skipguide


def modules():
    found = (module.name for module in pkgutil.walk_packages(skipguide.__path__, "skipguide."))
    return ["skipguide", *sorted(name for name in found if not name.startswith(("skipguide.cli", "skipguide.assets")))]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    torch.manual_seed(0)
    done = doctest.testmod(module, extraglobs={"torch": torch, **vars(skipguide)}, optionflags=flags)
    assert done.failed == 0


def test_the_core_and_the_nets_have_examples():
    floorplan = ("", ".graph", ".net", ".regions", ".msd", ".generate")
    nets = (
        "unetpp.network",
        "segmentation",
        "skip_deq.network",
        "fixed_point",
        *(f"floorplan{name}" for name in floorplan),
    )
    found = doctest.DocTestFinder(exclude_empty=True)
    for name in ("blocks", "plan", "skipper", "check", *(f"vision.{net}" for net in nets)):
        tests = found.find(importlib.import_module(f"skipguide.{name}"))
        assert any(test.examples for test in tests), name
