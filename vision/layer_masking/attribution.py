"""Which parts of an image an answer rests on, found by leaving them out.

All three methods run the model under many masks and differ in which: occlusion hides one part at a time, LIME
(arXiv 1602.04938) fits a linear model to random ones, RISE (arXiv 1806.07421) averages them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.answers import as_segments, one_image, probabilities
from skipguide.vision.layer_masking.layer_mask import MaskedForward
from skipguide.vision.layer_masking.mask_batches import many_masks

METHODS = ("lime", "occlusion", "rise")
CHUNK = 64  # masks that are made, or summed, at a time


class _Sentinel(float):
    """A colour that no picture has. NumPy asks for it as a whole number where a picture of bytes should hold it."""

    def __int__(self) -> int:
        raise SkipError(
            "hide_color=SENTINEL marks the hidden pixels of a picture of floats, and a picture of bytes cannot hold "
            "it: pass explain_instance the picture as floats (picture / 255)"
        )


_Sentinel.__name__ = _Sentinel.__qualname__ = "float"  # which it is, to whoever reads its type by name


SENTINEL: float = _Sentinel(-1e4)


def score(logits: Tensor, target: int, model: nn.Module | None = None) -> Tensor:
    """The probability of a class, `[M]`; of a network with one output, class 0 is its yes.

    Raises:
        SkipError: for a class that the model does not have.
    """
    found = probabilities(logits, model)
    if not 0 <= target < found.shape[1]:
        raise SkipError(f"expected a class from 0 to {found.shape[1] - 1} as target; got {target}")
    return found[:, target]


def occlusion(
    forward: MaskedForward, image: Tensor, segments: Tensor, target: int, *, progress: bool | str = False
) -> Tensor:
    """How much of the class's probability goes when one segment is hidden.

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]` or `[1, C, H, W]`, normalised.
        segments: `[H, W]` whole numbers below S, of torch or NumPy.
        target: the class.
        progress: show a bar.

    Returns:
        `[S]`.
    """
    image, segments = one_image(image), as_segments(segments)
    count = int(segments.max()) + 1
    shown = ~torch.eye(count + 1, count, dtype=torch.bool)  # the last row shows everything
    found = score(many_masks(forward, image, shown, segments, progress=progress), target, model_of(forward))
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
        image: `[C, H, W]` or `[1, C, H, W]`, normalised.
        segments: `[H, W]` whole numbers below S, of torch or NumPy.
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
    image, segments = one_image(image), as_segments(segments)
    count = int(segments.max()) + 1
    g = torch.Generator().manual_seed(seed)
    shown = torch.rand(samples, count, generator=g) < 0.5
    shown[0] = True
    answers = many_masks(forward, image, shown, segments, progress=progress)
    found = score(answers, target, model_of(forward)).double().cpu()
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
        image: `[C, H, W]` or `[1, C, H, W]`, normalised.
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
    image = one_image(image)
    height, width = image.shape[-2:]
    g = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(samples, 1, cells + 1, cells + 1, generator=g) < shown).float()
    step = (-(-height // cells), -(-width // cells))
    tops = torch.randint(step[0], (samples,), generator=g).tolist()
    lefts = torch.randint(step[1], (samples,), generator=g).tolist()
    # A bit of each pixel is what may be kept of a thousand masks; their floats are made a few at a time.
    masks = torch.empty(samples, 1, height, width, dtype=torch.bool)
    for first in range(0, samples, CHUNK):
        big = F.interpolate(
            coarse[first : first + CHUNK], ((cells + 1) * step[0], (cells + 1) * step[1]), mode="bilinear"
        )
        for n, one in enumerate(big, first):
            masks[n] = one[:, tops[n] : tops[n] + height, lefts[n] : lefts[n] + width] > 0.5
    found = score(many_masks(forward, image, masks, progress=progress), target, model_of(forward)).cpu()
    total, times = torch.zeros(height, width), torch.zeros(height, width)
    for first in range(0, samples, CHUNK):
        seen = masks[first : first + CHUNK, 0].float()
        total += (found[first : first + CHUNK, None, None] * seen).sum(0)
        times += seen.sum(0)
    return total / times.clamp_min(1) - found.mean()


def spread(weights: Tensor, segments: Tensor) -> Tensor:
    """Segment weights `[S]` as a map `[H, W]`."""
    return weights[as_segments(segments).long().to(weights.device)]


def model_of(forward: Any) -> nn.Module | None:
    """The model behind a `masked_forward`, or behind what has its form."""
    found = getattr(forward, "model", None)
    return found if isinstance(found, nn.Module) else None


def lime_classifier(forward: MaskedForward, image: Tensor) -> Callable[[Any], Any]:
    """A `classifier_fn` for `lime.lime_image.LimeImageExplainer.explain_instance`.

    lime paints hidden segments with a colour. Given `hide_color=SENTINEL` and the image as floats, the painted pixels
    are found again and hidden in every layer instead.

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]` or `[1, C, H, W]`, normalised, of the size that lime perturbs.

    Returns:
        A function from `[M, H, W, C]` to probabilities `[M, classes]`; of a network with one output, of no and of yes.

    Raises:
        SkipError: when called with images of another size, or with images that differ and have nothing hidden: lime's
            default `hide_color=None` paints the mean colour, which is not found again.
    """
    image = one_image(image)

    def classify(images: Any) -> Any:
        import numpy as np

        x = torch.from_numpy(np.asarray(images))
        if x.ndim != 4 or tuple(x.shape[1:3]) != tuple(image.shape[-2:]):
            raise SkipError(f"expected images [M, {image.shape[-2]}, {image.shape[-1]}, C]; got {tuple(x.shape)}")
        keep = (x > float(SENTINEL) / 2).all(3)
        if bool(keep.all()) and not bool((x == x[:1]).all()):
            raise SkipError(
                "nothing is hidden in these images, though they differ: pass explain_instance(..., "
                "hide_color=SENTINEL), of skipguide.vision.layer_masking, and the image as floats"
            )
        found = probabilities(many_masks(forward, image, keep.to(image.device)), model_of(forward))
        return (torch.cat([1 - found, found], 1) if found.shape[1] == 1 else found).cpu().numpy()

    return classify
