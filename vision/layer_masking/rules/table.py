"""Which operations of torch are understood on masked activations, and the rule for each.

What is not in the table is refused by name: an operation that mixes positions in a way that is not understood would
silently let hidden pixels influence visible ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.rules.arguments import Arguments, Rule
from skipguide.vision.layer_masking.rules.names import BINARY, QUESTIONS, UNARY, name_of, running_module
from skipguide.vision.layer_masking.rules.pointwise import answer_question, pointwise
from skipguide.vision.layer_masking.rules.reductions import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    amax,
    mean,
    reduction,
)
from skipguide.vision.layer_masking.rules.reshaping import cat, expand_as, layer_norm, permute, reshape, split
from skipguide.vision.layer_masking.rules.rows import choose, getitem, index_select, scatter
from skipguide.vision.layer_masking.rules.windows import conv2d, pad, pooling

RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY | BINARY, pointwise),
    **dict.fromkeys(("layer_norm", "linear", "rms_norm"), layer_norm),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), permute),
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten"), reshape),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), split),
    **dict.fromkeys(("index_copy", "index_put", "setitem"), scatter),
    **dict.fromkeys(("norm", "vector_norm"), reduction("norm")),
    "conv2d": conv2d,
    "max_pool2d": pooling("max"),
    "avg_pool2d": pooling("avg"),
    "pad": pad,
    "mean": mean,
    "sum": reduction("sum"),
    "amax": amax,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "expand_as": expand_as,
    "getitem": getitem,
    "index_select": index_select,
    "where": choose,
}


def apply_rule(
    masked: MaskedPass, func: Callable[..., Any], args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """Do one operation on masked activations.

    Raises:
        SkipError: for one that is not understood, named.
    """
    name = name_of(func)
    if name in QUESTIONS:
        return answer_question(masked, func, name, args, kwargs)
    rule = RULES.get(name)
    if rule is None:
        shapes = ", ".join(str(tuple(t.shape)) for t in placed)
        raise SkipError(
            f"layer masking does not know the operation {name!r}{running_module()} on activations {shapes}: it may mix "
            f"hidden and visible positions. Known: convolutions, pools, norms per position, adds, cat; see "
            f"skipguide.vision.layer_masking.rules"
        )
    return rule(masked, func, name, args, kwargs, placed)


__all__ = ["RULES", "apply_rule"]
