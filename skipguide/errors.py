"""Everything that goes wrong here is a `SkipError`, and says what was expected, what came and what to do."""

from __future__ import annotations


class SkipError(ValueError):
    """A skip that cannot be done as asked. Nothing of the user's model was changed."""


class UnknownBlockError(SkipError):
    """The model has no block description; the message lists the candidates that were seen."""


class LostGateError(SkipError):
    """A gate was installed and something else replaced it: the skip would silently not happen."""


class NoEffectError(SkipError):
    """The skipped pass equals the plain pass: the skip did nothing."""
