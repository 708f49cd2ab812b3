"""Training objectives: the price of computing, the rewards of skipping and the policy gradient, on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from skipguide.config import JsonConfig, normalize_fields
from skipguide.errors import SkipError


def check_labels(labels: Tensor, count: int) -> Tensor:
    """Labels as int64 `[B]`, whichever whole numbers they came as.

    Raises:
        SkipError: for another shape, or numbers that are not whole.
    """
    given: Any = labels
    if not isinstance(given, Tensor) or labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise SkipError(f"expected labels [{count}] as whole numbers, one for each image; got {got}")
    return labels.long()


def computation(gates: Tensor, weights: Tensor | None = None) -> Tensor:
    """The share of the gated computation that runs, per image, with the gates' gradient.

    Args:
        gates: `[B, G]` masks or probabilities.
        weights: `[G]` cost of every block, such as its MACs; None counts every block equally.

    Returns:
        `[B]`, 1 where every gate is open.

    Example:
        >>> computation(torch.tensor([[1.0, 0.0]]), torch.tensor([3.0, 1.0])).tolist()
        [0.75]
    """
    if weights is None:
        return gates.mean(1)
    return gates @ (weights / weights.sum()).to(gates)


def budget_loss(gates: Tensor, target: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """How far the mean computation of a batch is above a target.

    Args:
        gates: `[B, G]`, with their gradient.
        target: share of the gated computation that is free; 0 prices every block.
        weights: see `computation`.

    Returns:
        A scalar, 0 at or below the target.
    """
    if not 0 <= target < 1:
        raise SkipError(f"expected a target in [0, 1); got {target}")
    return (computation(gates, weights).mean() - target).clamp(min=0)


@dataclass(frozen=True, repr=False)
class Reinforce(JsonConfig):
    """The reinforcement terms of SkipNet's second stage (arXiv 1711.09485, section 3.4), each by itself.

    Args:
        alpha: reward for skipping every gated block; each gate is paid `alpha / G`.
        beta: weight of the final reward, the negative cross-entropy of the image.
        gamma: discount of later rewards.
        weight: of the policy loss beside the cross-entropy.
        reduction: over the batch, `"mean"` or `"sum"`; gates are summed.
        baseline: `"batch_mean"` is subtracted from every gate's returns, or `"none"`.
        detach: rewards are constants. False lets the policy loss flow into the cross-entropy too.
        epsilon: `log(p + epsilon)` instead of `log p`: torch 0.2, which the published scripts ran on, had 1e-6.

    Two sets are published. `Reinforce.cifar()` sums over the batch, so that its weight grows with the batch size;
    `Reinforce.imagenet(gates)` takes the mean, and scales the final reward by `alpha / G`.
    """

    alpha: float = 0.1
    beta: float = 1.0
    gamma: float = 1.0
    weight: float = 0.01
    reduction: Literal["mean", "sum"] = "mean"
    baseline: Literal["batch_mean", "none"] = "batch_mean"
    detach: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        numbers = ("alpha", "beta", "gamma", "weight", "epsilon")
        normalize_fields(self, numbers=dict.fromkeys(numbers, 0), flags=("detach",))
        if self.reduction not in ("mean", "sum") or self.baseline not in ("batch_mean", "none"):
            raise SkipError(
                f"expected reduction 'mean' or 'sum' and baseline 'batch_mean' or 'none'; got {self.reduction!r} and "
                f"{self.baseline!r}"
            )
        if self.gamma > 1:
            raise SkipError(f"expected gamma in [0, 1] and no negative weights; got {self}")

    @classmethod
    def cifar(cls, alpha: float = 0.1, weight: float = 0.01) -> Reinforce:
        """The scaling of the published CIFAR script."""
        return cls(alpha, 1.0, 1.0, weight, "sum", "none", True)

    @classmethod
    def imagenet(cls, gates: int, alpha: float = 0.01, weight: float = 0.01, detach: bool = False) -> Reinforce:
        """The scaling of the published ImageNet script, which does not detach the rewards."""
        return cls(alpha, alpha / gates, 1.0, weight, "mean", "none", detach)


def cumulative_rewards(actions: Tensor, cross_entropy: Tensor, terms: Reinforce) -> Tensor:
    """What follows every decision: `R_g = r_g + gamma R_(g+1)`, where the final reward follows the last one.

    Args:
        actions: `[B, G]`, 1 runs, 0 skips; a skip is rewarded with `alpha / G`.
        cross_entropy: `[B]` of the images; the final reward is `-beta` times it.
        terms: alpha, beta, gamma and whether rewards are constants.

    Returns:
        `[B, G]`.

    Example:
        >>> terms = Reinforce(alpha=0.2)
        >>> cumulative_rewards(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0]), terms)
        tensor([[-0.9000, -1.0000]])
    """
    if actions.ndim != 2 or cross_entropy.shape != actions.shape[:1]:
        raise SkipError(
            f"expected actions [B, G] and cross-entropies [B]; got {list(actions.shape)} and "
            f"{list(cross_entropy.shape)}"
        )
    final = -terms.beta * (cross_entropy.detach() if terms.detach else cross_entropy)
    rewards = (1 - actions.to(final.dtype)) * terms.alpha / actions.shape[1]
    if terms.gamma == 1:
        return rewards.flip(1).cumsum(1).flip(1) + final[:, None]
    # as published, the final reward comes a step after the last decision: it is discounted for that one too
    returns, following = [], final
    for place in reversed(range(actions.shape[1])):
        following = rewards[:, place] + terms.gamma * following
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def reinforce_loss(gate_logits: Tensor, actions: Tensor, cross_entropy: Tensor, terms: Reinforce) -> Tensor:
    """The policy-gradient surrogate: `-weight * log p(action) * (R - baseline)`.

    Args:
        gate_logits: `[B, G]`, whose sigmoid is the probability of running.
        actions: `[B, G]`, the sampled decisions.
        cross_entropy: `[B]`.
        terms: the settings.

    Returns:
        A scalar to add to the mean cross-entropy.
    """
    returns = cumulative_rewards(actions, cross_entropy, terms)
    if terms.baseline == "batch_mean":
        returns = returns - returns.mean(0, keepdim=True)
    log_p = functional.logsigmoid(torch.where(actions > 0.5, gate_logits, -gate_logits))
    if terms.epsilon:
        log_p = (log_p.exp() + terms.epsilon).log()
    loss = -(log_p * returns).sum(1) * terms.weight
    return loss.sum() if terms.reduction == "sum" else loss.mean()
