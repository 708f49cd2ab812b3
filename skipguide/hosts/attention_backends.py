"""The attention backends of diffusers: how a processor is made to use torch's own attention for a while."""

from __future__ import annotations

import sys
from threading import RLock
from typing import Any

from torch import nn

from skipguide.errors import SkipError

# the backends of diffusers that end in torch's scaled_dot_product_attention
_TORCH_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
_LOCK = RLock()
_OVERRIDES: dict[int, _Override] = {}  # by processor


class _Override:
    """A processor that uses torch's attention for a while: who wants that, and what it had before."""

    __slots__ = ("backend", "processor", "users")

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.backend = processor._attention_backend
        self.users: set[TorchAttention] = set()


class TorchAttention:
    """What is in a module attends with torch's scaled_dot_product_attention for a while, whatever backend is set.

    Holding and releasing can be repeated, from wherever an interrupt has left them.

    Args:
        module: whose attention.
        name: for the error.
        part: of the plan, for the error.

    Raises:
        SkipError: under context parallelism, where no process sees all tokens in their order.
    """

    __slots__ = ("processors",)

    def __init__(self, module: nn.Module, name: str, part: str = "attn_identity") -> None:
        found = [each for part in module.modules() if (each := getattr(part, "processor", None)) is not None]
        if any(getattr(processor, "_parallel_config", None) is not None for processor in found):
            raise SkipError(
                f"{part} in the attention of {name} needs text and video tokens in their order, and "
                f"context parallelism deals them out: use part='block' or part='attn'"
            )
        self.processors = [processor for processor in found if _backend(processor) not in (None, *_TORCH_BACKENDS)]

    def hold(self) -> None:
        """Use torch's attention."""
        for processor in self.processors:
            with _LOCK:  # a processor is the model's: threads on the same model may be here at the same time
                if (override := _OVERRIDES.get(id(processor))) is None:
                    override = _OVERRIDES[id(processor)] = _Override(processor)
                override.users.add(self)
                processor._attention_backend = "native"

    def release(self) -> None:
        """Go back to what was set; the last user does it."""
        for processor in self.processors:
            with _LOCK:
                if (override := _OVERRIDES.get(id(processor))) is None:
                    continue
                override.users.discard(self)
                if not override.users:
                    processor._attention_backend = override.backend
                    del _OVERRIDES[id(processor)]


def _backend(processor: Any) -> str | None:
    """The attention backend that a processor will use; None if it knows of none."""
    if id(processor) in _OVERRIDES:
        return "another"
    if not hasattr(processor, "_attention_backend"):
        return None
    own = processor._attention_backend
    if own is None and (dispatch := sys.modules.get("diffusers.models.attention_dispatch")) is not None:
        own = dispatch._AttentionBackendRegistry._active_backend
    return None if own is None else str(getattr(own, "value", own))
