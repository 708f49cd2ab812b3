"""Random inputs for the families that ship, from a model's config: what `check(model)` runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.arguments import sequence_like
from skipguide.errors import SkipError
from skipguide.families.language import layout_of
from skipguide.families.samples.image import IMAGE_SAMPLES
from skipguide.families.samples.unet import UNET_SAMPLES
from skipguide.families.samples.video import TEXT, VIDEO_SAMPLES
from skipguide.hosts.accelerate import execution_device


def sample_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one small forward call, for a model of a known family.

    Raises:
        SkipError: for other models; the caller gives inputs then.
    """
    if layout_of(model) is not None:
        return _tokens(model)
    for cls in type(model).__mro__:
        if cls.__name__ in _SAMPLES:
            parameter = next(p for p in model.parameters() if p.is_floating_point())
            inputs = _SAMPLES[cls.__name__](model.config)
            return {k: _place(v, execution_device(model), parameter.dtype) for k, v in inputs.items()}
    raise SkipError(
        f"no sample inputs for {type(model).__name__}: pass the keyword arguments of one forward call, "
        f"check(model, inputs)"
    )


def _tokens(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    size = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    ids = torch.randint(size, (1, TEXT), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(execution_device(model)), "use_cache": False}


def _place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return sequence_like(value, (_place(item, device, dtype) for item in value))
    if isinstance(value, dict):
        return {name: _place(item, device, dtype) for name, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


_SAMPLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    **VIDEO_SAMPLES,
    **UNET_SAMPLES,
    **IMAGE_SAMPLES,
}
