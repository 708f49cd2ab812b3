"""Watches a model's operations, so that each one on positions respects the masks.

A `TorchFunctionMode` sees what the model does between its modules (an add, a `cat`, a mean) as well as its layers.
Each operation on an activation of the pass goes to its rule, which reports an `Op` and runs it as the pass says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.activation_info import TAG, ActivationInfo, tensors_in
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.rules.names import name_of, running_module
from skipguide.vision.layer_masking.rules.table import apply_rule


class MaskingMode(TorchFunctionMode):
    """Inside, operations on the activations of a pass run by their rules.

    Args:
        masked: the pass.
        known: ids of the model's parameters and buffers, which no operation has to have made.
    """

    def __init__(self, masked: MaskedPass, known: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.masked, self.known = masked, known

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        kwargs = {} if kwargs is None else kwargs
        masked = self.masked
        placed: list[Tensor] = []
        without_positions = False  # but made of activations that had them
        given = (*args, *kwargs.values()) if kwargs else args
        if any(isinstance(value, (list, tuple)) for value in given):
            given = tuple(tensors_in(given))
        for tensor in given:
            if not isinstance(tensor, Tensor):
                continue
            info = getattr(tensor, TAG, None)
            if info is not None and info.owner is masked:
                if info.number is None:
                    without_positions |= not info.constant
                else:
                    placed.append(tensor)
            elif masked.plan is None and tensor.ndim >= 3 and id(tensor) not in self.known:
                self._refuse_unknown(func, tensor)
        if placed:
            return apply_rule(masked, func, args, kwargs, placed)
        if without_positions and not masked.dynamic and masked.plan is None:
            self._note_reading(func)
        out = func(*args, **kwargs)
        self._note_without_positions(out, constant=not without_positions)
        return out

    def _note_without_positions(self, out: Any, constant: bool) -> None:
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out) if isinstance(out, (list, tuple)) else ():
            if id(tensor) not in self.known:
                setattr(tensor, TAG, ActivationInfo(self.masked, None, constant=constant))

    def _refuse_unknown(self, func: Callable[..., Any], tensor: Tensor) -> None:
        """Refuse a tensor that may hold positions and that no operation seen here has made."""
        if getattr(func, "__name__", "") in ("__get__", "size", "dim", "__set__", "__len__"):
            return
        raise SkipError(
            f"layer masking cannot follow the model: {name_of(func)}{running_module()} takes a tensor "
            f"{tuple(tensor.shape)} that no operation of torch made here (a custom autograd function, a compiled or "
            f"scripted part). Use the model without it"
        )

    def _note_reading(self, func: Callable[..., Any]) -> None:
        """A forward that reads values may take another path on other images: its trace holds for this call alone.

        Unless nothing on positions follows, such as after an assertion on the logits.
        """
        name = name_of(func)
        if name in ("bool", "item", "tolist", "nonzero", "numpy", "int", "float_", "unique", "index"):
            self.masked.read = f"its forward looks at values ({name})"
