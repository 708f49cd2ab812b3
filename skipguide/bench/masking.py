"""How often a classifier keeps its class as parts of its pictures are hidden: layer masking against paint.

After the protocols of layer masking (arXiv 2211.14646): random patches, and one box, that hide a share of the picture.
Every fill sees the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.vision import masked_forward
from skipguide.vision.layer_masking import grid_segments, many_masks, segment_masks

OURS = "neighbours"
FILLS = (OURS, "black", "grey", "mean", "blur")
NAMES = {OURS: "layer masking", **{fill: f"painted: {fill}" for fill in FILLS[1:]}}
PROTOCOLS = ("patches", "boxes")
SHARES, QUICK_SHARES = tuple(n / 10 for n in range(1, 10)), (0.25, 0.5, 0.75)
FINE, COARSE, LARGE = 14, 8, 112  # cells a side, for pictures from LARGE pixels on and below


def hiding_masks(protocol: str, height: int, width: int, shares: Sequence[float], seed: int) -> Tensor:
    """Masks that hide a share of a picture; larger shares hide the same patches and more.

    Args:
        protocol: `"patches"` or `"boxes"`.
        height: of the picture.
        width: of the picture.
        shares: hidden, each above 0 and below 1.
        seed: of the places.

    Returns:
        bool `[len(shares), H, W]`, True = visible.

    Raises:
        SkipError: for another protocol or share.

    Example:
        >>> hiding_masks("boxes", 64, 64, [0.25], seed=0).float().mean()
        tensor(0.7500)
    """
    if not all(0 < share < 1 for share in shares):
        raise SkipError(f"expected shares of the picture above 0 and below 1; got {list(shares)}")
    generator = torch.Generator().manual_seed(seed)
    if protocol == "patches":
        cells = FINE if min(height, width) >= LARGE else min(COARSE, height, width)
        order = torch.randperm(cells * cells, generator=generator)
        shown = torch.ones(len(shares), cells * cells, dtype=torch.bool)
        for number, share in enumerate(shares):
            shown[number, order[: round(share * cells * cells)]] = False
        return segment_masks(shown, grid_segments(height, width, cells))[:, 0]
    if protocol != "boxes":
        raise SkipError(f"unknown protocol {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    keep = torch.ones(len(shares), height, width, dtype=torch.bool)
    at_y, at_x = torch.rand(2, generator=generator).tolist()
    for number, share in enumerate(shares):
        tall, wide = round(height * math.sqrt(share)), round(width * math.sqrt(share))
        top, left = round(at_y * (height - tall)), round(at_x * (width - wide))
        keep[number, top : top + tall, left : left + wide] = False
    return keep


@torch.no_grad()
def kept(model: nn.Module, image: Tensor, scale: Any, shares: Sequence[float], seeds: int) -> dict[str, Any]:
    """Whether one picture keeps its class, as plain data.

    Args:
        model: a classifier in eval mode.
        image: `[3, H, W]`, normalised.
        scale: mean and standard deviation of the preprocessing.
        shares: of the picture that are hidden.
        seeds: masks of each share and protocol.

    Returns:
        protocol -> fill -> one share of kept classes for each of `shares`; and `class`, the model's own answer.
    """
    height, width = image.shape[-2:]
    target = int(model(image[None]).argmax(1))
    found: dict[str, Any] = {"class": target}
    for protocol in PROTOCOLS:
        masks = torch.cat([hiding_masks(protocol, height, width, shares, seed) for seed in range(seeds)])
        masks = masks.to(image.device)
        of: dict[str, list[float]] = {}
        for fill in FILLS:
            forward = masked_forward(model, fill, scale=scale)
            same = (many_masks(forward, image, masks).argmax(1) == target).float()
            of[fill] = same.view(seeds, len(shares)).mean(0).tolist()
        found[protocol] = of
    return found
