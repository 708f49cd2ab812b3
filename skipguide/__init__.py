"""skipguide: leave layers out of residual networks, as one operation made first-class.

`import skipguide` loads torch and nothing heavier; drivers live in `skipguide.pipelines`, `skipguide.vision` and
`skipguide.llm`.
"""

from skipguide._version import __version__ as __version__
from skipguide.applied import applied_to, remove_from
from skipguide.blocks import Block, BlockMap, find_blocks, register_blocks
from skipguide.check import check
from skipguide.errors import LostGateError, NoEffectError, SkipError, UnknownBlockError
from skipguide.plan import SkipPlan
from skipguide.prefix import Prefix
from skipguide.schedule import Schedule, Timetable
from skipguide.skipper import Skipper, capture, resume
from skipguide.spec import BlockSpec, ModelSpec, Sublayer
from skipguide.stats import Stats

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
    "applied_to",
    "capture",
    "check",
    "find_blocks",
    "register_blocks",
    "remove_from",
    "resume",
]
