"""torch.compile: whether this process has compiled anything, so that passes may have run in graphs, uncounted."""

from __future__ import annotations

import sys


def has_compiled() -> bool:
    """Whether dynamo has captured a frame."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and bool(utils.counters.get("frames"))
