"""Standing: the skippers whose gates stand on one denoiser, in the order in which they were put there."""

from __future__ import annotations

from collections.abc import Sequence

from skipguide.skipper import Skipper


class Standing:
    """Skippers that were installed together and go together.

    An interrupt may come between any two lines: what is being installed is noted first and forgotten last, so that
    `remove` takes away every one of them.
    """

    def __init__(self) -> None:
        self._installed: list[Skipper] = []
        self._paused: list[Skipper] = []

    def install(self, *skippers: Skipper) -> None:
        """Put the gates of these in place."""
        for skipper in skippers:
            self._installed.append(skipper)  # first: what was not installed can be removed too
            skipper.install()

    def remove(self, *skippers: Skipper) -> None:
        """Take these away; all of them, the last one first, where none is named."""
        for skipper in skippers:
            self._installed.remove(skipper)
            skipper.remove()
        while self._installed and not skippers:
            self._installed[-1].remove()
            self._installed.pop()

    def pause(self) -> None:
        """Take all gates away and keep the skippers: `reinstall` puts the same gates back."""
        while self._installed:
            skipper = self._installed[-1]
            skipper.remove()
            if skipper not in self._paused:
                self._paused.append(skipper)
            self._installed.pop()

    def reinstall(self, first: Sequence[Skipper]) -> None:
        """Put back what `pause` took away; these skippers, where it took none."""
        waiting, self._paused = self._paused[::-1] or list(first), []
        self.install(*waiting)

    def move_in_front(self) -> None:
        """Put the gates in front of what came since they were installed."""
        for skipper in self._installed:
            skipper.move_in_front()
