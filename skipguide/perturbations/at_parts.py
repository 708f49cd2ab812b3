"""At parts: what a plan with each part does to one block. A new part is one entry here and one in `parts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from skipguide.active import Intervention
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.interventions import SkipBlock, ZeroBranch
from skipguide.parts import Perturbation
from skipguide.perturbations.attention import Change, ChangedAttention
from skipguide.perturbations.attention_maps import Blur, Windows, identity
from skipguide.perturbations.strength import Between, ScaledBranch
from skipguide.perturbations.tokens import MovedTokens, Shuffle, Swap
from skipguide.perturbations.values import ValuesPass

# A module that a part of a block concerns: its name, itself, and what happens there.
Placed = tuple[str, nn.Module, Intervention]


def _block(block: Block, how: Perturbation) -> list[Placed]:
    if how.strength < 1:
        return [(block.name, block.module, Between(SkipBlock(block, counted=0), how.strength))]
    return [(block.name, block.module, SkipBlock(block))]


def _branches(block: Block, how: Perturbation) -> list[Placed]:
    found = block.sublayers(how.part)
    if how.strength == 1:
        return [(name, module, ZeroBranch(name, module, sublayer)) for name, module, sublayer in found]
    if block.spec.cached:
        raise SkipError(
            f"strength={how.strength:g} scales what {how.part} adds to the stream, and in language models a norm may "
            f"follow that undoes it: use strength=1, or part='block'"
        )
    placed: dict[int, Placed] = {}
    for name, module, sublayer in found:
        places = [(f"{block.name}.{path}", block.submodule(path)) for path in sublayer.scaled_at] or [(name, module)]
        for own, there in places:
            if there is not None:
                placed[id(there)] = (own, there, ScaledBranch(there, sublayer, how.strength))
    return list(placed.values())


def _values(block: Block, how: Perturbation) -> list[Placed]:
    if block.spec.joint or how.runs:
        return _attention(block, how, identity)
    return [(name, module, ValuesPass(name, module)) for name, module, _ in block.sublayers(how.part)]


def _attention(block: Block, how: Perturbation, change: Change) -> list[Placed]:
    found = block.sublayers(how.part)
    _check_heads(how, found[0][1])
    if block.spec.joint:
        return [(block.name, block.module, ChangedAttention(block.name, block.module, block, how, change))]
    image = [(name, module) for name, module, sublayer in found if sublayer.image or how.part == "attn_identity"]
    return [(name, module, ChangedAttention(name, module, block, how, change)) for name, module in image]


def _check_heads(how: Perturbation, attention: nn.Module) -> None:
    """Refuse heads that an attention does not have, where it says how many it has."""
    count = getattr(attention, "heads", None)
    if isinstance(how.heads, tuple) and isinstance(count, int) and how.heads[-1] >= count:
        raise SkipError(f"{type(attention).__name__} has {count} heads, 0 to {count - 1}; got heads={list(how.heads)}")


def _blur(block: Block, how: Perturbation) -> list[Placed]:
    return _attention(block, how, Blur(how.option("sigma")))


def _windows(block: Block, how: Perturbation) -> list[Placed]:
    return _attention(block, how, Windows(how.part == "window_time", how.option("window"), how.part))


def _shuffle(block: Block, how: Perturbation) -> list[Placed]:
    move = Shuffle(how.option("seed"), block.index)
    return [(block.name, block.module, MovedTokens(block, how.part, how.strength, move))]


def _swap(block: Block, how: Perturbation) -> list[Placed]:
    move = Swap(how.option("ratio"), how.option("over"))
    return [(block.name, block.module, MovedTokens(block, how.part, how.strength, move))]


# Part -> what a plan with that part does to one block; `parts` says which blocks have it, and its options.
AT_PARTS: Mapping[str, Callable[[Block, Perturbation], list[Placed]]] = {
    "block": _block,
    "attn": _branches,
    "cross_attn": _branches,
    "mlp": _branches,
    "attn_identity": _values,
    "attn_blur": _blur,
    "window_time": _windows,
    "window_space": _windows,
    "token_shuffle": _shuffle,
    "self_swap": _swap,
}
