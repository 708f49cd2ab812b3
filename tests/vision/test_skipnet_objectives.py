"""SkipNet: rewards, their gradient and the budget, by hand."""

import dataclasses

import pytest
import torch

from skipguide import SkipError
from skipguide.vision.skipnet.objectives import Reinforce, budget_loss, cumulative_rewards, reinforce_loss


def test_objectives_refuse_nonsense():
    for bad in ({"reduction": "max"}, {"baseline": "ema"}, {"gamma": 2}, {"alpha": -1}):
        with pytest.raises(SkipError):
            Reinforce(**bad)
    with pytest.raises(SkipError, match=r"\[B, G\]"):
        cumulative_rewards(torch.ones(3), torch.ones(3), Reinforce())
    with pytest.raises(SkipError, match="target"):
        budget_loss(torch.ones(1, 2), 1.0)
    assert Reinforce.from_dict(Reinforce.cifar().to_dict()) == Reinforce.cifar()


def test_rewards_and_their_gradient():
    """gamma, baseline, detach and the gradient of the surrogate, by hand."""
    actions, ce = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([0.5, 2.0], requires_grad=True)
    terms = Reinforce(alpha=0.3, gamma=0.5, baseline="none", weight=1.0)
    # r = 0.1 for a skip; the final reward comes a step after the last decision and is discounted too, as published
    last = [0.1 + 0.5 * -0.5, 0.0 + 0.5 * -2.0]
    second = [0.1 + 0.5 * last[0], 0.0 + 0.5 * last[1]]
    first = [0.0 + 0.5 * second[0], 0.1 + 0.5 * second[1]]
    wanted = torch.tensor([first, second, last]).T
    assert torch.allclose(cumulative_rewards(actions, ce, terms), wanted)
    logits = torch.zeros(2, 3, requires_grad=True)
    reinforce_loss(logits, actions, ce, terms).backward()
    # d log p(a) / d logit = a - p
    assert torch.allclose(logits.grad, -(actions - 0.5) * wanted / 2)
    assert ce.grad is None
    reinforce_loss(logits, actions, ce, dataclasses.replace(terms, detach=False)).backward()
    assert ce.grad is not None
    centred = dataclasses.replace(terms, baseline="batch_mean")
    logits.grad = None
    reinforce_loss(logits, actions, ce.detach(), centred).backward()
    assert torch.allclose(logits.grad, -(actions - 0.5) * (wanted - wanted.mean(0)) / 2)


def test_the_budget_counts_what_is_above_its_target():
    gates = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert budget_loss(gates).item() == 0.75
    assert budget_loss(gates, 0.5).item() == 0.25
    assert budget_loss(gates, 0.8).item() == 0.0
    assert budget_loss(gates, 0.0, torch.tensor([3.0, 1.0])).item() == pytest.approx((1 + 0.25) / 2)
