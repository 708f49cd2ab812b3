"""The attention backends of diffusers: how a processor is made to use torch's own attention for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from torch import nn

from skipguide.errors import SkipError

# the backends of diffusers that end in torch's scaled_dot_product_attention
_TORCH_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
_LOCK = RLock()
_BACKENDS: dict[int, tuple[int, Any]] = {}  # processor -> how many want torch's attention, and what it had before


@contextmanager
def on_torch_attention(module: nn.Module, name: str) -> Iterator[None]:
    """While inside, what is in `module` attends with torch's scaled_dot_product_attention, whatever backend is set.

    Raises:
        SkipError: under context parallelism, where no process sees all tokens in their order.
    """
    processors = [found for each in module.modules() if (found := getattr(each, "processor", None)) is not None]
    if any(getattr(processor, "_parallel_config", None) is not None for processor in processors):
        raise SkipError(
            f"attn_identity in the joint attention of {name} needs text and video tokens in their order, and context "
            f"parallelism deals them out: use part='block' or part='attn'"
        )
    others = [processor for processor in processors if _backend(processor) not in (None, *_TORCH_BACKENDS)]
    if not others:
        yield
        return
    with _LOCK:  # a processor is the model's: threads on the same model may be here at the same time
        for processor in others:
            users, before = _BACKENDS.get(id(processor), (0, processor._attention_backend))
            _BACKENDS[id(processor)] = users + 1, before
            processor._attention_backend = "native"
    try:
        yield
    finally:
        with _LOCK:
            for processor in others:
                users, before = _BACKENDS.pop(id(processor))
                if users > 1:
                    _BACKENDS[id(processor)] = users - 1, before
                else:
                    processor._attention_backend = before


def _backend(processor: Any) -> str | None:
    """The attention backend that a processor will use; None if it knows of none."""
    if id(processor) in _BACKENDS:
        return "another"
    if not hasattr(processor, "_attention_backend"):
        return None
    own = processor._attention_backend
    if own is None and (dispatch := sys.modules.get("diffusers.models.attention_dispatch")) is not None:
        own = dispatch._AttentionBackendRegistry._active_backend
    return None if own is None else str(getattr(own, "value", own))
