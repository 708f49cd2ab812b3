"""Guidance inside stock diffusers pipelines."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipguide.pipelines.applied import AppliedGuidance
    from skipguide.pipelines.calibration import calibrate
    from skipguide.pipelines.groups import SkipGroup
    from skipguide.pipelines.guider import SkipGuider
    from skipguide.pipelines.ledger import GuidanceCost, GuidanceStats
    from skipguide.pipelines.pipeline_spec import PipelineSpec
    from skipguide.pipelines.presets import Preset, find_preset
    from skipguide.pipelines.registry import register_pipeline
    from skipguide.pipelines.stg import SpatiotemporalSkipGuidance

_HOME = {
    "AppliedGuidance": "applied",
    "GuidanceCost": "ledger",
    "GuidanceStats": "ledger",
    "PipelineSpec": "pipeline_spec",
    "Preset": "presets",
    "SkipGroup": "groups",
    "SkipGuider": "guider",
    "SpatiotemporalSkipGuidance": "stg",
    "calibrate": "calibration",
    "find_preset": "presets",
    "register_pipeline": "registry",
}
__all__ = [
    "AppliedGuidance",
    "GuidanceCost",
    "GuidanceStats",
    "PipelineSpec",
    "Preset",
    "SkipGroup",
    "SkipGuider",
    "SpatiotemporalSkipGuidance",
    "calibrate",
    "find_preset",
    "register_pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"skipguide.pipelines.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ != "skipguide.pipelines":
    raise ImportError(
        f"this folder is the package skipguide.pipelines and was imported as {__name__!r}; "
        "write `import skipguide.pipelines` (a second name would load every module twice)"
    )
