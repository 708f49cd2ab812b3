"""Stable Diffusion 3: the pass without `skip_guidance_layers` that its pipeline makes inside a window of the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipguide.blocks import BlockMap
from skipguide.errors import SkipError
from skipguide.pipelines.native.variants import NativeKind, Place, Variant
from skipguide.pipelines.sampling.call_stack import look_up


def _read(given: Mapping[str, Any], blocks: BlockMap) -> Variant | None:
    left_out = frozenset(given.get("skip_layers") or ()) & frozenset(range(len(blocks)))
    if not left_out:
        return None
    refusal = ""
    if given.get("block_controlnet_hidden_states") is not None:
        refusal = "a ControlNet adds to the stream between the blocks that are left out"
    return Variant("skipped layers", min(left_out), left_out=left_out, refusal=refusal)


def _foretell(pipe: Any, blocks: BlockMap) -> tuple[Place, ...]:
    if not getattr(pipe, "do_classifier_free_guidance", False):
        return ()
    try:
        step, steps, start, stop, layers = (
            look_up(pipe, f"call.{name}", optional=True)
            for name in (
                *("i", "num_inference_steps", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
                "skip_guidance_layers",
            )
        )
    except SkipError:
        return ()
    if None in (step, steps, start, stop) or not steps * start < step < steps * stop:
        return ()
    found = set(layers or ()) & set(range(len(blocks)))
    return (Place(min(found)),) if found else ()


SD3 = NativeKind(
    "Stable Diffusion 3", models=("SD3Transformer2DModel",), marks=("skip_layers",), read=_read, foretell=_foretell
)
