"""Passes: what a guider of diffusers asks for at a step, and what of a weakened pass can be said as a plan of ours.

A guider weakens a pass with hooks that it puts on the denoiser. Where they skip whole blocks, take the identity for the
attention map or blur its queries, a plan says the same: then the pass starts at the first such block, joint blocks keep
their streams in order, and what the hooks of the installed diffusers do wrong is not done. Other hooks are used as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from skipguide.blocks import BlockMap
from skipguide.errors import SkipError
from skipguide.plan import SkipPlan

UNCOND = "pred_uncond"
# attribute with what is weakened -> the prediction that it is of
_WEAKENED = {
    "skip_layer_config": "pred_cond_skip",
    "seg_guidance_config": "pred_cond_seg",
    "auto_guidance_config": UNCOND,
}
_KNOWN = {"pred_cond", UNCOND, "pred_cond_skip", "pred_cond_seg"}


def weakened(guider: Any) -> dict[str, list[Any]]:
    """Prediction -> diffusers' descriptions of what is weakened in its pass; empty for guiders that combine only."""
    return {name: list(found) for each, name in _WEAKENED.items() if (found := getattr(guider, each, None))}


def refuse_unknown(guider: Any) -> None:
    """Refuse a guider that asks for passes of a kind that no classic pipeline's inputs tell of.

    Raises:
        SkipError: naming them.
    """
    if unknown := [name for name in guider._input_predictions or () if name not in _KNOWN]:
        raise SkipError(
            f"{type(guider).__name__} asks for {', '.join(unknown)}, and of a classic pipeline only the conditional "
            f"and the unconditional inputs are known: expected a guider of {', '.join(sorted(_KNOWN))}"
        )


def plans(guider: Any, blocks: BlockMap) -> dict[str, SkipPlan] | None:
    """Prediction -> the plan of its pass; None if the guider does something that no plan says.

    Raises:
        SkipError: for layers that the model does not have.
    """
    found: dict[str, SkipPlan] = {}
    for name, configs in weakened(guider).items():
        parts = {_part(each) for each in configs}
        if len(parts) > 1 or None in parts:
            return None
        part = parts.pop()
        layers = sorted({layer for each in configs for layer in _layers(each, part, blocks)})
        found[name] = SkipPlan(layers, part=part, part_options=_options(guider) if part == "attn_blur" else {})
    return found


def _options(guider: Any) -> dict[str, Any]:
    """How far smoothed energy guidance blurs; from its threshold on to the mean of all queries, which None says."""
    sigma = float(guider.seg_blur_sigma)
    return {"sigma": None if sigma > guider.seg_blur_threshold_inf else sigma}


def _part(config: Any) -> Any:
    """The part that a description weakens; None if it is none of ours."""
    if type(config).__name__ == "SmoothedEnergyGuidanceConfig":
        return "attn_blur"
    if not hasattr(config, "skip_ff"):
        return None
    if not math.isclose(config.dropout, 1.0):
        return None
    if config.skip_attention and config.skip_ff:
        return "block"
    return "attn_identity" if config.skip_attention_scores and not config.skip_ff else None


def _layers(config: Any, part: Any, blocks: BlockMap) -> list[int]:
    """The blocks that a description names, counted over all stacks. `"auto"` is the first stack."""
    stack = blocks[0].stack if config.fqn == "auto" else config.fqn
    indices: Sequence[int] = [config.indices] if isinstance(config.indices, int) else config.indices
    return [block.index for block in blocks.select(indices, part, stack)]
