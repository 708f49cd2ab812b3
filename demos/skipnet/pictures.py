"""Pictures: which images get how many blocks, and what that goes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two `[N]` tensors, ties at their mean rank; NaN if one is constant.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])), 6)
        0.5
    """
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def saliency(model: nn.Module, images: Tensor) -> Tensor:
    """How strongly the winning logit depends on the pixels: mean absolute gradient of each image, `[N]`."""
    leaf = images.detach().clone().requires_grad_()
    model(leaf).amax(1).sum().backward()
    if leaf.grad is None:
        raise SkipError("the model's output does not depend on the images through differentiable operations")
    for parameter in model.parameters():
        parameter.grad = None
    return leaf.grad.abs().flatten(1).mean(1)


def draw_by_blocks(axes: Any, images: Tensor, blocks: Tensor, notes: list[str] | None = None) -> None:
    """Images in the order of the blocks they used, from the fewest to the most, evenly picked.

    Args:
        axes: matplotlib axes, as many as images are wanted.
        images: `[N, 1 or 3, H, W]` in [0, 1].
        blocks: `[N]`.
        notes: one line under the number of blocks, per image.
    """
    order = blocks.double().argsort(stable=True)
    cells = list(axes)
    picks = order[torch.linspace(0, len(order) - 1, len(cells)).round().long()].tolist()
    for axis, pick in zip(cells, picks, strict=True):
        picture = images[pick].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        axis.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{int(blocks[pick])} blocks" + (f"\n{notes[pick]}" if notes else ""), fontsize=8)
        axis.set_axis_off()


def draw_blocks_against(axis: Any, values: Tensor, blocks: Tensor, name: str, bins: int = 8) -> float:
    """Mean blocks (with the standard error) in equal-count bins of a value; returns the rank correlation.

    Args:
        axis: matplotlib axes.
        values: `[N]`, such as difficulty, scale or saliency.
        blocks: `[N]`.
        name: of the value.
        bins: number of bins.
    """
    correlation = spearman(values, blocks)
    parts = [part for part in values.argsort(stable=True).chunk(bins) if len(part)]
    xs = [float(values[part].double().mean()) for part in parts]
    ys = [float(blocks[part].double().mean()) for part in parts]
    errors = [float(blocks[part].double().std(correction=0)) / len(part) ** 0.5 for part in parts]
    axis.errorbar(xs, ys, errors, fmt="o-", capsize=3)
    axis.set_xlabel(name)
    axis.set_ylabel("blocks run")
    axis.set_title(f"rank correlation {correlation:+.2f}", fontsize=9)
    return correlation


def draw_history(axes: Any, history: list[dict[str, float]]) -> None:
    """Loss, accuracy and computation of a training run, on three axes."""
    steps = [row["step"] for row in history]
    for axis, key in zip(axes, ("cross_entropy", "accuracy", "computation"), strict=True):
        axis.plot(steps, [row[key] for row in history], lw=0.8)
        axis.set_xlabel("step")
        axis.set_title(key.replace("_", " "), fontsize=9)
