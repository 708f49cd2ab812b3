"""torch.compile: what an older torch cannot trace, and whether this process has compiled anything, uncounted."""

from __future__ import annotations

import sys

import torch

# Before torch 2.14 dynamo cannot read a ContextVar, which says what plans hold, and guard on it.
TRACES_PLANS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
NEEDS_TORCH = (
    f"skipguide needs torch 2.14 or newer to be part of a compiled graph (here {torch.__version__}): with older ones "
    f"the gated part of a compiled model runs uncompiled, and fullgraph=True is not possible"
)


def has_compiled() -> bool:
    """Whether dynamo has captured a frame."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and bool(utils.counters.get("frames"))
