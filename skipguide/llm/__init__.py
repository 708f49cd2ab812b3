"""Layer skipping in language models."""

from skipguide.llm.adaskip import AdaSkip
from skipguide.llm.applied import AppliedSublayers
from skipguide.llm.find import sublayer_map
from skipguide.llm.measured_skip import MeasuredSkip
from skipguide.llm.passes import Pass
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.similarity import SublayerStats
from skipguide.llm.skip_order import SkipOrder
from skipguide.llm.speculative.self_speculative import SelfSpeculative
from skipguide.llm.speculative.stats import SpeculationStats
from skipguide.llm.sublayers import SublayerMap, SublayerSite
from skipguide.llm.unified import UnifiedSkip, unified_layers
from skipguide.llm.watch import Watch, watch

__all__ = [
    "AdaSkip",
    "AppliedSublayers",
    "MeasuredSkip",
    "Pass",
    "SelfSpeculative",
    "SkipOrder",
    "SpeculationStats",
    "SublayerMap",
    "SublayerPlan",
    "SublayerSite",
    "SublayerStats",
    "UnifiedSkip",
    "Watch",
    "sublayer_map",
    "unified_layers",
    "watch",
]
