"""Guiders of diffusers that skip or perturb layers with hooks: SkipLayerGuidance, PerturbedAttentionGuidance and SEG.

Such a guider puts hooks on some blocks, or on modules in them, for the one pass that is to be weaker. Which pass that
is, is read from the hooks. A guider that does not do what it says is refused with the name of ours (`refuse_broken`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from skipguide.blocks import Block, BlockMap
from skipguide.errors import SkipError
from skipguide.hosts.diffusers_hooks import hooks_on
from skipguide.pipelines.native.variants import NativeKind, Place, Variant

_BLOCK_HOOK = "TransformerBlockSkipHook"
_HOOKS = (_BLOCK_HOOK, "AttentionProcessorSkipHook", "FeedForwardSkipHook", "SmoothedEnergyGuidanceHook")
_OURS = "SkipGuider([...], scale=...).attach(pipe) skips the same layers, and shares the beginning by itself"


def _read(given: Mapping[str, Any], blocks: BlockMap) -> Variant | None:
    touched: list[int] = []
    left_out: list[int] = []
    for block in blocks:
        on_block = hooks_on(block.module, (_BLOCK_HOOK,))
        if any(getattr(hook, "dropout", 1.0) == 1.0 for hook in on_block):
            left_out.append(block.index)
        if on_block or any(hooks_on(module, _HOOKS) for module in block.module.modules()):
            touched.append(block.index)
    if not touched:
        return None
    swapped = any(_swaps(blocks[index]) for index in left_out)
    refusal = "diffusers' hook exchanges the streams of the blocks that it skips" if swapped else ""
    return Variant("hooked layers", touched[0], left_out=frozenset(left_out), refusal=refusal)


def _swaps(block: Block) -> bool:
    """Whether diffusers' hook gives something else than the streams that the block returns, in their order."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        metadata = TransformerBlockRegistry.get(type(block.module))
    except ValueError:
        return False  # no hook can be put on it
    alone = metadata.return_encoder_hidden_states_index is None
    given = ("hidden_states",) if alone else ("hidden_states", "encoder_hidden_states")
    spec = block.spec
    return (spec.returns or spec.streams) != given or bool(spec.none_outputs or spec.adds)


# -- where the hooks will be ------------------------------------------------------------------------------------------


def _foretell(pipe: Any, blocks: BlockMap) -> tuple[Place, ...]:
    guider = _guider_of(pipe, blocks.model)
    if guider is None or not any(_tells(guider, name) for name in ("_is_slg_enabled", "_is_seg_enabled")):
        return ()
    found = sorted({block.index for config in _configs(guider) for block in _named(config, blocks)})
    return (Place(found[0]),) if found else ()


def _tells(guider: Any, name: str) -> bool:
    return bool(asked()) if callable(asked := getattr(guider, name, None)) else False


def _guider_of(pipe: Any, model: nn.Module) -> Any:
    second = getattr(pipe, "transformer_2", None) is model and getattr(pipe, "guider_2", None) is not None
    return getattr(pipe, "guider_2" if second else "guider", None)


def _configs(guider: Any) -> list[Any]:
    """What a guider says of the layers that it hooks."""
    names = ("skip_layer_config", "seg_guidance_config")
    return [config for name in names for config in getattr(guider, name, None) or ()]


def _named(config: Any, blocks: BlockMap) -> Iterator[Block]:
    """The blocks that one of them names."""
    stack = config.fqn
    if stack == "auto":
        from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN  # the first one there is

        stack = next((name for name in KNOWN if hasattr(blocks.model, name)), "")
    indices = [config.indices] if isinstance(config.indices, int) else config.indices
    names = {f"{stack}.{index}" for index in indices}
    return (block for block in blocks if block.name in names)


# -- guiders that do not do what they say -----------------------------------------------------------------------------


def refuse_broken(pipe: Any, blocks: BlockMap) -> None:
    """Refuse a guider of diffusers that would fail on this model, or do something else than it says.

    Raises:
        SkipError: saying what it does, and which guider of ours to take.
    """
    guider = _guider_of(pipe, blocks.model)
    name, model = type(guider).__name__, type(blocks.model).__name__
    if not (configs := _configs(guider)):
        return
    if name == "SmoothedEnergyGuidance" and not _counts(guider):
        raise SkipError(
            f"{name} of this diffusers never puts its hooks on (it does not count its passes), so its third pass is a "
            f"second conditional one: {_OURS}"
        )
    for config in configs:
        if isinstance(config.indices, int):
            raise SkipError(
                f"{name} of this diffusers fails on layers that are given as whole numbers (their indices are to be a "
                f"list): give it a config of its own, LayerSkipConfig([{config.indices}]); or {_OURS}"
            )
        named = list(_named(config, blocks))
        if getattr(config, "skip_attention_scores", False):
            for block in named:
                if why := _unknown_attention(block):
                    raise SkipError(f"{name} of this diffusers fails on {model}: {why}. {_OURS} (part='attn_identity')")
            continue
        whole = getattr(config, "skip_attention", False) and getattr(config, "skip_ff", False)
        if whole and any(_swaps(block) for block in named):
            raise SkipError(
                f"{name} of this diffusers exchanges the streams of the blocks that it skips in {model}, whose blocks "
                f"return them in another order than its hook: {_OURS}"
            )


def _counts(guider: Any) -> bool:
    """Whether a guider notes its passes, on which its hooks depend."""
    probe = copy.copy(guider)
    probe._enabled, probe._count_prepared = False, 0
    probe.prepare_models(nn.Module())
    return bool(probe._count_prepared)


def _unknown_attention(block: Block) -> str:
    """Why diffusers cannot put its attention hook on a block; empty if it can."""
    from diffusers.hooks._common import _ATTENTION_CLASSES
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    for module in block.module.modules():
        if not isinstance(module, _ATTENTION_CLASSES):
            continue
        if not hasattr(module, "is_cross_attention"):
            return f"{type(module).__name__} does not say whether it is self-attention"
        if not module.is_cross_attention:
            try:
                AttentionProcessorRegistry.get(type(module.processor))
            except ValueError:
                return f"{type(module.processor).__name__} is not registered there"
    return ""


GUIDERS = NativeKind("guiders with hooks", read=_read, foretell=_foretell, hooked=True)
