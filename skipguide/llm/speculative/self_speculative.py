"""Self-speculative decoding: the model with sublayers left out drafts, the whole model verifies.

The output is the full model's: token for token in greedy decoding, in distribution when sampling. In float32 "token
for token" holds up to logits that are equal to the last digits; in half precision a pass over several tokens rounds
differently from one over a single token, so that tokens can differ where the two best logits are tied at that
precision. One KV cache serves both; the prompt is read once.

Sources: prompt lookup decoding for drafts from the text; Draft & Verify (arXiv 2309.08168) for leaving out sublayers in
the drafter, SWIFT (ICLR 2025) and KnapSpec (arXiv 2602.20217) for choosing them by similarity and time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from skipguide.llm.speculative.applied import AppliedSelfSpeculative, decode
from skipguide.llm.speculative.settings import SelfSpeculativeSettings
from skipguide.llm.speculative.stats import SpeculationStats


class SelfSpeculative(SelfSpeculativeSettings):
    """Faster decoding, as far as the model's own sublayers are redundant: lossless in float32, and up to ties in bf16.

    Use it in one of three ways: `model.generate(**inputs, custom_generate=SelfSpeculative())`, where transformers does
    not hand a streamer on; `with SelfSpeculative().apply(model): model.generate(**inputs)`; or
    `SelfSpeculative().generate(model, **inputs)`.

    Two drafters propose, one verification judges both. First the text itself: what followed the last tokens where they
    stood before, which costs nothing to find (prompt lookup). Behind it the model with sublayers left out; what it
    leaves out is, in this order: `plan`; chosen from `stats` by similarity per millisecond; or chosen in the same way
    from the similarities of the prompt's own prefill, which cost nothing extra.

    How long a draft is, whose, and whether there is one, follows from what was accepted and what it cost so far: in
    this request, and in those before it under the same handle. The drafter that leaves out most is tried first, then
    those that leave out less, as far as they could pay. What all this may lose against plain decoding is bounded to
    about half a percent and a fraction of a step; it is tried again later. These decisions depend on measured
    times: greedy output does not depend on them, the sequence of random numbers does. For a sampled text that can be
    repeated, give `adaptive=False` and a `plan`.

    Args:
        stats: similarities, from `AdaSkip.calibrate`.
        plan: the drafter itself; its phase does not matter. A `skipguide.SkipPlan` of blocks, attention and
            feed-forwards is taken too, and kept as a `SublayerPlan`.
        costs: milliseconds of every sublayer at decoding; None measures them in the first plain steps.
        draft_skip: share of the sublayers' time that a chosen drafter leaves out, above 0 and below 1; the largest one
            that is tried, unless `adaptive` is False.
        max_draft: longest draft.
        adaptive: adapt who drafts, and how much, and stop where it does not pay.
        confidence_exit: end a draft early where the drafter's confidence has not been worth much.
        lookup: draft from the text itself first, where a single sequence is decoded.

    Raises:
        SkipError: for a wrong argument.

    Example:
        >>> SelfSpeculative.from_dict(SelfSpeculative(max_draft=6).to_dict()).max_draft
        6
    """

    def apply(self, model: Any) -> AppliedSelfSpeculative:
        """Let `model.generate` draft and verify, until `remove()` or the end of the `with`.

        It stands in for `model.generate`, so that it holds in every thread that calls that: a streamer's, a server's.

        Args:
            model: a causal language model of transformers.

        Returns:
            A handle with `.stats` (`SpeculationStats`) and `.remove()`.

        Raises:
            SkipError: for a model that is none, or whose layers cannot be left out.
        """
        return AppliedSelfSpeculative(self, model)

    def generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.generate(...)` with drafting; everything that it takes, and what it returns."""
        with self.apply(model):
            return model.generate(*args, **kwargs)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop that `model.generate(custom_generate=...)` calls with what it has prepared."""
        return decode(
            self,
            SpeculationStats(),
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
