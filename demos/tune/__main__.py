"""Schedules that are searched against `frugal`, fewer steps, strides and caches, at equal blocks that ran.

python -m demos.tune [--quick] [--force]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demos import study
from demos.tune.report import figure, text
from demos.tune.settings import ways
from demos.tune.work import Plan, compute

HOME = Path(__file__).parent
FULL, QUICK = Plan(prompts=256), Plan(prompts=12, real=2, calls=1, steps=4)


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    """All ways."""
    return compute(plan, ways(), folder)


if __name__ == "__main__":
    study.main(__doc__, HOME, (FULL, QUICK), run, text, figure)
