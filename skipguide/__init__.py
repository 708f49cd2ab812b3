"""skipguide: leave layers out of residual networks, as one operation made first-class.

`import skipguide` loads torch and nothing heavier; drivers live in `skipguide.pipelines`, `skipguide.vision` and
`skipguide.llm`.
"""

from skipguide.blocks import Block, BlockMap, BlockSpec, ModelSpec, Sublayer, find_blocks, register_blocks
from skipguide.check import check
from skipguide.errors import LostGateError, NoEffectError, SkipError, UnknownBlockError
from skipguide.plan import Schedule, SkipPlan
from skipguide.resume import Prefix, capture, resume
from skipguide.skipper import Skipper
from skipguide.stats import Stats
from skipguide.timetable import Timetable

__version__ = "0.1.0"

__all__ = [
    "Block",
    "BlockMap",
    "BlockSpec",
    "LostGateError",
    "ModelSpec",
    "NoEffectError",
    "Prefix",
    "Schedule",
    "SkipError",
    "SkipPlan",
    "Skipper",
    "Stats",
    "Sublayer",
    "Timetable",
    "UnknownBlockError",
    "capture",
    "check",
    "find_blocks",
    "register_blocks",
    "resume",
]
