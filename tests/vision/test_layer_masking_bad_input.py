"""Layer masking: bad input is said at once, and nothing is changed."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from skipguide.errors import SkipError
from skipguide.vision import LayerMask, masked_forward
from zoo import masking
from zoo.masking import state, tiny, vit

model, images, keep = masking.model, masking.images, masking.keep


@torch.no_grad()
def test_a_transformer_that_goes_round_the_place_where_tokens_are_dropped(images, keep):
    class Round(timm.models.vision_transformer.VisionTransformer):
        def forward(self, x):
            return self.forward_head(self.blocks(self.patch_embed(x)))

    with pytest.raises(SkipError, match="nothing was masked"):
        masked_forward(vit(Round))(keep, images)


@torch.no_grad()
def test_images_are_found_among_keywords(model, keep):
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, labels=None, pixel_values=None):
            return self.model(pixel_values)

    x = torch.randn(3, 3, 64, 64)
    batch = {"labels": torch.arange(3), "pixel_values": x}
    with LayerMask(keep).apply(Labelled().eval()) as applied:
        assert torch.equal(applied.model(**batch), applied.model(pixel_values=x))
        with pytest.raises(SkipError, match=r"images \[N, C, H, W\]"):
            applied.model(labels=batch["labels"])


def test_bad_input_is_refused(images, keep):
    model = tiny(BasicBlock)
    before = state(model)
    with pytest.raises(SkipError, match="one of neighbours"):
        LayerMask(keep, fill="gray")
    with pytest.raises(SkipError, match="meta"):
        LayerMask(keep.to("meta")).apply(model)
    with pytest.raises(SkipError, match="move the mask"), LayerMask(keep).apply(model):
        model(images.to("meta"))
    with pytest.raises(SkipError, match="soft mask"):
        masked_forward(model)(keep * 0.5, images)
    with pytest.raises(SkipError, match="no 2D convolution"):
        LayerMask(keep).apply(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4)))
    with pytest.raises(SkipError, match="torch module"):
        LayerMask(keep).apply(lambda x: x)
    with pytest.raises(SkipError, match="training mode"):
        LayerMask(keep).apply(model.train())
    model.eval()
    with LayerMask(keep).apply(model):
        with pytest.raises(SkipError, match="one mask or one for each of 2"):
            model(images[:2])
        with pytest.raises(SkipError, match="images' size"):
            model(torch.randn(3, 3, 32, 32))
        with pytest.raises(SkipError, match=r"images \[N, C, H, W\]"):
            model(images[0])
        with pytest.raises(SkipError, match="of floats"):
            model(images.byte())
        with pytest.raises(SkipError, match="has a mask already"):
            LayerMask(keep).apply(model)
        with pytest.raises(SkipError, match="has a mask applied already"):
            masked_forward(model)(keep, images)
        with pytest.raises(SkipError, match="training mode"):
            model.train()(images)
        model.eval()
    assert state(model) == before


def test_operations_that_are_not_known_are_named(images, keep):
    class Odd(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), act

        def forward(self, x):
            return self.act(self.conv(x)).mean((2, 3))

    def secret(x):
        with torch._C.DisableTorchFunction():  # as compiled code or a scripted function would
            return x * 2

    cases = {
        "interpolate": nn.Upsample(scale_factor=2),
        "group_norm": nn.GroupNorm(2, 4),
        "instance_norm": nn.InstanceNorm2d(4),
        "roll": lambda x: x.roll(1, 2),
        "softmax": lambda x: x.softmax(1),
        "flip": lambda x: x.flip(3),
        "lp_pool2d|avg_pool2d|pow": nn.LPPool2d(3, 2),
        "cumsum": lambda x: x.cumsum(2),
        "no operation of torch made": secret,
        "custom autograd": lambda x: F.relu(secret(x)),
        "conv_transpose2d": nn.ConvTranspose2d(4, 4, 2),
        "getitem|indices of positions": lambda x: x[:, :, 1:],
    }
    for words, act in cases.items():
        model = Odd(act).eval()
        before = state(model)
        with pytest.raises(SkipError, match=words), torch.no_grad():
            masked_forward(model)(keep, images)
        assert state(model) == before


def test_a_model_that_drops_the_images(images, keep):
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(SkipError, match="no convolution"):
        masked_forward(Blind().eval())(keep, images)
