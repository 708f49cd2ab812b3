"""Find: the sublayers of a language model, described or found by a probe and proven on the spot."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from torch import nn

from skipguide.blocks import BlockMap
from skipguide.errors import SkipError
from skipguide.families.language import DecoderLayout, layout_of
from skipguide.hosts.wrappers import unwrap
from skipguide.llm.applied import AppliedSublayers
from skipguide.llm.probe import probe, prove
from skipguide.llm.sublayers import SublayerMap
from skipguide.spec import ModelSpec

logger = logging.getLogger(__name__)

_RECURRENT = ("mamba", "rwkv", "recurrent", "linearattention", "deltanet", "shortconv", "xlstm", "retention")
_RECURRENT_TYPES = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_sliding")


def sublayer_map(model: nn.Module) -> SublayerMap:
    """List the sublayers of a causal language model.

    Args:
        model: a model of a known family; wrappers (PEFT, torch.compile, data parallel) are looked through. The layers
            of another one are found by their shape and proven by a few passes over eight tokens, once.

    Raises:
        UnknownBlockError: for a model whose layers are not described and cannot be proven, with the reason.
        SkipError: for a model with recurrent layers: their state cannot leave out a layer and stay right.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> sublayer_map(model).site(1, "mlp").name
        'model.layers.1.mlp'
    """
    if not isinstance(model, nn.Module):
        raise SkipError(f"expected a causal language model (torch.nn.Module); got {type(model).__name__}")
    model = unwrap(model)
    refuse_recurrent(model)
    if (found := layout_of(model)) is None:
        return _probed(model)
    layout, path = found
    return SublayerMap(model, layout, path, BlockMap(model, ModelSpec((layout.block(model, path),))))


# What was probed, for as long as the model lives.
_PROBED: WeakKeyDictionary[nn.Module, tuple[DecoderLayout, str]] = WeakKeyDictionary()


def _probed(model: nn.Module) -> SublayerMap:
    proven = model in _PROBED
    layout, path = _PROBED[model] if proven else probe(model)
    found = SublayerMap(model, layout, path, BlockMap(model, ModelSpec((layout.block(model, path),))))
    if not proven:
        _PROBED[model] = layout, path
        try:
            prove(model, layout, len(found), lambda plan: AppliedSublayers(plan, found))
        except BaseException:
            del _PROBED[model]
            raise
        logger.info("%s is not described; its layers were found by a probe and proven on it", type(model).__name__)
    return found


def refuse_recurrent(model: nn.Module) -> None:
    """Raise for a model that carries a state from token to token other than keys and values."""
    config = getattr(model, "config", None)
    types = set(getattr(config, "layer_types", None) or ()) & set(_RECURRENT_TYPES)
    classes = {type(m).__name__ for m in model.modules() if any(w in type(m).__name__.lower() for w in _RECURRENT)}
    if types or classes:
        raise SkipError(
            f"{type(model).__name__} has recurrent layers ({', '.join(sorted(types | classes))}): their state cannot "
            f"be left out and stay right. Sublayer skipping is for attention models"
        )
