"""Which parts of an image an answer rests on, found by leaving them out.

All three methods run the model under many masks and differ in which: occlusion hides one part at a time, LIME
(arXiv 1602.04938) fits a linear model to random ones, RISE (arXiv 1806.07421) averages them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.layer_mask import MaskedForward
from skipguide.vision.layer_masking.mask_batches import many_masks

METHODS = ("lime", "occlusion", "rise")
SENTINEL = -1e4


def score(logits: Tensor, target: int) -> Tensor:
    """The probability of a class, `[M]`.

    Raises:
        SkipError: for a class that the model does not have.
    """
    if not 0 <= target < logits.shape[1]:
        raise SkipError(f"expected a class from 0 to {logits.shape[1] - 1} as target; got {target}")
    return logits.float().softmax(1)[:, target]


def occlusion(
    forward: MaskedForward, image: Tensor, segments: Tensor, target: int, *, progress: bool | str = False
) -> Tensor:
    """How much of the class's probability goes when one segment is hidden.

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]`, normalised.
        segments: `[H, W]` numbers below S.
        target: the class.
        progress: show a bar.

    Returns:
        `[S]`.
    """
    count = int(segments.max()) + 1
    shown = ~torch.eye(count + 1, count, dtype=torch.bool)  # the last row shows everything
    found = score(many_masks(forward, image, shown, segments, progress=progress), target)
    return found[-1] - found[:-1]


def lime(
    forward: MaskedForward,
    image: Tensor,
    segments: Tensor,
    target: int,
    *,
    samples: int = 512,
    width: float = 0.25,
    ridge: float = 1.0,
    seed: int = 0,
    progress: bool | str = False,
) -> Tensor:
    """The weights of a linear model of the class's probability, fitted around the whole image (LIME).

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]`, normalised.
        segments: `[H, W]` numbers below S.
        target: the class.
        samples: random masks, each segment shown with probability one half.
        width: of the kernel over the cosine distance from the whole image.
        ridge: penalty of the squared weights.
        seed: of the masks.
        progress: show a bar.

    Returns:
        `[S]`.

    Raises:
        SkipError: for fewer than two samples, or a width or ridge that is not positive.
    """
    if samples < 2 or not width > 0 or not ridge > 0:
        raise SkipError(f"expected at least 2 samples, and width and ridge above 0; got {samples}, {width}, {ridge}")
    count = int(segments.max()) + 1
    g = torch.Generator().manual_seed(seed)
    shown = torch.rand(samples, count, generator=g) < 0.5
    shown[0] = True
    found = score(many_masks(forward, image, shown, segments, progress=progress), target).double().cpu()
    return fit_linear(shown.double(), found, width, ridge).float()


def fit_linear(shown: Tensor, found: Tensor, width: float = 0.25, ridge: float = 1.0) -> Tensor:
    """Ridge regression weighted by closeness to the whole image; the weights without the intercept."""
    distance = 1 - (shown.sum(1) / (shown.norm(dim=1) * shown.shape[1] ** 0.5).clamp_min(1e-12))
    weight = torch.exp(-(distance**2) / width**2).sqrt()[:, None]
    mean_x = (weight**2 * shown).sum(0) / (weight**2).sum()
    mean_y = (weight[:, 0] ** 2 * found).sum() / (weight**2).sum()
    x, y = (shown - mean_x) * weight, (found - mean_y) * weight[:, 0]
    eye = torch.eye(shown.shape[1], dtype=shown.dtype, device=shown.device)
    return torch.linalg.solve(x.T @ x + ridge * eye, x.T @ y)


def rise(
    forward: MaskedForward,
    image: Tensor,
    target: int,
    *,
    samples: int = 1000,
    cells: int = 7,
    shown: float = 0.5,
    seed: int = 0,
    progress: bool | str = False,
) -> Tensor:
    """The mean probability of the class over random masks that show a pixel, less the mean over all masks.

    RISE's masks are soft; an absent activation is absent or not, so these are cut at one half.

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]`, normalised.
        target: the class.
        samples: masks.
        cells: coarse cells a side, enlarged and shifted at random.
        shown: probability that a cell is shown.
        seed: of the masks.
        progress: show a bar.

    Returns:
        `[H, W]`.

    Raises:
        SkipError: without samples or cells, or for a probability outside 0..1.
    """
    if samples < 1 or cells < 1 or not 0 < shown < 1:
        raise SkipError(f"expected samples and cells from 1 on, and shown between 0 and 1; got {samples, cells, shown}")
    height, width = image.shape[-2:]
    g = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(samples, 1, cells + 1, cells + 1, generator=g) < shown).float()
    step = (-(-height // cells), -(-width // cells))
    big = F.interpolate(coarse, ((cells + 1) * step[0], (cells + 1) * step[1]), mode="bilinear")
    tops = torch.randint(step[0], (samples,), generator=g).tolist()
    lefts = torch.randint(step[1], (samples,), generator=g).tolist()
    masks = torch.stack([m[:, t : t + height, s : s + width] for m, t, s in zip(big, tops, lefts, strict=True)]).gt(0.5)
    found = score(many_masks(forward, image, masks, progress=progress), target).cpu()
    seen = masks[:, 0].float()
    return (found[:, None, None] * seen).sum(0) / seen.sum(0).clamp_min(1) - found.mean()


def spread(weights: Tensor, segments: Tensor) -> Tensor:
    """Segment weights `[S]` as a map `[H, W]`."""
    return weights[segments.to(weights.device)]


def lime_classifier(forward: MaskedForward, image: Tensor) -> Callable[[Any], Any]:
    """A `classifier_fn` for `lime.lime_image.LimeImageExplainer.explain_instance`.

    lime paints hidden segments with a colour. Given `hide_color=SENTINEL` and the image as floats, the painted pixels
    are found again and hidden in every layer instead.

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]`, normalised, of the size that lime perturbs.

    Returns:
        A function from `[M, H, W, C]` to probabilities `[M, classes]`.

    Raises:
        SkipError: when called with images of another size.
    """

    def classify(images: Any) -> Any:
        import numpy as np

        x = torch.from_numpy(np.asarray(images))
        if x.ndim != 4 or tuple(x.shape[1:3]) != tuple(image.shape[-2:]):
            raise SkipError(f"expected images [M, {image.shape[-2]}, {image.shape[-1]}, C]; got {tuple(x.shape)}")
        keep = (x > SENTINEL / 2).all(3)
        with torch.no_grad():
            return many_masks(forward, image, keep.to(image.device)).softmax(1).float().cpu().numpy()

    return classify
