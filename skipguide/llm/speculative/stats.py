"""Speculation: the figures of self-speculative decoding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from skipguide.shown import Row, Shown, counted


@dataclass(repr=False)
class SpeculationStats(Shown):
    """What one request, or several, did.

    Attributes:
        requests: calls of `generate`.
        rounds: drafts that were verified.
        drafted: tokens that were drafted (per row of a batch).
        accepted: those of them that the full model accepted; in a batch, those that every row accepted.
        rejected_rounds: rounds in which a drafted token was rejected.
        plain_steps: steps without a draft.
        switched_off: how often drafting was given up because it did not pay.
        draft_seconds: time in the drafter.
        verify_seconds: time in verification.
        plain_seconds: time in plain steps.
        attn: layers whose attention the drafter leaves out, of the last request.
        mlp: layers whose MLP the drafter leaves out, of the last request.
        lookup_rounds: rounds whose draft was looked up in the text.
        lookup_drafted: tokens of these drafts.
        lookup_accepted: those of them that the full model accepted.

    Example:
        >>> stats = SpeculationStats(rounds=10, drafted=50, accepted=40, rejected_rounds=10, plain_steps=2)
        >>> stats.acceptance, stats.tokens
        (0.8, 52)
    """

    requests: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected_rounds: int = 0
    plain_steps: int = 0
    switched_off: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    plain_seconds: float = 0.0
    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    lookup_rounds: int = 0
    lookup_drafted: int = 0
    lookup_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted over judged drafts; a token behind the first rejected one was not judged. 0 without any."""
        judged = self.accepted + self.rejected_rounds
        return self.accepted / judged if judged else 0.0

    @property
    def tokens(self) -> int:
        """Tokens that came out of rounds and plain steps (per row; the first of a request comes with the prompt)."""
        return self.accepted + self.rounds + self.plain_steps

    @property
    def draft_cost(self) -> float | None:
        """Mean seconds of drafting a token (not of looking one up) over those of a plain step; None without both."""
        return self._over_plain(self.draft_seconds, self.drafted - self.lookup_drafted)

    @property
    def verify_cost(self) -> float | None:
        """Mean seconds of verifying a draft over those of a plain step; None without both."""
        return self._over_plain(self.verify_seconds, self.rounds)

    def _heading(self) -> str:
        steps = (
            f"{counted(self.tokens, 'token')} in {counted(self.rounds, 'round')} and "
            f"{counted(self.plain_steps, 'plain step')}"
        )
        return f"{counted(self.requests, 'request')}: {steps}, {self.acceptance:.0%} of the drafts accepted"

    def _rows(self) -> list[Row]:
        own = (self.rounds - self.lookup_rounds, self.drafted - self.lookup_drafted)
        return [
            ("who", "passes", "tokens", "accepted", "seconds"),
            ("the text, drafting", self.lookup_rounds, self.lookup_drafted, self.lookup_accepted, ""),
            ("without sublayers, drafting", *own, self.accepted - self.lookup_accepted, self.draft_seconds),
            ("the whole model, verifying", self.rounds, "", "", self.verify_seconds),
            ("the whole model, plainly", self.plain_steps, "", "", self.plain_seconds),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the derived figures."""
        found = asdict(self) | {"attn": list(self.attn), "mlp": list(self.mlp)}
        derived = ("acceptance", "tokens", "draft_cost", "verify_cost")
        return found | {name: getattr(self, name) for name in derived}

    def _over_plain(self, seconds: float, count: int) -> float | None:
        if not count or not self.plain_steps or not self.plain_seconds:
            return None
        return (seconds / count) / (self.plain_seconds / self.plain_steps)
