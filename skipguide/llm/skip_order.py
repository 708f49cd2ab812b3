"""Skip order: in which order a search left the sublayers of a language model out, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipguide.config import JsonConfig, as_numbers, normalize_fields
from skipguide.errors import SkipError
from skipguide.llm.choose import Sublayers, check_count, sublayer_at
from skipguide.shown import Row, Shown


@dataclass(frozen=True, repr=False)
class SkipOrder(Shown, JsonConfig):
    """The sublayers in the order in which `MeasuredSkip.calibrate` left them out, with the loss after each.

    Attributes:
        order: numbers of sublayers; 0 to L-1 are attentions, L to 2L-1 MLPs.
        losses: of the calibration texts, in nats per token, with all sublayers up to this one left out.
        whole_loss: of the whole model.
        num_layers: L.
        tokens: on which the loss was measured.
        trials: sets of sublayers whose loss was measured.
        seconds: of the search.
        model: class of the model that was measured.
        alone: loss with each of the 2L sublayers alone left out, None where the model cannot run without it.

    Raises:
        SkipError: for sublayers that the model does not have or that are there twice, and losses that are not finite.

    Example:
        >>> found = SkipOrder((1, 3, 0), (2.0, 2.1, 2.6), whole_loss=2.0, num_layers=2)
        >>> found.first(2), found.within(1.2)  # perplexity at most 1.2 times the whole model's
        (Sublayers(attn=(1,), mlp=(1,)), Sublayers(attn=(1,), mlp=(1,)))
        >>> SkipOrder.from_dict(found.to_dict()) == found
        True
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]
    whole_loss: float
    num_layers: int
    tokens: int = 1
    trials: int = 0
    seconds: float = 0.0
    model: str = ""
    alone: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no search's result."""
        normalize_fields(
            self, {"num_layers": 1, "tokens": 1, "trials": 0}, {"whole_loss": 0, "seconds": 0}, texts=("model",)
        )
        object.__setattr__(self, "losses", as_numbers("losses", self.losses, 0))
        chosen = tuple(int(n) for n in as_numbers("order", self.order, 0, 2 * self.num_layers - 1))
        if len(set(chosen)) != len(self.order) or chosen != tuple(self.order) or len(chosen) != len(self.losses):
            raise SkipError(
                f"expected different sublayers from 0 to {2 * self.num_layers - 1}, and a loss for each; got "
                f"{self.order} and {len(self.losses)} losses"
            )
        object.__setattr__(self, "order", chosen)
        alone: Any = self.alone
        if not isinstance(alone, Sequence) or isinstance(alone, str) or len(alone) not in (0, 2 * self.num_layers):
            raise SkipError(
                f"expected the loss of each of {2 * self.num_layers} sublayers alone, or of none; got {alone!r}"
            )
        as_numbers("alone", [loss for loss in alone if loss is not None], 0)
        object.__setattr__(self, "alone", tuple(alone))

    def _heading(self) -> str:
        of = f" of {self.model}" if self.model else ""
        return f"SkipOrder{of}: {len(self.order)} of {2 * self.num_layers} sublayers, {self.tokens:,} tokens"

    def _rows(self) -> list[Row]:
        found: list[Row] = [("left out", "layer", "part", "perplexity"), (0, "", "", _perplexity(self.whole_loss))]
        for place, (number, loss) in enumerate(zip(self.order, self.losses, strict=True)):
            found.append((place + 1, *sublayer_at(number, self.num_layers), _perplexity(loss)))
        return found

    def first(self, count: int) -> Sublayers:
        """The first `count` sublayers of the order.

        Raises:
            SkipError: for more than the search went.
        """
        check_count(count, 2 * self.num_layers)
        if count > len(self.order):
            raise SkipError(
                f"the search left {len(self.order)} sublayers out, and {count} are asked for: calibrate with "
                f"most={count}"
            )
        return Sublayers.numbered(self.order[:count], self.num_layers)

    def within(self, perplexity_ratio: float) -> Sublayers:
        """As many sublayers as leave the perplexity on the calibration texts at most this times the whole model's.

        Raises:
            SkipError: where the last loss of the order is still below that: how many there can be is not known.
        """
        most = self.whole_loss + math.log(perplexity_ratio)
        fits = [place for place, loss in enumerate(self.losses, 1) if loss <= most]
        count = max(fits, default=0)
        if count == len(self.order) < 2 * self.num_layers:
            raise SkipError(
                f"with all {count} sublayers of the search left out the perplexity is still within "
                f"{perplexity_ratio:g} times the whole model's: calibrate with a larger most"
            )
        return Sublayers.numbered(self.order[:count], self.num_layers)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "above 1e304"
