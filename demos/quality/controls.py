"""Controls: what stands in for c - k while a control runs. The same arithmetic as skip guidance, by plain code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipguide import Skipper, SkipPlan

Direction = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


@contextmanager
def added(model: nn.Module, direction: Direction, scale: float) -> Iterator[None]:
    """Add scale * direction to both branches of every step of a pipeline that has CFG in one batch [u, c]."""
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        u, c = out[0].chunk(2)
        d = scale * direction(c, args, kwargs)
        return (torch.cat([u + d, c + d]), *out[1:])

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]


def _conditional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def half(value: Any) -> Any:
        return value.chunk(2)[1] if isinstance(value, Tensor) and value.dim() and len(value) % 2 == 0 else value

    return tuple(map(half, args)), {name: half(value) for name, value in kwargs.items()}


def random_direction(model: nn.Module, layer: int, seeds: Sequence[int]) -> Direction:
    """A direction with the norm of c - k, clip by clip, and nothing else of it; k skips `layer`."""
    generators = [torch.Generator().manual_seed(seed + 977) for seed in seeds]

    def direction(c: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        args, kwargs = _conditional(args, kwargs)
        wrapped = model.__dict__.pop("forward")
        try:
            with Skipper(model, SkipPlan([layer])):
                k = model(*args, **kwargs)[0]
        finally:
            model.__dict__["forward"] = wrapped
        noise = torch.stack([torch.randn(c.shape[1:], generator=generator) for generator in generators])
        size = (c - k).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
        return noise * size.view(-1, *[1] * (c.dim() - 1))

    return direction


def weak_direction(weak: nn.Module, text: Tensor) -> Direction:
    """c minus the prediction of a weaker model, which has its own text embeddings."""

    def direction(c: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        args, kwargs = _conditional(args, kwargs)
        k: Tensor = weak(*args, **(kwargs | {"encoder_hidden_states": text}))[0]
        return c - k

    return direction
