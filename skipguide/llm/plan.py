"""Plan: sublayers to leave out of a language model, and how to leave them out of one."""

from __future__ import annotations

from typing import Self

from torch import nn

from skipguide.errors import SkipError
from skipguide.llm.applied import AppliedSublayers
from skipguide.llm.find import sublayer_map
from skipguide.llm.plan_data import Phase, SublayerPlanData
from skipguide.plan import SkipPlan


class SublayerPlan(SublayerPlanData):
    """Sublayers to leave out of a causal language model, with the factors that stand in for them.

    A left-out sublayer is `h = h * scale` on the residual stream `h [B, T, D]` (AdaSkip, arXiv 2501.02336): its norm
    and its sum are not computed either. Without a scale it is `h`, which is a layer whose output projection is zero.

    A pass is *prefill* where it reads a prompt, whole or in chunks, and *decode* after that, whether it has one token
    or verifies several (assisted decoding). `generate` is asked which; for a loop of one's own, passes of several
    tokens on a filled cache need `applied.in_phase(...)`. Attention that was left out once stays out for the rest of
    that sequence, because its keys and values do not exist: in phase `"prefill"` the feed-forwards run again in decode,
    the attention does not.

    Args:
        attn: layers whose attention is left out.
        mlp: layers whose feed-forward (or experts) is left out.
        attn_scale: layer -> factor, for layers of `attn`; 1 where none is given.
        mlp_scale: layer -> factor, for layers of `mlp`.
        phase: `"both"`, `"prefill"` or `"decode"` (the prompt is read by the whole model).

    Raises:
        SkipError: for layers that are no numbers, or named twice; for a scale that is not finite or not positive, or of
            a layer that is not left out; for an unknown phase.

    Example:
        >>> plan = SublayerPlan(attn=[6], mlp=[4, 5], mlp_scale={4: 1.02})
        >>> SublayerPlan.from_dict(plan.to_dict()) == plan
        True
    """

    @classmethod
    def of(cls, plan: SkipPlan, phase: Phase = "both") -> Self:
        """A plan of the core as one of sublayers: a block is its attention and its feed-forward.

        Args:
            plan: of parts `"block"`, `"attn"` and `"mlp"`, for all rows and all steps.
            phase: see above.

        Raises:
            SkipError: for anything else.

        Example:
            >>> from skipguide import SkipPlan
            >>> SublayerPlan.of(SkipPlan([1]) | SkipPlan([2], part="mlp"))
            SublayerPlan(attn=(1,), mlp=(1, 2))
        """
        if not isinstance(plan, SkipPlan):
            raise SkipError(f"expected a SkipPlan; got {type(plan).__name__}")
        found: dict[str, set[int]] = {"attn": set(), "mlp": set()}
        for term in plan.terms:
            if term != SkipPlan(term.layers, part=term.part) or term.part not in ("block", *found):
                raise SkipError(
                    f"expected a plan of blocks, attn and mlp, for all rows and steps, without the name of a stack; "
                    f"got {term}"
                )
            for part in found if term.part == "block" else (term.part,):
                found[part] |= set(term.layers)
        return cls(sorted(found["attn"]), sorted(found["mlp"]), phase=phase)

    def apply(self, model: nn.Module, *, cached: bool = True, everywhere: bool = False) -> AppliedSublayers:
        """Leave the sublayers out from now on, in this thread or task, until `remove()` or the end of the `with`.

        The first pass of the model in another thread, which runs whole, is logged as a warning.

        Args:
            model: a causal language model of a known family (`sublayer_map`), or one that can be proven on the spot.
            cached: False promises that no pass uses a KV cache; only then may a plan leave out every attention.
            everywhere: leave them out in all threads (a generation that streams from a thread of its own, a server).

        Raises:
            SkipError: for a layer that the model does not have, every attention left out, attention whose keys
                other layers read, a scale where the layers are not `h + sublayer(h)` one after the other, or a
                recurrent model. The model is as it was.
        """
        return AppliedSublayers(self, sublayer_map(model), cached=cached, everywhere=everywhere)
