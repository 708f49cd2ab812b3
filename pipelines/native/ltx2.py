"""LTX-2: the pass with perturbed self-attention (STG) and the pass with video and sound apart (modality isolation).

Both are calls with arguments of their own. The STG pass is the conditional one up to its first perturbed block. The
modality pass leaves out the attention between the streams in every block, so it differs from the first block on; what
that block does before it, self-attention and attention to the text, is the same in both. Beyond that, the keys and
values of the texts are the same in all blocks: they are not shared, because they would have to be kept for every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from skipguide.blocks import BlockMap
from skipguide.errors import SkipError
from skipguide.pipelines.native.variants import NativeKind, Place, Variant
from skipguide.pipelines.sampling.call_stack import look_up

IDLE_STG = "STG that changes nothing (perturbed_attn=False in the config)"
_BLOCKS = "spatio_temporal_guidance_blocks"
_BEFORE_THE_OTHER_STREAM = ("attn1", "audio_attn1", "attn2", "audio_attn2")


def _read(given: Mapping[str, Any], blocks: BlockMap) -> Variant | None:
    perturbed = sorted({*(given.get(_BLOCKS) or ())} & set(range(len(blocks))))
    if given.get("isolate_modalities"):
        common = () if 0 in perturbed else _BEFORE_THE_OTHER_STREAM
        return Variant("modality isolation", 0, common)
    if not perturbed:
        return None
    weights = _weights(given.get("perturbation_mask"))
    plain = tuple(row for row, weight in enumerate(weights) if weight == 1)
    if not plain:
        return Variant(_kind(blocks), perturbed[0])
    if len(plain) == len(weights):
        return None
    sources = {row: plain for row in range(len(weights)) if row not in plain}
    return Variant(_kind(blocks), perturbed[0], sources=sources)


def _kind(blocks: BlockMap) -> str:
    """What the pass is called; a transformer that was not made for it ignores which blocks are to be perturbed."""
    config: Any = blocks.model.config
    return "STG" if config.get("perturbed_attn") else IDLE_STG


def _weights(mask: Any) -> list[float]:
    """How far the self-attention of each row is its own, 0 to 1; none where all rows are perturbed."""
    if not isinstance(mask, Tensor):
        return []
    values = mask.flatten(1) if mask.dim() > 1 else mask[:, None]
    return [float(row[0]) if len(set(row)) == 1 else 0.5 for row in values.tolist()]


def _foretell(pipe: Any, blocks: BlockMap) -> tuple[Place, ...]:
    named: list[Any] = [getattr(pipe, name, None) for name in ("guider", "audio_guider")]
    guiders = [each for each in named if hasattr(each, "is_stg_enabled")]  # LTX2Guidance of diffusers
    if guiders:
        perturbed = getattr(named[0], _BLOCKS, None)  # of the video's: the denoiser asks no other
        stg, isolated = any(g.is_stg_enabled() for g in guiders), any(g.is_modality_enabled() for g in guiders)
    else:
        stg = getattr(pipe, "do_spatio_temporal_guidance", False)
        isolated = getattr(pipe, "do_modality_isolation_guidance", False)
        perturbed = _of_the_call(pipe) if stg else None
    found = []
    if stg and (inside := sorted({*(perturbed or ())} & set(range(len(blocks))))):
        found.append(Place(inside[0]))
    if isolated:
        found.append(Place(0, _BEFORE_THE_OTHER_STREAM))
    return tuple(found)


def _of_the_call(pipe: Any) -> Any:
    try:
        return look_up(pipe, f"call.{_BLOCKS}", optional=True)
    except SkipError:
        return None


LTX2 = NativeKind(
    "LTX-2",
    models=("LTX2VideoTransformer3DModel",),
    marks=(_BLOCKS, "isolate_modalities", "perturbation_mask"),
    read=_read,
    foretell=_foretell,
)
