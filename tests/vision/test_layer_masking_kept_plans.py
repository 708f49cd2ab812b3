"""Layer masking: what people put around a network does not cost it its plan, and torch.compile does not break it."""

import pytest
import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

from skipguide.vision import LayerMask, masked_forward

KEEP = torch.zeros(1, 64, 64, dtype=torch.bool)
KEEP[:, 8:40, 16:48] = True


def resnet():
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4).eval()


class Normalized(nn.Module):
    """As torchvision's `Normalize` does: it asks whether a constant of its own has a zero."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        std = torch.as_tensor([0.2, 0.3, 0.4])
        if (std == 0).any():
            raise ValueError("std has a zero")
        return self.body((images - 0.5) / std.view(-1, 1, 1))


class Asserting(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        logits = self.body(images)
        if torch.isnan(logits).any():
            raise ValueError("NaN")
        return logits


class Exits(nn.Module):
    """Stops where a value says so: it has two ways, and only one of them reads no value before an operation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, images):
        x = self.first(images)
        early = x.mean((2, 3))
        return early if bool((early.sum() > 0).all()) else self.second(x).mean((2, 3))


@pytest.mark.parametrize(
    "around", [Normalized, Asserting, lambda body: nn.Sequential(v2.Normalize([0.5] * 3, [0.2] * 3), body)]
)
@torch.no_grad()
def test_checks_of_constants_and_of_the_answer_keep_the_plan(around):
    model = around(resnet())
    images = torch.rand(2, 3, 64, 64)
    planned, recorded = masked_forward(model), masked_forward(model, crop=False)
    found = [planned(KEEP, images) for _ in range(3)][-1]
    assert planned.stats.planned == planned.stats.calls == 3 and planned.stats.computed < 0.8
    torch.testing.assert_close(found, recorded(KEEP, images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_forward_that_takes_another_way_is_right_on_both():
    model = Exits().eval()
    images = torch.randn(24, 3, 64, 64)
    forward = masked_forward(model)
    ways = set()
    for image in images.split(1):
        hidden = torch.where(KEEP[:, None], image, 0.0)
        expected = masked_forward(Exits().eval(), crop=False)(KEEP, hidden)
        torch.testing.assert_close(forward(KEEP, image), expected, atol=1e-5, rtol=1e-4)
        ways.add(bool((expected.sum() > 0).all()))
    assert len(ways) == 2, "the images take both"


@torch.no_grad()
def test_a_padding_of_nothing_keeps_the_plan():
    """Hugging Face's MobileNetV2 pads every convolution by hand, where its stride and size may need nothing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=64, num_labels=3)
    model = transformers.MobileNetV2ForImageClassification(config).eval()
    images = torch.rand(1, 3, 64, 64)
    forward = masked_forward(model)
    for _ in range(3):
        found = forward(KEEP, images).logits
    assert forward.stats.planned == 3
    torch.testing.assert_close(found, masked_forward(model, crop=False)(KEEP, images).logits, atol=1e-4, rtol=1e-3)
    moved = images.masked_fill(~KEEP[:, None], 5.0)
    assert torch.equal(forward(KEEP, moved).logits, found)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_masks_of_compiled_models_run_without_the_graphs():
    model, images = resnet(), torch.rand(2, 3, 64, 64)
    with LayerMask(KEEP).apply(model):
        expected = model(images)
    try:
        compiled = torch.compile(model, backend="eager")
        plain = compiled(images)
        for target in (model, compiled):
            with LayerMask(KEEP).apply(target):
                torch.testing.assert_close(compiled(images), expected)
        torch.testing.assert_close(masked_forward(compiled)(KEEP, images), expected)
        torch.testing.assert_close(compiled(images), plain)
        model.compile(backend="eager")
        with LayerMask(KEEP).apply(model):
            torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(model(images), plain)
    finally:
        torch._dynamo.reset()
