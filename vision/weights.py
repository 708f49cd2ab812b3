"""Weights from files: compared with the model before anything is copied into it.

Torch copies a tensor of one number or of another kind of number into a parameter without a word, and an optimizer takes
any state. What a file holds is therefore compared with the model first: names, shapes, kinds of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError

SHOWN = 4  # tensors that a refusal names


def check_weights(found: Any, own: Mapping[str, Tensor], where: str, advice: str, *, complete: bool = False) -> None:
    """Refuse tensors that are not those of a model.

    Args:
        found: name -> tensor, as the file has them.
        own: name -> tensor of the model.
        where: the file, for the error.
        advice: what to do.
        complete: whether every tensor of the model has to be there.

    Raises:
        SkipError: for something else than tensors by name, names that the model does not have or the file lacks,
            another shape, or another kind of numbers (whole numbers for floating ones); the precision may differ.

    Example:
        >>> own = {"scale": torch.ones(2)}
        >>> check_weights({"scale": torch.ones(2, dtype=torch.float16)}, own, "a.pt", "train it anew", complete=True)
        >>> check_weights({"scale": torch.ones(1)}, own, "a.pt", "train it anew")
        Traceback (most recent call last):
        ...
        skipguide.errors.SkipError: expected the weights of this model in a.pt; scale is float32 [1] and not float32 \
[2]: train it anew
    """
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise SkipError(f"expected tensors by name in {where}; got {_kind_of(found)}: {advice}")
    wrong = [f"{name} is of no parameter" for name in found if name not in own]
    wrong += [f"{name} is missing" for name in own if complete and name not in found]
    wrong += [
        f"{name} is {_described(tensor)} and not {_described(own[name])}"
        for name, tensor in found.items()
        if name in own and (tensor.shape != own[name].shape or _kind(tensor) != _kind(own[name]))
    ]
    if wrong:
        more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        raise SkipError(f"expected the weights of this model in {where}; {', '.join(wrong[:SHOWN])}{more}: {advice}")


def check_file(file: Path, own: Mapping[str, Tensor], advice: str) -> None:
    """Refuse a safetensors file whose tensors have other shapes or kinds than those of the model of the same name.

    Names are left to whoever loads the file, which may hold tensors that are shared under one of their names.

    Raises:
        SkipError: naming the tensors; also for a file that is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in own:
                    check_weights({name: opened.get_tensor(name)}, own, str(file), advice)
    except (OSError, SafetensorError) as error:
        raise SkipError(f"expected weights in {file}; it is damaged, or not there ({error}): save it anew") from error


def check_optimizer(found: Any, optimizer: torch.optim.Optimizer, where: str, advice: str) -> None:
    """Refuse the state of another optimizer, or one whose tensors are not of its parameters' shapes.

    Raises:
        SkipError: saying what differs.
    """
    own = optimizer.state_dict()
    try:
        same = [len(group["params"]) for group in found["param_groups"]] == [
            len(group["params"]) for group in own["param_groups"]
        ]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in found["param_groups"] for number in group["params"]]
        kept = {number: dict(values) for number, values in found["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SkipError(f"expected the state of an optimizer in {where}; got {_kind_of(found)}: {advice}") from error
    if not same or set(kept) - set(numbers):
        raise SkipError(f"expected the state of this {type(optimizer).__name__} in {where}; got another's: {advice}")
    for parameter, number in zip(parameters, numbers, strict=True):
        for name, value in kept.get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise SkipError(
                    f"expected {name} of shape {list(parameter.shape)} in the optimizer's state of {where}; got "
                    f"{list(value.shape)}: {advice}"
                )


def _kind(tensor: Tensor) -> str:
    """The kind of its numbers, whatever their precision."""
    if tensor.dtype is torch.bool:
        return "bool"
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _kind_of(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} that holds something else"
    return f"a {type(found).__name__}"
