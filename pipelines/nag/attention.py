"""Attention: what normalized attention guidance does at a block, at its attention to the text and at its projection."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipguide import guidance
from skipguide.active import ActivePlan, Call
from skipguide.arguments import Arguments, first_tensor
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap

_PROJECTIONS = ("to_out", "out_layer")


@dataclass
class NagPass:
    """One pass of the denoiser, as its blocks see it.

    Attributes:
        batch: rows of the pass.
        rows: those that are guided.
        probing: whether it only finds what the negative prompt is for the blocks.
        negative: argument of the blocks -> its value for the negative prompt, for the guided rows only.
        block: argument of the block that runs now, by the identity of its value.
        kept: the attention's output for the negative prompt, between its two calls.
        role: of the attention's call that runs now.
        guided: how many attentions were guided.
    """

    batch: int
    rows: slice
    probing: bool = False
    negative: dict[str, Any] = field(default_factory=dict)
    block: dict[int, str] = field(default_factory=dict)
    kept: Tensor | None = None
    role: str = ""
    guided: int = 0


PASS: ContextVar[NagPass | None] = ContextVar("skipguide_nag_pass", default=None)


class AtBlock:
    """Notes what the block is given, by name; in a probe, keeps it."""

    def __init__(self, block: Block) -> None:
        self.arguments = Arguments(block.module)

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block."""
        if (now := PASS.get()) is not None:
            given = {name: self.arguments.get(name, args, kwargs) for name in self.arguments.names}
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            if now.probing and not now.negative:
                now.negative = tensors
            now.block = {id(value): name for name, value in tensors.items()}
        return call(*args, **kwargs)


class AtAttention:
    """Calls the attention to the text twice: for the negative prompt up to its projection, then for the prompt."""

    def __init__(self, name: str, module: nn.Module, shared: tuple[str, ...]) -> None:
        self.arguments = Arguments(module)
        self.name = name
        self.shared = shared

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run both."""
        now = PASS.get()
        if now is None or now.probing:
            return call(*args, **kwargs)
        size = first_tensor(args, kwargs).shape[0]
        fold = size // now.batch
        rows = slice(now.rows.start * fold, now.rows.stop * fold)
        mine = self.arguments.rows(args, kwargs, rows, size, self.shared)
        given = {name: self.arguments.get(name, args, kwargs) for name in self.arguments.names}
        names = {name: now.block.get(id(value)) for name, value in given.items() if isinstance(value, Tensor)}
        other = {name: now.negative[source] for name, source in names.items() if source in now.negative}
        if not other:
            raise SkipError(
                f"{self.name} attends to something that its block does not get as it is, so the negative prompt's "
                f"counterpart is not known: normalized attention guidance does not work on this model"
            )
        try:
            now.role = "negative"
            call(*self.arguments.put(other, *mine)[0], **self.arguments.put(other, *mine)[1])
            if now.kept is None:
                raise SkipError(f"{self.name} did not call its output projection, before which it is to be guided")
            now.role = "positive"
            out = call(*args, **kwargs)
            now.guided += 1
            return out
        finally:
            now.role, now.kept = "", None


class AtProjection:
    """Combines what the two texts made of attention, just before the output projection."""

    def __init__(self, scale: float, tau: float, alpha: float, module: nn.Module) -> None:
        self.scale, self.tau, self.alpha = scale, tau, alpha
        self.width: int | None = getattr(unwrap(module), "out_features", None)

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the negative's, whose projection is not needed; project the guided one."""
        now = PASS.get()
        if now is None or not now.role:
            return call(*args, **kwargs)
        z = first_tensor(args, kwargs)
        if now.role == "negative":
            now.kept = z
            return z if self.width is None else z.new_zeros((*z.shape[:-1], self.width))
        assert now.kept is not None
        fold = z.shape[0] // now.batch
        before, rest = z[: now.rows.start * fold], z[now.rows.stop * fold :]
        mine = z[now.rows.start * fold : now.rows.stop * fold]
        guided = guidance.normalized_attention(mine, now.kept, self.scale, self.tau, self.alpha)
        whole = torch.cat([before, guided, rest]) if len(before) or len(rest) else guided
        return call(whole, *args[1:], **kwargs) if args else call(**(kwargs | {next(iter(kwargs)): whole}))


def projection_of(name: str, module: nn.Module) -> nn.Module:
    """The output projection of an attention.

    Raises:
        SkipError: if it has none that is known.
    """
    found = next((each for at in _PROJECTIONS if isinstance(each := getattr(module, at, None), nn.Module)), None)
    if isinstance(found, nn.ModuleList):
        found = found[0]
    if found is None:
        raise SkipError(
            f"normalized attention guidance acts before an attention's output projection, and {name} "
            f"({type(module).__name__}) has no {' or '.join(_PROJECTIONS)}"
        )
    return found
