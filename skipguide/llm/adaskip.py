"""AdaSkip: leave out the attention and MLP sublayers that change the residual stream least on the user's own text.

Source: AdaSkip (arXiv 2501.02336).
"""

from __future__ import annotations

from torch import nn

from skipguide.llm.adaskip_applied import AppliedAdaSkip
from skipguide.llm.adaskip_settings import AdaSkipSettings
from skipguide.llm.calibration import calibrate
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.similarity import SublayerStats


class AdaSkip(AdaSkipSettings):
    """Leave out what the model's own similarity statistics call least important.

    Give exactly one of `skip_ratio`, `count` and `target_speedup`.

    The phases are those of the paper's three variants. `"prefill"` leaves the set out from the first token on, and does
    nothing else. `"decode"` reads the prompt with the whole model, and leaves the set out in one-token passes.
    `"both"` is `"prefill"` with the online stage. The online stage, in `"decode"` and `"both"`, watches the first
    `window` one-token passes of each request; MLPs that proved at least as similar as the least similar sublayer of
    the set are left out too, for the rest of that request. It never adds attention.

    Args:
        skip_ratio: share of the 2L sublayers to leave out; with `cost_aware`, share of their time.
        count: how many sublayers to leave out.
        target_speedup: enough sublayers for this speed-up. With `cost_aware` of the whole pass, by the measured times;
            otherwise of the layers, as if all sublayers took the same time.
        phase: `"prefill"`, `"decode"` or `"both"`.
        online: the online stage.
        cost_aware: choose by damage (1 - similarity) per millisecond saved, with times measured on this machine at
            this context length, instead of by similarity alone.
        reference_compat: do what the published code does instead of what the paper says: statistics over the first 20
            requests it meets; an online stage whose threshold is 1, so that it never adds anything.
        part: `"both"`, or `"attn"` or `"mlp"` to leave out sublayers of one kind only.
        compensate: scale the stream by the factor by which the left-out sublayer would have let its norm grow.
        window: one-token passes that the online stage watches.

    Raises:
        SkipError: for settings that contradict each other or are out of range.

    Example:
        >>> stats = SublayerStats((0.9, 0.99), (0.8, 0.95), (1.1, 1.02), (1.2, 1.05))
        >>> AdaSkip(skip_ratio=0.5).choose(stats)
        Sublayers(attn=(1,), mlp=(1,))
        >>> AdaSkip(count=1).plan(stats)
        SublayerPlan(attn=(1,), attn_scale={1: 1.02})
    """

    calibrate = staticmethod(calibrate)

    def apply(
        self,
        model: nn.Module,
        stats: SublayerStats | None = None,
        costs: SublayerCosts | None = None,
        *,
        everywhere: bool = False,
    ) -> AppliedAdaSkip:
        """Leave the chosen sublayers out of `model.generate(...)` and plain forwards until `remove()`.

        As every plan does, it holds in the thread or task where this is called, and a first request is measured there
        too. The first pass in another thread, which runs whole, is logged as a warning.

        Args:
            model: a causal language model of a known family.
            stats: from `calibrate`; None measures the first request's prompt, which runs whole, and skips from its
                first decoding pass on.
            costs: times for `cost_aware`; None measures them at the statistics' mean prompt length.
            everywhere: hold, and measure, in all threads (a generation that streams from a thread of its own, a
                server).

        Raises:
            SkipError: for statistics of another number of layers, and whatever the model cannot leave out (all of its
                attention; attention whose keys later layers read; scales in a model with parallel sublayers). It is as
                it was.
        """
        return AppliedAdaSkip(self, model, stats, costs, everywhere)
