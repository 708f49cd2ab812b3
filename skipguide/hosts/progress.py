"""Progress bars, which tqdm draws: at once where somebody looks, and seldom where the output is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any


def is_watched() -> bool:
    """Whether somebody sees a bar move: a terminal, or a notebook. A file, a pipe, a log keep every drawing of it."""
    stream = sys.stderr
    return "ipykernel" in sys.modules or (stream is not None and stream.isatty())


def pace() -> dict[str, Any]:
    """How often tqdm draws: its settings, also for the bars that pipelines of diffusers make.

    Where nobody looks there is nothing for what is done in ten seconds, and a drawing every ten seconds for the rest.
    """
    return {} if is_watched() else {"delay": 2, "mininterval": 10}


def progress_bar(
    items: Iterable[Any] | None = None, what: str = "", *, show: bool = True, leave: bool = False, **more: Any
) -> Any:
    """A bar over `items`, or one of `total=N` that is told by `update()`.

    Args:
        items: what is gone through; None for a bar that is updated by hand.
        what: the text before it.
        show: False for no bar.
        leave: whether it stays when it is full.
        more: of tqdm: `total`, `unit`, `initial`.

    Example:
        >>> [square for square in (n * n for n in progress_bar(range(3), "squares", show=False))]
        [0, 1, 4]
    """
    from tqdm.auto import tqdm

    # Only what is to be said: what is not, tqdm takes from the environment, TQDM_DISABLE for one.
    hidden: dict[str, Any] = {} if show else {"disable": True}
    return tqdm(items, desc=what or None, leave=leave, **hidden, **pace(), **more)


def say(bar: Any, words: str) -> None:
    """Say behind a bar what it is at. Where nobody looks this waits for the next drawing instead of causing one."""
    bar.set_postfix_str(words, refresh=is_watched())
