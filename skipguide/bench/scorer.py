"""Scorers of the user's own: `--scorer module:function`."""

from __future__ import annotations

import math
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skipguide.bench.intervals import Better
from skipguide.bench.scores import Score
from skipguide.config import number
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image

Function = Callable[[list[list["Image"]], list[str]], Any]
EXPECTED = (
    "a number for every clip, or one number for all of them, or a mapping of names to either, from "
    "function(clips, prompts), where a clip is a list of Pillow images"
)


class Scorer:
    """A function of the user's that scores clips.

    It is called once per setting and seed, `function(clips, prompts)`, with the clips as lists of Pillow images, and
    returns a number for each clip, or one number for all of them (a Fréchet distance), or a mapping of names to either.
    The function's attribute `better` may say `"lower"`; higher is better otherwise.

    Args:
        name: `module:function`; the current folder is looked at too, as with `python -m`.

    Raises:
        SkipError: for a module or function that is not there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module, colon, attribute = name.partition(":")
        if not (module and colon and attribute):
            raise SkipError(f"expected --scorer as module:function, such as my_scores:clip_score; got {name!r}")
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)
        try:
            found: Any = pkgutil.resolve_name(name)
        except (ImportError, ValueError) as error:
            raise SkipError(f"cannot import the scorer's module {module!r}: {error}") from error
        except AttributeError:
            found = None
        if not callable(found):
            raise SkipError(f"the module {module!r} has no function {attribute!r} to score with")
        self.function: Function = found
        self.better: Better = getattr(self.function, "better", "higher")
        if self.better not in ("higher", "lower"):
            raise SkipError(f"{name}.better says which scores are better, 'higher' or 'lower'; got {self.better!r}")

    def __call__(self, clips: list[list[Image]], prompts: list[str]) -> dict[str, float]:
        """The mean score, by name.

        Raises:
            SkipError: for anything but finite numbers.
        """
        found = self.function(clips, list(prompts))
        own = self.name.partition(":")[2]
        if not isinstance(found, Mapping):
            found = {own: found}
        return {str(name): self._mean(value, len(clips)) for name, value in found.items()}

    def _mean(self, found: Any, count: int) -> float:
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, Sequence) or isinstance(values, str):
            values = [values]
        elif len(values) != count:
            raise SkipError(f"{self.name} gave {len(values)} scores for {count} clips; expected {EXPECTED}")
        numbers = [number(value) for value in values]
        if any(value is None or not math.isfinite(value) for value in numbers):
            raise SkipError(f"{self.name} gave {found!r}; expected {EXPECTED}")
        return sum(float(value) for value in numbers if value is not None) / len(numbers)

    def score(self, name: str) -> Score:
        """What is known of one of its scores."""
        return Score(name, f"the user's own score, {self.name}", self.better)
