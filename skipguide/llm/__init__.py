"""Layer skipping in language models.

- `AdaSkip`: leave out what a model hardly uses, measured on the first prompt or beforehand.
- `MeasuredSkip`: the same by a search for what raises the loss least.
- `UnifiedSkip`: whole layers by a target speed-up.
- `SelfSpeculative`: the skipped model drafts, the whole one verifies: the same tokens, sooner.
- `SublayerPlan`, `sublayer_map`, `watch`: choose sublayers by hand, list them, look at the stream between them.

`help(skipguide.llm.AdaSkip)` and the like have the arguments, errors and an example.
"""

from typing import TYPE_CHECKING, NoReturn

from skipguide.errors import no_such_name
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

if not TYPE_CHECKING:  # a checker finds a name that is not there by itself

    def __getattr__(name: str) -> NoReturn:
        raise no_such_name(__name__, name, __all__)
