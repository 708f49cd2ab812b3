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
def added(model: nn.Module, direction: Direction, scale: float, passes: int) -> Iterator[None]:
    """Add scale * direction to every pass of a pipeline that runs the conditional pass of a step first.

    Args:
        model: the denoiser; its forward is ours meanwhile.
        direction: from the conditional prediction and the arguments it was made of.
        scale: of the direction.
        passes: of a step: 2 with CFG, which Wan's pipeline runs one after the other, 1 without.
    """
    plain = model.forward
    calls = 0
    d = torch.zeros(())

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, d
        out = plain(*args, **kwargs)
        if calls % passes == 0:
            d = scale * direction(out[0], args, kwargs)
        calls += 1
        return (out[0] + d, *out[1:])

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]


def random_direction(model: nn.Module, layer: int, seeds: Sequence[int]) -> Direction:
    """A direction with the norm of c - k, clip by clip, and nothing else of it; k skips `layer`."""
    generators = [torch.Generator().manual_seed(seed + 977) for seed in seeds]

    def direction(c: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
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
        k: Tensor = weak(*args, **(kwargs | {"encoder_hidden_states": text}))[0]
        return c - k

    return direction
