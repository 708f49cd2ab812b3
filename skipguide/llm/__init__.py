"""Layer skipping in language models."""

from skipguide.llm.engine import AppliedSublayers
from skipguide.llm.families import SublayerMap, SublayerSite, sublayer_map
from skipguide.llm.passes import Pass
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.watch import Watch, watch

__all__ = [
    "AppliedSublayers",
    "Pass",
    "SublayerMap",
    "SublayerPlan",
    "SublayerSite",
    "Watch",
    "sublayer_map",
    "watch",
]
