"""Acceptance: how long to draft, and whether to draft at all, from what this request showed so far.

Everything here is decided on the host from counts and seconds, and nothing of it changes what the full model accepts:
it is about speed alone.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field


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


@dataclass
class Controller:
    """Watches one request: adapts the draft length, and stops drafting where it does not pay.

    Args:
        max_draft: the longest draft.
        adaptive: False drafts `max_draft` tokens in every round, whatever they cost.
        warmup: plain steps at the beginning, which tell what a plain step costs.
        patience: rounds that are judged together.
        retry: plain steps after which drafting is tried again; doubled with every failure.
    """

    max_draft: int = 12
    adaptive: bool = True
    warmup: int = 2
    patience: int = 6
    retry: int = 48

    off: bool = False
    switched_off: int = 0
    _waiting: int = 0
    _accepted: float = 3.0  # a mild prior: 0.75, worth four tokens
    _tried: float = 4.0
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _draft: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _verify: deque[float] = field(default_factory=lambda: deque(maxlen=15))
    _rounds: deque[tuple[int, float]] = field(default_factory=deque)

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

    def next_length(self) -> int:
        """How many tokens to draft now; 0 asks for a plain step."""
        if not self.adaptive:
            return self.max_draft
        if len(self._plain) < self.warmup or (self.off and self._waiting > 0):
            return 0
        if self.off:  # waited long enough: the text may have become easier
            self.off = False
            self._rounds.clear()
        if self.draft_cost is None or self.verify_cost is None:
            return min(4, self.max_draft)
        return best_length(self.acceptance, self.draft_cost, self.verify_cost, self.max_draft)[0]

    def worth_going_on(self, confidence: float) -> bool:
        """Whether one more drafted token is expected to earn what it costs.

        Args:
            confidence: probability, by the drafter, that all of the draft so far will be accepted.
        """
        cost = self.draft_cost
        return cost is None or confidence * self.acceptance > cost

    def plain_step(self, seconds: float) -> None:
        """Enter a step without a draft."""
        self._plain.append(seconds)
        self._waiting -= 1

    def round(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Enter a round: what was drafted, what of it was accepted, and the seconds of both halves."""
        fade = 0.9
        self._accepted = fade * self._accepted + accepted
        self._tried = fade * self._tried + accepted + (accepted < drafted)
        self._draft.append(draft_seconds / drafted)
        self._verify.append(verify_seconds)
        self._rounds.append((accepted + 1, draft_seconds + verify_seconds))
        if len(self._rounds) > self.patience:
            self._rounds.popleft()
        if self.adaptive and len(self._rounds) == self.patience and not self._pays():
            self.off = True
            self._waiting = self.retry * 2**self.switched_off
            self.switched_off += 1

    def _pays(self) -> bool:
        plain = self.plain_seconds
        if plain is None or self.draft_cost is None or self.verify_cost is None:
            return True
        measured = sum(tokens for tokens, _ in self._rounds) * plain / sum(seconds for _, seconds in self._rounds)
        expected = best_length(self.acceptance, self.draft_cost, self.verify_cost, self.max_draft)[1]
        return max(measured, expected) >= 1.0

    def _relative(self, seconds: deque[float]) -> float | None:
        if not seconds or self.plain_seconds is None:
            return None
        return statistics.median(seconds) / self.plain_seconds
