"""The dtype that a run computes in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation; the trained weights are fp32 in any case."""
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to `dtype`, or nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
