"""Lookup: drafts from the text itself. What followed the last tokens where they stood before may follow them again.

Source: prompt lookup decoding (apoorvumang/prompt-lookup-decoding), which transformers has as
`prompt_lookup_num_tokens`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

LONGEST = 3  # tokens by which a place is found
GRADES = (1, 2, 3, 4, 8, 16)  # how far it then agrees with the end of the text, backwards


class Text:
    """A text whose n-grams are known by the place behind their latest occurrence.

    Example:
        >>> text = Text()
        >>> text.extend([5, 6, 7, 8, 5, 6])
        >>> text.following(4)  # 5, 6 stood before 7, 8, 5, 6
        (2, [7, 8, 5, 6])
        >>> text.extend([9])
        >>> text.following(4)
        (0, [])
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. What ends with the last one is known when the next has come: it must not find itself."""
        for token in tokens:
            end = len(self.tokens)
            for size in range(1, min(LONGEST, end) + 1):
                self._behind[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def following(self, length: int) -> tuple[int, list[int]]:
        """How many of the last tokens stood before, at most 16, and up to `length` tokens that followed them there.

        Where the text ends before that many, what was found is read on: a loop goes on as a loop.
        """
        for size in range(min(LONGEST, len(self.tokens)), 0, -1):
            if (place := self._behind.get(tuple(self.tokens[-size:]))) is not None:
                found = self.tokens[place : place + length]
                period = len(self.tokens) - place
                while len(found) < length:
                    found.append(found[-period])
                return self._agreeing(place), found
        return 0, []

    def _agreeing(self, place: int) -> int:
        """How many tokens before a place are those at the end."""
        for size in range(min(GRADES[-1], place)):
            if self.tokens[place - 1 - size] != self.tokens[-1 - size]:
                return size
        return min(GRADES[-1], place)


class Record:
    """How often the token that was looked up was right, by the length of the match. What is long ago counts less.

    It learns from drafts, and for nothing from plain steps too: what would have been looked up is compared with what
    came.

    Example:
        >>> record = Record()
        >>> before = record.chance(2)
        >>> for _ in range(4): record.enter(2, accepted=0, judged=1)
        >>> record.chance(2) < before, record.chance(3) == Record().chance(3)
        (True, True)
    """

    PRIOR = (0.1, 0.2, 0.4, 0.5, 0.7, 0.8)  # by grade, each worth two tokens
    FADE = 0.99  # a step

    def __init__(self) -> None:
        self._accepted = [0.0] * len(GRADES)
        self._judged = [0.0] * len(GRADES)

    def chance(self, size: int) -> float:
        """Probability that the next token that was looked up by a match of `size` tokens is accepted."""
        grade = bisect.bisect(GRADES, size) - 1
        return (2 * self.PRIOR[grade] + self._accepted[grade]) / (2 + self._judged[grade])

    def enter(self, size: int, accepted: int, judged: int) -> None:
        """Enter tokens that were looked up by a match of `size`, as far as they were judged."""
        grade = bisect.bisect(GRADES, size) - 1
        self._accepted[grade] += accepted
        self._judged[grade] += judged

    def step(self) -> None:
        """A step of decoding has passed."""
        for counts in (self._accepted, self._judged):
            counts[:] = [self.FADE * count for count in counts]
