"""Layer masking: the laws that every mask keeps, in every precision, with gradients and without."""

import copy

import pytest
import torch
from helpers.dispatched import Dispatched
from torch import nn
from torchvision.models.resnet import BasicBlock

from skipguide.errors import SkipError
from skipguide.vision import masked_forward
from zoo import masking
from zoo.masking import tiny, vit

pytestmark = pytest.mark.numerics

model, images, keep = masking.model, masking.images, masking.keep


@torch.no_grad()
def test_hidden_pixels_have_no_influence(model, images, keep):
    forward = masked_forward(model)
    for _ in range(2):
        first = forward(keep, images)
        for value in (0.0, 1e4, float("nan"), float("inf")):
            assert torch.equal(forward(keep, images.masked_fill(~keep, value)), first)


@torch.no_grad()
def test_all_visible_and_nothing_visible(model, images):
    forward = masked_forward(model)
    assert torch.equal(forward(torch.ones(3, 64, 64), images), model(images))
    assert forward.stats.plain == 1
    assert torch.equal(forward(torch.zeros(1, 64, 64), images), model.fc.bias.expand(3, -1))
    assert torch.equal(forward(torch.zeros(1, 64, 64), images), model.fc.bias.expand(3, -1))
    mixed = torch.stack([torch.ones(64, 64), torch.zeros(64, 64), torch.ones(64, 64)])
    torch.testing.assert_close(forward(mixed, images)[::2], model(images)[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_small_types_are_finite(model, images, keep, dtype):
    small = copy.deepcopy(model).to(dtype)
    forward = masked_forward(small)
    for _ in range(2):
        out = forward(keep, images.to(dtype))
        assert out.dtype == dtype and bool(torch.isfinite(out).all())
        wanted = masked_forward(model)(keep, images)
        assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert torch.equal(forward(torch.zeros(1, 64, 64), images.to(dtype)), small.fc.bias.expand(3, -1))


@torch.no_grad()
def test_autocast(model, images, keep):
    forward = masked_forward(model)
    wanted = forward(keep, images)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out = forward(keep, images)
            assert (out.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_gradients_are_those_of_the_visible_pixels(keep):
    """Nothing flows to hidden pixels, nor through what is filled in their place: as published."""
    model = tiny(BasicBlock).double()
    x = torch.randn(3, 3, 64, 64, dtype=torch.double, requires_grad=True)
    grads = []
    for crop in (False, True):
        forward = masked_forward(model, crop=crop)
        for _ in range(2):
            (grad,) = torch.autograd.grad(forward(keep, x)[:, 0].sum(), x)
            assert bool((grad.masked_select(~keep.expand_as(grad)) == 0).all())
            assert bool((grad != 0).any())
            grads.append(grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-8, atol=1e-12)
    layer = (
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    )
    one = torch.zeros(1, 5, 5, dtype=torch.bool)
    one[0, 2, 2] = True
    z = torch.ones(1, 1, 5, 5, dtype=torch.double, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_forward(layer)(one, z).sum(), z)
    # all 9 known outputs see the visible pixel, each through one weight; the ring's copies of it carry none
    torch.testing.assert_close(grad[0, 0, 2, 2], layer[0].weight.sum() / 9)


@pytest.mark.parametrize("fill_", ["neighbours", "zeros", "partial"])
def test_logits_do_not_depend_on_autograd(model, images, keep, fill_):
    for crop in (False, True):
        for masks in (keep, keep[2:]):
            forward = masked_forward(model, fill_, crop=crop)
            for _ in range(2):
                with torch.no_grad():
                    wanted = forward(masks, images)
                torch.testing.assert_close(forward(masks, images), wanted, rtol=1e-5, atol=1e-5)
                attached = images.clone().requires_grad_()
                torch.testing.assert_close(forward(masks, attached), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_mask_many_images_and_one_image_many_masks(model, images, keep):
    forward = masked_forward(model)
    same = forward(keep[1:2], images)
    for row in range(3):
        torch.testing.assert_close(forward(keep[1], images[row : row + 1])[0], same[row], rtol=1e-5, atol=1e-5)
    spread = forward(keep, images[:1])
    for row in range(3):
        torch.testing.assert_close(forward(keep[row], images[:1])[0], spread[row], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_gpu_is_waited_for_once_to_know_that_all_is_visible(images, keep):
    forward = masked_forward(tiny(BasicBlock))
    with Dispatched() as ran:
        forward(torch.ones_like(keep), images)
    assert ran.names.count("stack") == 1 and not ran.waits


@torch.no_grad()
def test_a_transformer_waits_to_count_its_patches_and_no_more(images, keep):
    forward = masked_forward(vit())
    with Dispatched() as ran:
        forward(keep, images)
    assert "gather" in ran.names and not ran.waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_laws_on_a_gpu(images, keep):
    model = tiny(BasicBlock).cuda()
    x, k = images.cuda(), keep.cuda()
    forward = masked_forward(model)
    wanted = masked_forward(copy.deepcopy(model).cpu())(keep, images)
    for _ in range(2):
        torch.testing.assert_close(forward(k, x).cpu(), wanted, rtol=1e-3, atol=1e-3)
        assert torch.equal(forward(k, x), forward(k, x.masked_fill(~k, float("nan"))))
    assert torch.equal(forward(torch.ones_like(k), x), model(x))
    with pytest.raises(SkipError, match="move the mask"):
        forward(keep, x)
