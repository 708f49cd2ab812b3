"""Acceptance: how long to draft, and whether to draft at all, from what this request showed so far.

Everything here is decided on the host from counts and seconds, and nothing of it changes what the full model accepts:
it is about speed alone.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


def tokens_per_round(acceptance: float, length: int) -> float:
    """Mean number of tokens that one round of `length` drafted tokens yields, each accepted with `acceptance`.

    Source: arXiv 2211.17192, equation 1.

    Example:
        >>> round(tokens_per_round(0.9, 3), 3), tokens_per_round(1.0, 3)
        (3.439, 4.0)
    """
    if acceptance >= 1:
        return float(length + 1)
    return (1 - acceptance ** (length + 1)) / (1 - acceptance)


def speedup(acceptance: float, length: int, draft_cost: float, verify_cost: float = 1.05) -> float:
    """Analytic speed-up over plain decoding.

    Args:
        acceptance: probability that a drafted token is accepted, given that those before it were.
        length: drafted tokens per round.
        draft_cost: seconds of drafting one token over seconds of a plain step.
        verify_cost: seconds of verifying a draft over seconds of a plain step.

    Example:
        >>> round(speedup(0.9, 3, 0.5), 2), round(speedup(0.95, 3, 0.4), 2)
        (1.35, 1.65)
    """
    return tokens_per_round(acceptance, length) / (length * draft_cost + verify_cost)


def best_length(acceptance: float, draft_cost: float, verify_cost: float = 1.05, limit: int = 16) -> tuple[int, float]:
    """The draft length with the highest analytic speed-up, and that speed-up.

    Example:
        >>> length, gain = best_length(0.9, 0.5)
        >>> length, round(gain, 2)
        (3, 1.35)
    """
    return max(
        ((length, speedup(acceptance, length, draft_cost, verify_cost)) for length in range(1, limit + 1)),
        key=lambda found: found[1],
    )


EDGES = (0.2, 0.4, 0.6, 0.8, 0.95)


@dataclass
class Calibration:
    """What a drafter's confidence is worth: the share of drafts accepted, by its largest probability.

    A confidence is no promise: a drafter can be unsure and always agree with the full model, or the reverse. So the
    exit goes by what was accepted at this confidence before, from a mild prior.

    Example:
        >>> seen = Calibration()
        >>> for _ in range(8): seen.enter(0.1, accepted=True)
        >>> seen.chance(0.1) > 0.9 > seen.chance(0.9)
        True
    """

    accepted: list[float] = field(default_factory=lambda: [1.6] * (len(EDGES) + 1))
    judged: list[float] = field(default_factory=lambda: [2.0] * (len(EDGES) + 1))

    def chance(self, confidence: float) -> float:
        """Probability that a token drafted with this confidence is accepted."""
        place = bisect.bisect(EDGES, confidence)
        return self.accepted[place] / self.judged[place]

    def enter(self, confidence: float, accepted: bool) -> None:
        """Enter one judged token."""
        place = bisect.bisect(EDGES, confidence)
        self.accepted[place] += accepted
        self.judged[place] += 1


@dataclass
class Controller:
    """Watches one request: adapts the draft length, and stops drafting where it does not pay.

    Args:
        max_draft: the longest draft.
        adaptive: False drafts `max_draft` tokens in every round, whatever they cost.
        confidence_exit: end a draft where what it has earned so far no longer pays for one more token.
        warmup: plain steps at the beginning, which tell what a plain step costs.
        patience: rounds that are judged together; half as many are enough where drafting is far from paying.
        retry: plain steps after which drafting is tried again; doubled with every failure.
    """

    max_draft: int = 12
    adaptive: bool = True
    confidence_exit: bool = True
    warmup: int = 2
    patience: int = 6
    retry: int = 48

    off: bool = False
    switched_off: int = 0
    calibration: Calibration = field(default_factory=Calibration)
    _waiting: int = 0
    _accepted: float = 3.0  # a mild prior: 0.75, worth four tokens
    _tried: float = 4.0
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _draft: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _verify: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _rounds: deque[tuple[int, float]] = field(default_factory=deque)
    _rate: float = 1.0

    @property
    def acceptance(self) -> float:
        """Share of judged drafts that were accepted lately."""
        return self._accepted / self._tried

    @property
    def plain_seconds(self) -> float | None:
        """Seconds of a plain step here; None before there was one."""
        return statistics.median(self._plain) if self._plain else None

    @property
    def draft_cost(self) -> float | None:
        """Seconds of drafting one token over those of a plain step; None before both were seen."""
        return self._relative(self._draft)

    @property
    def verify_cost(self) -> float | None:
        """Seconds of verifying a draft over those of a plain step; None before both were seen."""
        return self._relative(self._verify)

    def again(self) -> Controller:
        """For the next request: what was seen stays, and where drafting did not pay it begins with plain steps."""
        following = replace(self, off=self.off, switched_off=0)
        for name in ("_plain", "_draft", "_verify"):
            setattr(following, name, getattr(self, name).copy())
        following._rounds = deque()
        following._waiting = self.retry if self.off else 0
        return following

    @property
    def warm(self) -> bool:
        """Whether it is known what a plain step costs."""
        return len(self._plain) >= self.warmup

    def share_plain(self, other: Controller) -> None:
        """Know what a plain step costs from another controller, of the same model."""
        self._plain = other._plain

    def wait(self) -> None:
        """A plain step has passed that another controller has entered."""
        self._waiting -= 1

    def forget(self) -> None:
        """Begin anew with the acceptance: the text may have become easier."""
        self._accepted, self._tried = 3.0, 4.0

    def next_length(self) -> int:
        """How many tokens to draft now at most; 0 asks for a plain step."""
        if not self.adaptive:
            return self.max_draft
        if not self.warm or (self.off and self._waiting > 0):
            return 0
        if self.off:  # waited long enough: the text may have become easier
            self.off = False
            self._rounds.clear()
        length, self._rate = self._best()
        return self.max_draft if self.confidence_exit else length

    def worth_going_on(self, confidences: Sequence[float]) -> bool:
        """Whether one more drafted token is expected to earn what it costs.

        It earns the probability that the whole draft stays; it costs its time, in which plain decoding, or the
        rounds so far if they are faster, would yield tokens too.

        Args:
            confidences: the drafter's largest probability at every token of the draft so far.
        """
        cost = self.draft_cost
        if not (self.adaptive and self.confidence_exit) or cost is None:
            return True
        stays = math.prod(self.calibration.chance(confidence) for confidence in confidences)
        return stays * self.acceptance > cost * max(1.0, self._rate)

    def plain_step(self, seconds: float) -> None:
        """Enter a step without a draft."""
        self._plain.append(seconds)
        self._waiting -= 1

    def round(self, confidences: Sequence[float], accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Enter a round: what was drafted with which confidence, how much was accepted, and both halves' seconds."""
        drafted = len(confidences)
        for place, confidence in enumerate(confidences[: accepted + 1]):
            self.calibration.enter(confidence, place < accepted)
        fade = 0.9
        self._accepted = fade * self._accepted + accepted
        self._tried = fade * self._tried + accepted + (accepted < drafted)
        self._draft.append(draft_seconds / drafted)
        self._verify.append(verify_seconds)
        self._rounds.append((accepted + 1, draft_seconds + verify_seconds))
        if len(self._rounds) > self.patience:
            self._rounds.popleft()
        if self.adaptive and not self.off and not self._pays():
            self.off = True
            self._waiting = self.retry * 2**self.switched_off
            self.switched_off += 1

    def _best(self) -> tuple[int, float]:
        if self.draft_cost is None or self.verify_cost is None:
            return min(4, self.max_draft), 1.0
        return best_length(self.acceptance, self.draft_cost, self.verify_cost, self.max_draft)

    def _pays(self) -> bool:
        """Whether drafting is, or could be, faster than plain decoding, as far as that can be said yet."""
        plain, rounds = self.plain_seconds, len(self._rounds)
        if plain is None or 2 * rounds < self.patience:
            return True
        measured = sum(tokens for tokens, _ in self._rounds) * plain / sum(seconds for _, seconds in self._rounds)
        return max(measured, self._best()[1]) >= (1.0 if rounds == self.patience else 0.85)

    def _relative(self, seconds: deque[float]) -> float | None:
        if not seconds or self.plain_seconds is None:
            return None
        return statistics.median(seconds) / self.plain_seconds
