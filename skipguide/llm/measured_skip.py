"""MeasuredSkip: leave out the sublayers whose loss on the user's own text was measured to rise least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from skipguide.config import JsonConfig, normalize_fields
from skipguide.errors import SkipError
from skipguide.llm.batch import Batch
from skipguide.llm.choose import Sublayers
from skipguide.llm.damage import search
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.plan_data import PHASES, Phase
from skipguide.llm.skip_order import SkipOrder

if TYPE_CHECKING:
    from skipguide.llm.applied import AppliedSublayers


@dataclass(frozen=True, repr=False)
class MeasuredSkip(JsonConfig):
    """Leave out what a search found to cost least: damage that is measured, not similarity that stands for it.

    The search takes minutes where AdaSkip's calibration takes seconds, and is done once per model and kind of text;
    what it found is a `SkipOrder`, to be saved. `skipguide/llm/README.md` says which of the two to use at which share.

    Give exactly one of `skip_ratio`, `count` and `perplexity_ratio`.

    Args:
        skip_ratio: share of the 2L sublayers to leave out.
        count: how many sublayers to leave out.
        perplexity_ratio: as many as leave the perplexity on the calibration texts at most this times the whole model's.
        phase: `"both"`, `"prefill"` or `"decode"`, as of `SublayerPlan`.

    Raises:
        SkipError: for settings that contradict each other or are out of range.

    Example:
        >>> found = SkipOrder((1, 3, 0), (2.0, 2.1, 2.6), whole_loss=2.0, num_layers=2)
        >>> MeasuredSkip(skip_ratio=0.5).plan(found)
        SublayerPlan(attn=(1,), mlp=(1,))
    """

    skip_ratio: float | None = None
    count: int | None = None
    perplexity_ratio: float | None = None
    phase: Phase = "both"

    def __post_init__(self) -> None:
        """Check every setting, and keep numbers of any library as Python's."""
        given = {name: getattr(self, name) for name in ("skip_ratio", "count", "perplexity_ratio")}
        if sum(value is not None for value in given.values()) != 1:
            raise SkipError(f"expected exactly one of skip_ratio, count and perplexity_ratio; got {given}")
        normalize_fields(
            self, wholes={"count": 1}, numbers={"skip_ratio": 0, "perplexity_ratio": 1}, optional=tuple(given)
        )
        if self.skip_ratio is not None and not 0 < self.skip_ratio < 1:
            raise SkipError(f"expected a skip_ratio above 0 and below 1; got {self.skip_ratio!r}")
        if self.phase not in PHASES:
            raise SkipError(f"unknown phase {self.phase!r}; expected one of {', '.join(PHASES)}")

    @staticmethod
    def calibrate(model: nn.Module, batches: Iterable[Batch], most: int | None = None) -> SkipOrder:
        """Search: leave sublayers out one after the other, each time the one with which the loss rises least.

        A sublayer is tried again, beside those that are out already, only where its last measured rise is the least of
        all. Where damage only grows with what is left out that is the greedy search to the letter, in a fraction of its
        passes. A trial runs from the layer on in which it differs.

        Args:
            model: a causal language model of a known family, with nothing left out of it.
            batches: as for `AdaSkip.calibrate`: token ids [T] or [B, T], or tokenizer outputs. Padding is not judged.
            most: how many sublayers to leave out; None takes half of them.

        Raises:
            SkipError: for no batches, what is no batch or not of this model's vocabulary, more sublayers than the model
                can run without, a model that sublayers are left out of, and a loss that is not finite.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
            ...     num_hidden_layers=4, num_attention_heads=4))
            >>> found = MeasuredSkip.calibrate(model, [torch.arange(2, 30)], most=2)
            >>> with MeasuredSkip(count=2).apply(model, found) as applied:
            ...     _ = model.generate(torch.tensor([[3, 14, 15]]), max_new_tokens=2, do_sample=False)
            >>> applied.stats.skipped_fraction
            0.25
        """
        return search(model, batches, most)

    def choose(self, found: SkipOrder) -> Sublayers:
        """The sublayers to leave out.

        Raises:
            SkipError: for more than the search went, or none.
        """
        if not isinstance(found, SkipOrder):
            raise SkipError(f"expected a SkipOrder, as of MeasuredSkip.calibrate(); got {type(found).__name__}")
        if self.perplexity_ratio is not None:
            chosen = found.within(self.perplexity_ratio)
            why = f"a perplexity of {self.perplexity_ratio:g} times the whole model's allows none"
        else:
            total = 2 * found.num_layers
            chosen = found.first(self.count if self.count is not None else round((self.skip_ratio or 0) * total))
            why = f"a skip_ratio of {self.skip_ratio} of {total} is none"
        if not chosen.count:
            raise SkipError(f"nothing would be left out: {why}")
        return chosen

    def plan(self, found: SkipOrder) -> SublayerPlan:
        """The plan that leaves them out."""
        chosen = self.choose(found)
        return SublayerPlan(chosen.attn, chosen.mlp, phase=self.phase)

    def apply(self, model: nn.Module, found: SkipOrder, *, everywhere: bool = False) -> AppliedSublayers:
        """Leave them out of `model.generate(...)` and plain forwards until `remove()` or the end of the `with`.

        Args:
            model: the model that was calibrated.
            found: of `calibrate`.
            everywhere: leave them out in all threads, as for `SublayerPlan.apply`.

        Raises:
            SkipError: as of `choose`, and of `SublayerPlan.apply`.
        """
        return self.plan(found).apply(model, everywhere=everywhere)
