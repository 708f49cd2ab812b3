"""Everything that goes wrong here is a `SkipError`, and says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SkipError(ValueError):
    """A skip that cannot be done as asked. Nothing of the user's model was changed."""


class UnknownBlockError(SkipError):
    """The model has no block description; the message lists the candidates that were seen."""


class LostGateError(SkipError):
    """A gate was installed and something else replaced it: the skip would silently not happen."""


class NoEffectError(SkipError):
    """The skipped pass equals the plain pass: the skip did nothing."""


def no_such_name(package: str, name: str, public: Iterable[str]) -> AttributeError:
    """What a package raises for a name that it does not have, with those that look like it.

    Example:
        >>> str(no_such_name("skipguide", "skipplan", ["SkipPlan", "Skipper"]))
        "module 'skipguide' has no attribute 'skipplan': did you mean SkipPlan?"
    """
    by_small = {each.lower(): each for each in public}
    near = [by_small[each] for each in difflib.get_close_matches(name.lower(), by_small, n=2, cutoff=0.7)]
    guess = f": did you mean {' or '.join(near)}?" if near else ""
    return AttributeError(f"module {package!r} has no attribute {name!r}{guess}")
