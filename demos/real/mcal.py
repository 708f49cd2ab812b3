"""MCal (arXiv 2603.04831): a linear head on a frozen classifier's logits, which undoes what a paint does to them.

The head is an affine map of the logits, fitted by cross-entropy on masked copies of pictures to what the model itself
says of the whole pictures. It starts as the identity. A thousand classes make it a million numbers, so it stops where
the loss on pictures that were kept from the fit is lowest.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATIENCE = 20  # steps without a lower held-out loss


def identity_head(classes: int) -> nn.Linear:
    """The head before it is fitted."""
    head = nn.Linear(classes, classes)
    with torch.no_grad():
        head.weight.copy_(torch.eye(classes))
        head.bias.zero_()
    return head


def fit(
    logits: Tensor, answers: Tensor, held_out: Tensor, *, steps: int = 200, rate: float = 1e-3
) -> tuple[nn.Linear, dict[str, Any]]:
    """Fit a head.

    Args:
        logits: `[P, M, classes]` of M masked copies of each of P pictures.
        answers: `[P]` the model's answers on the whole pictures.
        held_out: bool `[P]`, the pictures that say when to stop.
        steps: of gradient descent with momentum, at most, each over all copies.
        rate: of gradient descent.

    Returns:
        The head at its best step, and how the fit went.
    """
    head = identity_head(logits.shape[-1])
    # Adam moves all numbers alike, those of classes that no copy shows too: held-out loss then only rises
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    targets = answers[:, None].expand(logits.shape[:2])
    parts = [(logits[rows].flatten(0, 1), targets[rows].flatten()) for rows in (~held_out, held_out)]
    (x, y), (other_x, other_y) = parts
    best, best_step, kept, history = float("inf"), 0, copy.deepcopy(head), []
    for step in range(steps + 1):
        with torch.no_grad():
            loss = F.cross_entropy(head(other_x), other_y).item()
        history.append(loss)
        if loss < best:
            best, best_step, kept = loss, step, copy.deepcopy(head)
        elif step > best_step + PATIENCE:
            break
        optimizer.zero_grad()
        F.cross_entropy(head(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        right = {
            name: round((head_(a).argmax(1) == b).float().mean().item(), 4)
            for name, head_, (a, b) in (
                ("kept_before_fitted_pictures", nn.Identity(), parts[0]),
                ("kept_after_fitted_pictures", kept, parts[0]),
                ("kept_before_held_out", nn.Identity(), parts[1]),
                ("kept_after_held_out", kept, parts[1]),
            )
        }
    about = {"copies": len(x), "steps": best_step, "loss_before": round(history[0], 4), "loss_after": round(best, 4)}
    return kept.requires_grad_(False), about | right
