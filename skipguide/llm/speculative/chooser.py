"""Chooser: what comes next in a request: a draft that is looked up, one of the model itself, or a plain step.

All of it is about speed: whatever is drafted, the full model verifies it. Costs are in plain steps: a plain step costs
1 and gives 1 token. What drafting may lose against plain decoding is bounded, whatever the text: see `Budget`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from skipguide.llm.speculative.acceptance import Controller, tokens_per_round
from skipguide.llm.speculative.lookup import Record, Text

WORTH = 1.05  # what a draft must be expected to gain
OPTIMISM = 0.95  # acceptance of a drafter that was not tried yet; where not even this pays, it is not tried
FEW = 8  # judged tokens, up to which what a draft costs is believed to be what it was expected to


@dataclass
class Budget:
    """What drafting may lose: half a percent of the time of plain decoding, and a quarter of a step to begin with.

    A gain can be lost again later, up to `cap` plain steps.

    Example:
        >>> budget = Budget()
        >>> budget.round(tokens=1, cost=1.5)
        >>> round(budget.left, 9)
        -0.245
        >>> for _ in range(50): budget.plain()
        >>> round(budget.left, 9)
        0.005
    """

    share: float = 0.005
    cap: float = 8.0
    left: float = 0.25

    def plain(self) -> None:
        """Enter a step without a draft."""
        self.left = min(self.left + self.share, self.cap)

    def round(self, tokens: int, cost: float) -> None:
        """Enter a round: what it gave, and what it cost in plain steps."""
        self.left = min(self.left + tokens * (1 + self.share) - cost, self.cap)


@dataclass
class VerifyCost:
    """What a pass over k drafted tokens costs, as 1 + base + slope * k plain steps, from those of the last rounds.

    On a GPU it costs hardly more than one over a single token. On a CPU the second token costs most, as products of
    matrices begin with it.

    Example:
        >>> cost = VerifyCost()
        >>> for _ in range(30): cost.enter(2, 1.5); cost.enter(8, 1.8)
        >>> round(cost.of(2), 1), round(cost.of(8), 1)
        (1.5, 1.8)
    """

    seen: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=30))
    _line: tuple[float, float] = (0.05, 0.04)  # base and slope, as long as little is known

    def of(self, length: int) -> float:
        """Of verifying so many drafted tokens."""
        return 1 + self._line[0] + self._line[1] * length

    def enter(self, length: int, cost: float) -> None:
        """Enter a verification. Least squares, drawn to the first guess as by two passes."""
        self.seen.append((length, cost - 1))
        n, k, kk = 2.0, 0.0, 32.0
        y, ky = 2 * 0.05, 32 * 0.04
        for each, above in self.seen:
            n, k, kk, y, ky = n + 1, k + each, kk + each * each, y + above, ky + each * above
        slope = max(0.0, (n * ky - k * y) / (n * kk - k * k))
        self._line = max(0.0, (y - slope * k) / n), slope


class Chooser:
    """Decides step by step, from what was accepted and what it cost.

    A draft that is looked up costs nothing but its verification, so it goes first where it is expected to pay. Behind
    it, the model drafts itself. Of several drafters the one that leaves out most is tried first; where it does not pay,
    the next, as far as it could pay at all. Where none does, nothing is drafted but for a new attempt now and then.

    Args:
        max_draft: the longest draft.
        adaptive: False drafts always: what can be looked up, or else with the first drafter.
        confidence_exit: of the model's own drafts.
        lookup: look drafts up.
        drafters: how many there are.

    Attributes:
        drafter: which of them is in use.
        costs: of drafting a token with each, until it is measured.
        prepared: whether the drafters were chosen for this request.
        switched_off: how often a drafter was given up in this request.
    """

    def __init__(self, max_draft: int, adaptive: bool, confidence_exit: bool, lookup: bool, drafters: int) -> None:
        self.max_draft = max_draft
        self.adaptive = adaptive
        self.lookup = lookup
        self.budget = Budget()
        self.verify = VerifyCost()
        self.record = Record()
        self.controllers = [Controller(max_draft, adaptive, confidence_exit) for _ in range(drafters)]
        self.costs = [0.5] * drafters
        self.drafter = 0
        self.prepared = True
        self.text = Text()
        self._guess: tuple[int, int] | None = None  # what a look-up would have said, and by which match
        self.switched_off = 0
        self._judged = [(0.0, 0.0)] * drafters  # tokens of each that were accepted, and that were judged
        self._rest = 0  # plain steps until the drafters are tried anew, where none was promising
        self._patience = 256
        self._share_plain()

    def _share_plain(self) -> None:
        """What a plain step costs is the same whoever drafts."""
        for other in self.controllers[1:]:
            other.share_plain(self.controllers[0])

    def again(self) -> Chooser:
        """For the next request: another text, and all that was learned. Requests of several threads share that."""
        following = copy.copy(self)
        following.text, following.switched_off, following._guess = Text(), 0, None
        following.controllers = [controller.again() for controller in self.controllers]
        following._share_plain()
        return following

    @property
    def controller(self) -> Controller:
        """Of the drafter in use."""
        return self.controllers[self.drafter]

    @property
    def wants_drafters(self) -> bool:
        """Whether the model might draft in the next request: otherwise no drafter needs to be chosen for it."""
        return not self.adaptive or self._rest <= 0

    @property
    def plain_seconds(self) -> float | None:
        """Seconds of a plain step; None before there were enough."""
        return self.controller.plain_seconds if self.controller.warm else None

    def expect(self, costs: Sequence[float]) -> None:
        """Say what drafting a token is expected to cost, drafter by drafter, as long as it was not measured."""
        self.costs = list(costs) or self.costs

    # -- what comes next ----------------------------------------------------------------------------------------

    def read(self, tokens: Sequence[int]) -> None:
        """Enter what has come since; what would have been looked up is compared with it."""
        if (guess := self._guess) is not None and tokens:
            self.record.enter(guess[0], int(guess[1] == tokens[0]), 1)
        self._guess = None
        self.text.extend(tokens)

    def looked_up(self, room: int) -> tuple[int, list[int]]:
        """The length of the match and the tokens of a draft that is worth verifying; none for no draft.

        Args:
            room: tokens that may be drafted.
        """
        if not self.lookup or room < 1:
            return 0, []
        size, found = self.text.following(min(self.max_draft, room))
        if not self.adaptive:
            return (size, found) if size > 1 else (0, [])  # after a single token nearly anything has stood
        if not found:
            return 0, []
        self._guess = size, found[0]
        if self.plain_seconds is None or self.budget.left < -self.budget.cap:
            return 0, []
        chance = self.record.chance(size)
        gains = [tokens_per_round(chance, k) / self.verify.of(k) for k in range(1, len(found) + 1)]
        if max(gains) < WORTH:
            return 0, []
        self._guess = None  # the round says more
        return size, found[: gains.index(max(gains)) + 1]

    def own_length(self, room: int) -> int:
        """How many tokens the model is to draft itself at most; 0 for none.

        Args:
            room: tokens that may be drafted.
        """
        if not self.adaptive:
            return min(self.controller.next_length(), room)
        if self.plain_seconds is None or not self.prepared or self._rest > 0 or not self._find_promising():
            return 0
        longest = min(self.controller.next_length(), room)
        if longest < 1:
            return 0
        accepted, judged = self._judged[self.drafter]
        acceptance = (1 + accepted) / (2 + judged)  # no better than what was seen
        costs = [k * self._cost + self.verify.of(k) for k in range(1, longest + 1)]
        gains = [tokens_per_round(acceptance, k + 1) / cost for k, cost in enumerate(costs)]
        if max(gains) > 1:
            return gains.index(max(gains)) + 1 if self.budget.left > 0 else 0
        # one token at a time until more is known, as far as what it is expected to lose may be lost, and where enough
        # of the text is left to make up for a draft that fails
        expected, worst = costs[0] - tokens_per_round(acceptance, 1), costs[0] - 1
        return int(expected <= self.budget.left and worst <= self.budget.left + self.budget.share * room)

    def _find_promising(self) -> bool:
        """Go on to the first drafter that pays, or of which nothing is known that could."""
        while not self._promising():
            if self.drafter + 1 == len(self.controllers):
                self.drafter, self._rest, self._patience = 0, self._patience, 2 * self._patience
                self._judged = [(0.0, 0.0)] * len(self.controllers)  # by then the text may have become easier
                for controller in self.controllers:
                    controller.forget()
                return False
            self.drafter += 1
        return True

    def _promising(self) -> bool:
        accepted, judged = self._judged[self.drafter]
        acceptance = (2 * OPTIMISM + accepted) / (2 + judged)
        lengths = range(1, self.max_draft + 1)
        return max(tokens_per_round(acceptance, k) / (k * self._cost + self.verify.of(k)) for k in lengths) > WORTH

    @property
    def _cost(self) -> float:
        """Of drafting a token with the drafter in use. The first drafts are short, and dear for what surrounds them."""
        measured, expected = self.controller.draft_cost, self.costs[self.drafter]
        if measured is None:
            return expected
        return measured if self._judged[self.drafter][1] > FEW else min(measured, expected)

    # -- what has come ------------------------------------------------------------------------------------------

    def plain_step(self, seconds: float) -> None:
        """Enter a step without a draft."""
        self.controllers[0].plain_step(seconds)
        for controller in self.controllers[1:]:
            controller.wait()
        self._rest -= 1
        self.budget.plain()
        self.record.step()

    def looked_up_round(self, size: int, drafted: int, accepted: int, seconds: float) -> None:
        """Enter a round whose draft was looked up by a match of that size."""
        self.record.enter(size, accepted, accepted + (accepted < drafted))
        self._round(drafted, accepted, 0.0, seconds)

    def own_round(self, confidences: Sequence[float], accepted: int, draft: float, verify: float) -> None:
        """Enter a round that the model drafted: its confidences, how much was accepted, seconds of both halves."""
        known, judged = self._judged[self.drafter]
        seen = accepted + (accepted < len(confidences))
        self._judged[self.drafter] = 0.95 * known + accepted, 0.95 * judged + seen
        controller, before = self.controller, self.controller.switched_off
        controller.round(confidences, accepted, draft, verify)
        self._round(len(confidences), accepted, draft, verify)
        if controller.switched_off > before:
            self.switched_off += 1
            if self.drafter + 1 < len(self.controllers):
                self.drafter += 1

    def _round(self, drafted: int, accepted: int, draft: float, verify: float) -> None:
        self.record.step()
        if (plain := self.plain_seconds) is not None:
            self.verify.enter(drafted, verify / plain)
            self.budget.round(accepted + 1, (draft + verify) / plain)
