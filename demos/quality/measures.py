"""Measures: what is said of a set of clips, against real clips of the same captions. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import ClipSpec, labels


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D], each taken as one Gaussian."""
    a, b = a.double(), b.double()
    left, right = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(left)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + left.trace() + right.trace() - 2 * cross)


def diversity(features: Tensor, each: int) -> float:
    """Mean distance of features [N, D] within a prompt; the clips of a prompt are `each` neighbours."""
    groups = features.double().unflatten(0, (-1, each))
    distances = torch.cdist(groups, groups)
    return float(distances.sum((1, 2)).mean() / (each * (each - 1)))


def motion(clips: Tensor) -> Tensor:
    """Mean absolute change from frame to frame, [N]."""
    return clips.diff(dim=1).abs().flatten(1).mean(1)


def flicker(clips: Tensor) -> Tensor:
    """Mean absolute second difference over time, [N]: change that does not go on."""
    return clips.diff(dim=1).diff(dim=1).abs().flatten(1).mean(1)


def saturation(clips: Tensor) -> Tensor:
    """Mean spread of the colour channels, [N]."""
    return (clips.amax(2) - clips.amin(2)).flatten(1).mean(1)


@torch.no_grad()
def read(
    classifier: AttributeClassifier, clips: Tensor, specs: Sequence[ClipSpec], chunk: int = 32
) -> dict[str, Tensor]:
    """Everything that is kept of clips: features [N, D], whether each attribute is right, and the scalars, [N]."""
    features = torch.cat([classifier.features(part) for part in clips.split(chunk)])
    right = {
        f"right_{name}": head(features).argmax(1) == labels(specs)[name] for name, head in classifier.heads.items()
    }
    scalars = {"motion": motion(clips), "flicker": flicker(clips), "saturation": saturation(clips)}
    return {"features": features, **right, **scalars}
