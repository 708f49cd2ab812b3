"""Skip Tuning stops at the first step that is not finite, with the weights of the steps before it."""

import pytest
import torch
from helpers.tuning import images, pairs, same, tuner

from skipguide import SkipError


def weights(of):
    return {name: p.detach().clone() for name, p in of.parameters().items()}


def run(which, pictures=None, **more):
    more = {"epochs": 2, "lr_text": 1e-2, "lr_image": 1e-2, "warmup_lr": 1e-3, "progress": False} | more
    return which.fit((pictures or images(8), pairs()[1]), **more)


def overflowing(place):
    """Images of which one is finite and too large for the norms of the tower, so that its features are NaN."""
    return [p * 1e30 if i == place else p for i, p in enumerate(images(8))]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_leaves_the_weights(optimizer):
    which = tuner()
    before = weights(which)
    with pytest.raises(SkipError, match="epoch 0 has a loss of nan after 0 steps"):
        run(which, overflowing(7), optimizer=optimizer, batch_size=8)
    assert same(before, weights(which))
    assert all(p.grad is None for p in which.parameters().values())
    run(which, optimizer=optimizer)  # goes on as usual
    assert not same(before, weights(which))


def test_the_steps_before_are_kept():
    """A run that breaks in its third epoch has the weights of one that was stopped there."""
    broken, stopped = tuner(), tuner()
    settings = {"epochs": 3, "views": "per_epoch"}
    with pytest.raises(SkipError, match=r"epoch 2 has a loss of nan after \d+ steps, whose weights are kept"):
        run(broken, augment=spoil_the_third_epoch(), **settings)
    with pytest.raises(StopIteration):
        run(stopped, augment=spoil_the_third_epoch(StopIteration), **settings)
    assert same(weights(broken), weights(stopped))


def spoil_the_third_epoch(error=None):
    """An augmentation that gives what overflows, or raises."""
    seen = []
    before = 2 + 2 * (1 + 8)  # two that are compared, then per epoch one for its size and all

    def change(image):
        seen.append(1)
        if len(seen) > before and error is not None:
            raise error
        return image * 1e30 if len(seen) > before else image

    return change


def test_gradients_that_are_not_finite_leave_the_weights():
    which = tuner()
    parameter = next(iter(which.parameters().values()))
    parameter.register_hook(lambda grad: grad * torch.inf)
    before = weights(which)
    with pytest.raises(SkipError, match="epoch 0 has gradients whose norm is not finite after 0 steps"):
        run(which)
    assert same(before, weights(which))


def test_pixels_that_are_not_finite_are_named():
    for broken in (torch.nan, torch.inf):
        pictures = images(8)
        pictures[3] = torch.full_like(pictures[3], broken)
        with pytest.raises(SkipError, match="finite pixels"):
            run(tuner(), pictures)
        with pytest.raises(SkipError, match="finite pixels"):
            tuner().predict(pictures[3])
