"""One thread: a guider keeps the state of one run at a time, as the pipeline's scheduler does."""

from __future__ import annotations

import sys
from threading import get_ident

from skipguide.errors import SkipError


def this_thread(running: int) -> int:
    """The thread that begins a step.

    Args:
        running: the thread whose run is not over; 0 if there is none.

    Raises:
        SkipError: if that is another one, and it is inside a pipeline of diffusers now.
    """
    me = get_ident()
    if running not in (0, me) and _is_inside_diffusers(running):
        raise SkipError(
            "two threads run the pipeline of this SkipGuider at once, and its scheduler and guider keep the state of "
            "one call at a time: give each thread a pipeline and a guider of its own, or wait"
        )
    return me


def _is_inside_diffusers(thread: int) -> bool:
    """Whether a thread runs code of diffusers: one whose run was interrupted does not."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "diffusers":
            return True
        frame = frame.f_back
    return False
