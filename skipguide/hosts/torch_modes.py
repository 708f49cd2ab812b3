"""Modes of torch: a call in one, which leaves nothing on torch's stack, whatever interrupts it."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from skipguide.active import Call


def call_in(mode: TorchFunctionMode, call: Call, /, *args: Any, **kwargs: Any) -> Any:
    """Call something in a mode.

    While torch handles a function in a mode, the mode is off its stack. An interrupt (Ctrl-C) there loses it, and
    leaving the mode would fail in place of the interrupt; elsewhere one can leave it on the stack. So what is above the
    stack's former height goes, and nothing else is asked.
    """
    depth = torch._C._len_torch_function_stack()
    try:
        mode.__enter__()  # type: ignore[no-untyped-call]
        return call(*args, **kwargs)
    finally:
        try:
            _lower(depth)
        except BaseException:  # Ctrl-C: what was broken off is done again
            _lower(depth)
            raise


def _lower(depth: int) -> None:
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()
