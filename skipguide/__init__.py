"""skipguide: leave layers out of residual networks, as one operation made first-class.

`import skipguide` loads torch and nothing heavier; drivers live in `skipguide.pipelines`, `skipguide.vision` and
`skipguide.llm`.
"""

from typing import TYPE_CHECKING, NoReturn

from skipguide._version import __version__ as __version__
from skipguide.applied import applied_to, remove_from
from skipguide.blocks import Block, BlockMap, find_blocks, register_blocks
from skipguide.check import check
from skipguide.errors import LostGateError, NoEffectError, SkipError, UnknownBlockError, no_such_name
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

# What lies in packages of its own, each with libraries that the core does without: they are imported by name.
_PACKAGES = {
    "pipelines": "guidance in diffusers pipelines",
    "llm": "language models",
    "vision": "the six vision systems",
}

if not TYPE_CHECKING:  # a checker finds a name that is not there by itself

    def __getattr__(name: str) -> NoReturn:
        if name in _PACKAGES:
            raise AttributeError(f"skipguide.{name} is not imported yet: write `import skipguide.{name}`")
        error = no_such_name(__name__, name, __all__)
        if not str(error).endswith("?") and not name.startswith("_"):
            where = ", ".join(f"skipguide.{package} ({what})" for package, what in _PACKAGES.items())
            raise AttributeError(f"{error}; there are also {where}")
        raise error
