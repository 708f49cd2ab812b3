"""Perturbed attention (the PAG pipelines): the last part of a batch is the conditional part with other attention.

These pipelines put processors on the attention of some blocks that treat the parts of a batch differently: `[u, c, p]`
with CFG, `[c, p]` without it. Which parts there are is read from the class of the processors in force. The model makes
one call, so up to the first such block the last part does not run and gets a copy of the conditional rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipguide.arguments import batch_size
from skipguide.blocks import BlockMap
from skipguide.pipelines.native.variants import NativeKind, Place, Variant

# class of the processor -> into how many parts it takes a batch; the last one is perturbed, the one before is not
PARTS = {
    "PAGCFGJointAttnProcessor2_0": 3,
    "PAGCFGHunyuanAttnProcessor2_0": 3,
    "PAGCFGIdentitySelfAttnProcessor2_0": 3,
    "PAGCFGSanaLinearAttnProcessor2_0": 3,
    "PAGJointAttnProcessor2_0": 2,
    "PAGHunyuanAttnProcessor2_0": 2,
    "PAGIdentitySelfAttnProcessor2_0": 2,
    "PAGIdentitySanaLinearAttnProcessor2_0": 2,
}
_KIND = "perturbed attention"


def _parts(processor: Any) -> int:
    """Into how many parts a processor takes a batch; 0 for one that treats all rows alike."""
    return next((PARTS[cls.__name__] for cls in type(processor).__mro__ if cls.__name__ in PARTS), 0)


def _read(given: Mapping[str, Any], blocks: BlockMap) -> Variant | None:
    numbers = {id(module): _parts(module.__dict__.get("processor")) for module in blocks.model.modules()}
    perturbed = {key: number for key, number in numbers.items() if number}
    if not perturbed:
        return None
    batch = batch_size((), dict(given))
    number = max(perturbed.values())
    if number != min(perturbed.values()) or batch % number:
        return Variant(_KIND, 0, refusal="its processors take the batch into different parts")
    found = [block.index for block in blocks if any(id(module) in perturbed for module in block.module.modules())]
    inside = {id(module) for index in found for module in blocks[index].module.modules()}
    if not perturbed.keys() <= inside:
        return Variant(_KIND, 0, refusal="attention outside of the known blocks is perturbed")
    each = batch // number
    return Variant(_KIND, min(found), sources={row: (row - each,) for row in range(batch - each, batch)})


def _foretell(pipe: Any, blocks: BlockMap) -> tuple[Place, ...]:
    return ()  # all in one call: nothing is kept


PAG = NativeKind(
    "perturbed attention",
    models=(
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "PixArtTransformer2DModel",
        "HunyuanDiT2DModel",
        "UNetMotionModel",
        "UNet2DConditionModel",
    ),
    read=_read,
    foretell=_foretell,
)
