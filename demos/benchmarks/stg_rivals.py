"""Other ways to pay for the skipped pass, written out for the benchmark.

Each stands at the transformer's forward during `pipe(...)`, as skipguide does, and adds the same delta to both
branches of a step. All of them arrive at the same latents; what differs is what they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from demos.benchmarks.stg_models import Case

Kwargs = dict[str, Any]


def blocks_of(transformer: nn.Module) -> list[tuple[str, int, nn.Module]]:
    """Every block in execution order: name of its list, place in it, module."""
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    stacks = [(name, getattr(transformer, name)) for name in names if hasattr(transformer, name)]
    return [(name, place, block) for name, stack in stacks for place, block in enumerate(stack)]


@contextmanager
def counting(transformer: nn.Module) -> Iterator[list[int]]:
    """Rows on which each block really ran: counted at its self-attention, which runs once in every block that runs."""
    blocks = [block for _, _, block in blocks_of(transformer)]
    rows = [0] * len(blocks)

    def count(place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
            rows[place] += (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[0]

        return hook

    handles = [
        (block.attn1 if hasattr(block, "attn1") else block.attn).register_forward_pre_hook(count(i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undone(block: nn.Module, start: int) -> Iterator[None]:
    """The block is computed for every row, and the rows from `start` on are then overwritten with its input."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs, output: Any) -> None:
        names = ("hidden_states", "encoder_hidden_states")
        given = [kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)]
        for made, came in zip((output,) if isinstance(output, Tensor) else output, given, strict=False):
            made[start:] = came[start:]

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Rival:
    """Skip guidance at a transformer's forward; subclasses say how c, u and k are computed."""

    def __init__(self, pipe: Any, case: Case, call: Kwargs, layer: int, scale: float) -> None:
        self.model = pipe.transformer
        self.case = case
        self.negative = {name: call[source] for name, source in case.uncond.items()}
        self.blocks = blocks_of(self.model)
        self.layer = layer
        self.scale = scale
        self.delta: Tensor | None = None

    def __enter__(self) -> Rival:
        self.forward = self.model.forward
        self.model.forward = self
        return self

    def __exit__(self, *exc: object) -> None:
        del self.model.forward
        self.delta = None

    def __call__(self, **call: Any) -> tuple[Tensor]:
        if self.case.cfg == "batched":
            u, c, k = self.both(call)
            delta = self.scale * (c - k)
            return (torch.cat([u + delta, c + delta]),)
        if self.delta is not None and self.case.cfg == "two_calls":
            out, self.delta = self.uncond(call) + self.delta, None
            return (out,)
        c, k = self.cond(call)
        self.delta = self.scale * (c - k)
        return (c + self.delta,)

    def both(self, call: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
        """u, c and k where the pipeline asks for rows [uncond, cond]."""
        raise NotImplementedError

    def cond(self, call: Kwargs) -> tuple[Tensor, Tensor]:
        """c and k where the pipeline asks for the conditional branch."""
        raise NotImplementedError

    def uncond(self, call: Kwargs) -> Tensor:
        """u where the pipeline asks for it after the conditional branch."""
        return self.run(call)

    def run(self, call: Kwargs) -> Tensor:
        out: Tensor = self.forward(**call)[0]
        return out


class Naive(Rival):
    """A full third pass, in which the block runs and its result is not used."""

    def skipped(self, call: Kwargs) -> Tensor:
        with undone(self.blocks[self.layer][2], 0):
            return self.run(call)

    def both(self, call: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
        u, c = self.run(call).chunk(2)
        return u, c, self.skipped(halves(call)[1])

    def cond(self, call: Kwargs) -> tuple[Tensor, Tensor]:
        return self.run(call), self.skipped(call)


class OneBatch(Rival):
    """One call with the rows [u, c, k], or [c, k] without CFG: the authors' code for LTX, Mochi and CogVideoX."""

    def both(self, call: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
        u, c = halves(call)
        return self.together(u, c, c)

    def cond(self, call: Kwargs) -> tuple[Tensor, Tensor]:
        if self.case.cfg == "single":
            c, k = self.together(call, call)
            return c, k
        self.u, c, k = self.together({**call, **self.negative}, call, call)
        return c, k

    def uncond(self, call: Kwargs) -> Tensor:
        return self.u

    def together(self, *calls: Kwargs) -> tuple[Tensor, ...]:
        rows = calls[0]["hidden_states"].shape[0]
        batch = {
            name: torch.cat([call[name] for call in calls]) if is_batch(value, rows) else value
            for name, value in calls[0].items()
        }
        with undone(self.blocks[self.layer][2], rows * (len(calls) - 1)):
            return self.run(batch).chunk(len(calls))


class DiffusersSkip(Rival):
    """Every branch by itself, k under diffusers' hook, put on and off every time: as its SkipLayerGuidance does."""

    def skipped(self, call: Kwargs) -> Tensor:
        from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

        stack, place, _ = self.blocks[self.layer]
        apply_layer_skip(self.model, LayerSkipConfig(indices=[place], fqn=stack))
        try:
            return self.run(call)
        finally:
            HookRegistry.check_if_exists_or_initialize(self.model).remove_hook("layer_skip_hook", recurse=True)

    def both(self, call: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
        u, c = halves(call)
        return self.run(u), self.run(c), self.skipped(c)

    def cond(self, call: Kwargs) -> tuple[Tensor, Tensor]:
        return self.run(call), self.skipped(call)


def is_batch(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def halves(call: Kwargs) -> tuple[Kwargs, Kwargs]:
    """The call of each branch, from the call with rows [uncond, cond]."""
    rows = call["hidden_states"].shape[0]
    half = rows // 2
    return (
        {name: value[:half] if is_batch(value, rows) else value for name, value in call.items()},
        {name: value[half:] if is_batch(value, rows) else value for name, value in call.items()},
    )
