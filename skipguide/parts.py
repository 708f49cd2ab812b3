"""Parts: what of a block a plan may name. One entry each; what happens at a part is said in `interventions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["block", "attn", "cross_attn", "mlp", "attn_identity"]


@dataclass(frozen=True)
class PartSpec:
    """One part of a block, as data.

    Args:
        sublayers: the kinds of sublayers that it consists of, as `BlockSpec` names them; none is the block as a whole.
        needs: flag of a `BlockSpec` that must be true for its blocks to have this part.
        runs: whether its sublayers still run, changed: then what serves them alone runs too, and their keys are kept.
    """

    sublayers: tuple[str, ...] = ()
    needs: str = ""
    runs: bool = False


PART_SPECS: Mapping[str, PartSpec] = {
    "block": PartSpec(),
    "attn": PartSpec(("attn",)),
    "cross_attn": PartSpec(("cross_attn",)),
    "mlp": PartSpec(("mlp",)),
    "attn_identity": PartSpec(("attn",), needs="identity"),
}
PARTS: tuple[Part, ...] = get_args(Part)
