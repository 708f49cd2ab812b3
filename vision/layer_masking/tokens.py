"""Layer masking of vision transformers: the tokens of hidden patches are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, end_everywhere, hold_everywhere
from skipguide.errors import SkipError
from skipguide.gate import Installation, gate_of
from skipguide.vision.layer_masking.fill import fill, fill_weights


class _Dropping:
    """The patches `[N, kept]` that a pass keeps, and whether it reached the module where others are left out."""

    def __init__(self, order: Tensor) -> None:
        self.order, self.done = order, False


# Threads share the gate and with it what holds there everywhere: each looks for the pass that it belongs to.
_PASS: ContextVar[_Dropping | None] = ContextVar("skipguide_dropping", default=None)
_LOCK = Lock()


@dataclass(frozen=True)
class Tokens:
    """Where a transformer's tokens pass.

    Attributes:
        model: the transformer.
        site: the module that gets all tokens, `[N, prefix + patches, C]`, after positions were added.
        patch: height and width of a patch.
        prefix: class and register tokens, which always stay.
        averages: whether the answer is read from the patches (their mean or attention), not from a class token.
    """

    model: nn.Module
    site: nn.Module
    patch: tuple[int, int]
    prefix: int
    averages: bool


def tokens_of(model: nn.Module) -> Tokens | None:
    """The tokens of a timm or torchvision `VisionTransformer`; None for another model."""
    for cls in type(model).__mro__:
        if cls.__name__ != "VisionTransformer":
            continue
        m: Any = model
        if cls.__module__ == "timm.models.vision_transformer":
            if hasattr(m.patch_embed, "backbone"):
                raise SkipError(
                    "this vision transformer is a hybrid: its tokens come from a convolutional network that sees "
                    "beyond a patch, so leaving them out does not hide their pixels. Use a ViT without a backbone, or "
                    "a convolutional network"
                )
            size = m.patch_embed.patch_size
            averages = m.attn_pool is not None or m.global_pool != "token"
            return Tokens(model, m.patch_drop, (int(size[0]), int(size[1])), m.num_prefix_tokens, averages)
        if cls.__module__ == "torchvision.models.vision_transformer":
            return Tokens(model, m.encoder.layers, (m.patch_size, m.patch_size), 1, False)
    return None


def run_tokens(
    tokens: Tokens, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any, how: str
) -> Tensor:
    """The answer with the hidden patches' tokens left out; a patch is hidden if all of its pixels are.

    In a patch that is partly visible hidden pixels are filled from their neighbours. Rows with the same number of
    tokens run together.

    Args:
        tokens: of the model.
        call: the model.
        keep: bool `[N or 1, 1, H, W]`.
        images: `[N, C, H, W]`.
        args: more arguments of the model.
        kwargs: the same.
        how: "neighbours", or "zeros" without fill.

    Raises:
        SkipError: for images that are not a whole number of patches, or fill "partial".
    """
    height, width = tokens.patch
    if how == "partial":
        raise SkipError("fill='partial' is for convolutional networks; use 'neighbours' on a vision transformer")
    if images.shape[-2] % height or images.shape[-1] % width:
        raise SkipError(
            f"expected images of a whole number of {height}x{width} patches; got {tuple(images.shape[-2:])}"
        )
    images = torch.where(keep, images, torch.zeros((), dtype=images.dtype, device=images.device))
    if how == "neighbours":
        weights = fill_weights(keep, max(height, width) - 1)
        images = fill(images, [w.to(images.dtype) for w in weights])
    kept = F.max_pool2d(keep.float(), (height, width)).flatten(1).bool().expand(images.shape[0], -1)
    counts = kept.sum(1).tolist()
    if tokens.averages and 0 in counts:
        raise SkipError(
            f"nothing is visible in row {counts.index(0)}, and {type(tokens.model).__name__} averages over visible "
            f"patches: show at least one pixel, or use a model with a class token"
        )
    parts: list[tuple[Tensor, Tensor]] = []
    for count in sorted(set(counts)):
        rows = torch.tensor([r for r, c in enumerate(counts) if c == count]).to(images.device, non_blocking=True)
        order = kept[rows].int().argsort(dim=1, descending=True, stable=True)[:, :count]
        with _dropping(tokens, order.sort(1).values, kept.shape[1]) as dropping:
            part = call(images[rows], *args, **kwargs)
        if not dropping.done:
            raise SkipError(
                f"{type(tokens.model).__name__} did not pass its tokens through its {type(tokens.site).__name__}: "
                "nothing was masked. Use a model with the forward of its class"
            )
        if not isinstance(part, Tensor):
            raise SkipError(f"expected the transformer to answer with one tensor; got {type(part).__name__}")
        parts.append((rows, part))
    out = parts[0][1].new_empty(images.shape[0], *parts[0][1].shape[1:])
    for rows, part in parts:
        out = out.index_copy(0, rows, part.to(out.dtype))
    return out


@contextmanager
def _dropping(tokens: Tokens, order: Tensor, patches: int) -> Iterator[_Dropping]:
    """Inside, the tokens' site lets through the prefix and those of so many patches that are in `order` `[N, kept]`."""
    mine = _Dropping(order)

    def drop(plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else None
        if _PASS.get() is not mine or not isinstance(x, Tensor):
            return call(*args, **kwargs)
        kept, mine.done = mine.order, True
        if kept.shape[0] != x.shape[0] or patches > x.shape[1] - tokens.prefix:
            raise SkipError(f"expected {patches} patches of each of {kept.shape[0]} images; got {tuple(x.shape)}")
        seen = x[:, tokens.prefix :].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return call(torch.cat([x[:, : tokens.prefix], seen], 1), *args[1:], **kwargs)

    gate = gate_of(tokens.site)
    installation, before = Installation([gate]), _PASS.get()

    def end() -> None:
        _PASS.set(before)
        with _LOCK:
            end_everywhere(gate, drop)
            installation.remove()

    try:
        with _LOCK:
            installation.install()
            hold_everywhere(gate, drop)
        _PASS.set(mine)
        yield mine
    finally:
        try:
            end()
        except BaseException:  # Ctrl-C: what was broken off is done again
            end()
            raise
