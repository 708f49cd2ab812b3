"""Skipping in vision models: gates, masks, tuning, nested and implicit networks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipguide.vision.floorplan import FloorPlanNet, GraphConv
    from skipguide.vision.layer_masking import LayerMask, masked_forward
    from skipguide.vision.skip_deq import SkipDEQ
    from skipguide.vision.skip_tuning import ClassSkip, SkipTuner, TuneConfig
    from skipguide.vision.skipnet import SkipNet, skipnet
    from skipguide.vision.unetpp import UNetPlusPlus

_HOME = {
    "ClassSkip": "skip_tuning",
    "SkipTuner": "skip_tuning",
    "TuneConfig": "skip_tuning",
    "FloorPlanNet": "floorplan",
    "GraphConv": "floorplan",
    "LayerMask": "layer_masking",
    "SkipDEQ": "skip_deq",
    "SkipNet": "skipnet",
    "UNetPlusPlus": "unetpp",
    "skipnet": "skipnet",
    "masked_forward": "layer_masking",
}
__all__ = [
    "ClassSkip",
    "FloorPlanNet",
    "GraphConv",
    "LayerMask",
    "SkipDEQ",
    "SkipNet",
    "SkipTuner",
    "TuneConfig",
    "UNetPlusPlus",
    "masked_forward",
    "skipnet",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"skipguide.vision.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ != "skipguide.vision":
    raise ImportError(
        f"this folder is the package skipguide.vision and was imported as {__name__!r}; "
        "write `import skipguide.vision` (a second name would load every module twice)"
    )
