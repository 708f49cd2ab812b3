"""What a run needs beside its settings and cannot be written as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class RunOptions:
    """Places and objects that a run needs beside its settings.

    Attributes:
        cache_dir: folder of caches on disk.
        cache_refresh: compute a cache on disk anew.
        checkpoint_dir: folder of the checkpoint; None keeps none.
        accelerator: an `accelerate.Accelerator`; None makes one if several processes were launched.
        progress: show progress bars.
        transform: augments one image (PIL, or prepared pixels) before it is prepared; drawn anew for every view.
    """

    cache_dir: str | Path | None = None
    cache_refresh: bool = False
    checkpoint_dir: str | Path | None = None
    accelerator: Any = None
    progress: bool = True
    transform: Callable[[Any], Any] | None = None
