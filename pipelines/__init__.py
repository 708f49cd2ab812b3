"""Guidance inside stock diffusers pipelines.

- `SpatiotemporalSkipGuidance`: guide a model with its own skipped layers (`SkipGroup`: several ways at once).
- `SkipGuider`, `Guide`: the same as a guider of diffusers, and diffusers' guiders on classic pipelines.
- `PrefixReuse`: the pipeline's own STG, SLG or PAG, with the same result from fewer blocks.
- `TangentialAmplifyingGuidance`, `NormalizedAttentionGuidance`: guidance without a further pass, and without CFG.
- `bundled_pipeline`: a toy model to try all this on. `find_preset`, `calibrate`: which layers to take.

`help(skipguide.pipelines.SpatiotemporalSkipGuidance)` and the like have the arguments, errors and an example.
"""

from typing import TYPE_CHECKING, Any

from skipguide.errors import no_such_name
from skipguide.pipelines.applied import AppliedGuidance
from skipguide.pipelines.bundled import bundled_pipeline
from skipguide.pipelines.calibration import calibrate
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.guide.applied import AppliedGuide
from skipguide.pipelines.guide.guide import Guide
from skipguide.pipelines.nag.nag import AppliedNag, NormalizedAttentionGuidance
from skipguide.pipelines.native.prefix_reuse import AppliedReuse, PrefixReuse
from skipguide.pipelines.native.stats import ReuseStats
from skipguide.pipelines.pass_schedule import PassSchedule, PassStep
from skipguide.pipelines.presets import Preset, find_preset
from skipguide.pipelines.registry.described import register_pipeline
from skipguide.pipelines.registry.spec import PipelineSpec
from skipguide.pipelines.sampling.ledger import GuidanceCost, GuidanceStats
from skipguide.pipelines.stg import SpatiotemporalSkipGuidance
from skipguide.pipelines.tangential import AppliedTangential, TangentialAmplifyingGuidance
from skipguide.pipelines.tuning.tune import TunedSchedule, tune

if TYPE_CHECKING:
    from skipguide.pipelines.guider.skip_guider import SkipGuider

__all__ = [
    "AppliedGuidance",
    "AppliedGuide",
    "AppliedNag",
    "AppliedReuse",
    "AppliedTangential",
    "GuidanceCost",
    "GuidanceStats",
    "Guide",
    "NormalizedAttentionGuidance",
    "PassSchedule",
    "PassStep",
    "PipelineSpec",
    "PrefixReuse",
    "Preset",
    "ReuseStats",
    "SkipGroup",
    "SkipGuider",
    "SpatiotemporalSkipGuidance",
    "TangentialAmplifyingGuidance",
    "TunedSchedule",
    "bundled_pipeline",
    "calibrate",
    "find_preset",
    "register_pipeline",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "SkipGuider":  # a class of diffusers, which everything else here does without
        from skipguide.pipelines.guider.skip_guider import SkipGuider

        return SkipGuider
    raise no_such_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return __all__


if __name__ != "skipguide.pipelines":
    raise ImportError(
        f"this folder is the package skipguide.pipelines and was imported as {__name__!r}; "
        "write `import skipguide.pipelines` (a second name would load every module twice)"
    )
