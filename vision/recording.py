"""Passes that are recorded to be run again elsewhere: traces (`torch.jit.trace`), exports (`torch.export`, ONNX).

What a recorded pass decided for its example it decides for every input. So whoever decides by values refuses, and
checks that read values are left out: they cannot be a part of the record.
"""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether `torch.jit.trace` records this pass."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def is_exported() -> bool:
    """Whether `torch.export` (and ONNX by way of it) records this pass."""
    return bool(torch.compiler.is_exporting())


def is_recorded() -> bool:
    """Whether this pass is traced, exported or compiled: its values are not known while it runs."""
    return is_traced() or is_exported() or bool(torch.compiler.is_compiling())
