# ruff: noqa: E501
"""Which families of networks layer masking is proven on: tiny random instances, one law after the other.

`python tests/vision/test_layer_masking_families.py` prints the table of vision/layer_masking/README.md.
"""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import densenet, efficientnet, mobilenetv3, resnet, vgg

from skipguide.errors import SkipError
from skipguide.vision import masked_forward

SIZE = 64


def tv_resnet(block, **kwargs):
    return resnet.ResNet(block, [1, 1, 1, 1], num_classes=4, **kwargs)


def mobilenet_v3():
    conf = mobilenetv3.InvertedResidualConfig
    blocks = [conf(8, 3, 16, 8, True, "RE", 2, 1, 1.0), conf(8, 5, 24, 16, True, "HS", 2, 1, 1.0),
              conf(16, 5, 32, 16, False, "HS", 1, 1, 1.0)]  # fmt: skip
    return mobilenetv3.MobileNetV3(blocks, 32, num_classes=4)


def efficientnet_v1():
    conf = efficientnet.MBConvConfig
    return efficientnet.EfficientNet([conf(1, 3, 1, 8, 8, 1), conf(4, 5, 2, 8, 16, 2)], 0.0, num_classes=4)


def efficientnet_v2():
    blocks = [efficientnet.FusedMBConvConfig(4, 3, 1, 8, 8, 1), efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2)]
    return efficientnet.EfficientNet(blocks, 0.0, num_classes=4)


def tiny_vgg(norm):
    model = vgg.VGG(vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=norm), num_classes=4, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 16), nn.ReLU(), nn.Linear(16, 4))
    return model


def narrow(name, **kwargs):
    return lambda: timm.create_model(name, num_classes=4, **kwargs)


RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}

# family -> (what it exercises, how to build one, whether a box is cut, what the answer to nothing is)
FAMILIES = {
    "ResNet, BasicBlock (torchvision)": ("functional add, strided 1x1", lambda: tv_resnet(resnet.BasicBlock), True, "fc"),
    "ResNet, Bottleneck (torchvision)": ("", lambda: tv_resnet(resnet.Bottleneck), True, "fc"),
    "ResNet, dilated (torchvision)": (
        "dilation 2 and 4", lambda: tv_resnet(resnet.Bottleneck, replace_stride_with_dilation=[False, True, True]), True, "fc"),
    "ResNeXt (torchvision)": ("grouped conv", lambda: tv_resnet(resnet.Bottleneck, groups=4, width_per_group=8), True, "fc"),
    "ResNeXt, dilated (timm)": ("output stride 8", narrow("resnext50_32x4d", layers=(1, 1, 1, 1), output_stride=8), True, "fc"),
    "Wide ResNet (torchvision)": ("", lambda: tv_resnet(resnet.Bottleneck, width_per_group=96), True, "fc"),
    "ResNet (timm)": ("", narrow("resnet18", **RESNET), True, "fc"),
    "ResNet-D (timm)": ("deep stem, average-pool downsampling", narrow("resnet26d", **RESNET), True, "fc"),
    "ResNet-T (timm)": ("tiered stem", narrow("resnet10t", channels=(16, 24, 32, 48)), True, "fc"),
    "SE-ResNet (timm)": ("squeeze over visible positions", narrow("seresnet18", **RESNET), True, "fc"),
    "ECA-ResNet (timm)": ("channel attention", narrow("ecaresnet26t", **RESNET), True, "fc"),
    "ResNet-AA (timm)": ("average pools that reduce", narrow("resnetaa34d", layers=(1, 1, 1, 1)), True, "fc"),
    "ResNet-V2 (timm)": ("pre-activation, standardised weights", narrow("resnetv2_18", layers=(1, 1, 1, 1)), True, "head"),
    "ResNet-Blur (timm)": ("BlurPool, reflection padding", narrow("resnetblur18", **RESNET), True, "fc"),
    "Res2Net (timm)": ("channel splits", narrow("res2net50_26w_4s", layers=(1, 1, 1, 1)), True, "fc"),
    "VGG (torchvision)": (
        "positional classifier: renormalised bins", lambda: tiny_vgg(False), False, "head"),
    "VGG-BN (torchvision)": (
        "", lambda: tiny_vgg(True), False, "head"),
    "DenseNet (torchvision)": (
        "concatenation, average pools, pre-activation", lambda: densenet.DenseNet(8, (2, 2, 2), 16, num_classes=4), True, "classifier"),
    "DenseNet (timm)": ("", narrow("densenet121", growth_rate=8, block_config=(2, 2, 2)), True, "classifier"),
    "MobileNetV2 (torchvision)": ("depthwise conv", lambda: torchvision.models.MobileNetV2(4, 0.25), True, "head"),
    "MobileNetV2 (timm)": ("", narrow("mobilenetv2_035"), True, "classifier"),
    "MobileNetV3 (torchvision)": ("5x5 depthwise, SE, hard swish", mobilenet_v3, True, "head"),
    "MobileNetV3 (timm)": ("", narrow("mobilenetv3_small_050"), True, "head"),
    "EfficientNet (torchvision)": ("SiLU, SE", efficientnet_v1, True, "head"),
    "EfficientNet (timm)": ("", narrow("efficientnet_b0"), True, "classifier"),
    "EfficientNet, TF 'same' padding (timm)": (
        "asymmetric padding", narrow("tf_efficientnet_b0"), True, "classifier"),
    "EfficientNet V2 (torchvision)": ("fused blocks", efficientnet_v2, True, "head"),
    "RegNet-Y (timm)": ("group conv, SE", narrow("regnety_002"), True, "head"),
    "RegNet-Y (torchvision)": ("", lambda: torchvision.models.regnet_y_400mf(num_classes=4), True, "fc"),
    "RegNet-X (torchvision)": ("", lambda: torchvision.models.regnet_x_400mf(num_classes=4), True, "fc"),
    "ConvNeXt (timm)": (
        "patchify stem, 7x7 depthwise, LayerNorm, GELU", narrow("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), True, "head"),
    "ConvNeXt (torchvision)": (
        "channels-last blocks", lambda: torchvision.models.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(8, 16, 1), torchvision.models.convnext.CNBlockConfig(16, None, 2)],
            num_classes=4), True, "head"),
    "ConvNeXt V2 (timm)": (
        "GRN over visible positions", narrow("convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), True, "head"),
    "RepVGG (timm)": ("three branches added", narrow("repvgg_a0"), True, "head"),
    "SqueezeNet (torchvision)": ("ceil-mode pools, Fire", lambda: torchvision.models.squeezenet1_1(num_classes=4), True, "head"),
    "ShuffleNet V2 (torchvision)": ("channel shuffle", lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4), False, "fc"),
    "GhostNet (timm)": ("", narrow("ghostnet_050"), True, "head"),
    "ViT (timm)": (
        "tokens are dropped", narrow("vit_tiny_patch16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=2), None, "same"),
    "DeiT, distilled (timm)": (
        "", narrow("deit_tiny_distilled_patch16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=2), None, "same"),
    "ViT, average pooling (timm)": (
        "", narrow("vit_tiny_patch16_224", img_size=SIZE, embed_dim=32, depth=2, num_heads=2, global_pool="avg",
                   class_token=False, fc_norm=True), None, "refused"),
    "ViT (torchvision)": (
        "", lambda: torchvision.models.VisionTransformer(SIZE, 16, 2, 2, 32, 64, num_classes=4), None, "same"),
}  # fmt: skip
REFUSED = {
    "Swin (torchvision)": (lambda: torchvision.models.swin_t(num_classes=4), "pad|roll|window"),
    "HRNet (timm)": (narrow("hrnet_w18_small"), "interpolate"),
    "ResNet with GroupNorm (timm)": (narrow("resnet50_gn", layers=(1, 1, 1, 1)), "group_norm"),
}


def build(name):
    """A random instance in eval mode, whose norms and biases do something."""
    torch.manual_seed(0)
    model = FAMILIES[name][1]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.3)
                module.weight.uniform_(0.5, 1.5)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                module.bias.normal_(0, 0.1)
                if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                    module.weight.normal_(0, 0.1)  # torchvision's ViT starts with a head of zeros
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "layer_scale")):
                parameter.uniform_(0.3, 1)
            if name.endswith(("grn.weight", "grn.bias")):
                parameter.normal_(0, 0.5)
    return model


def masks():
    g = torch.Generator().manual_seed(3)
    keep = torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool)
    keep[0, :, 6:40, 14:50] = True
    cells = torch.rand(2, 1, 8, 8, generator=g) > 0.5
    keep[1:] = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return keep


def laws(name):
    """Run every law on one family; returns the share of the work that a box took."""
    _, _, cuts, nothing = FAMILIES[name]
    model = build(name)
    x, keep = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), masks()
    forward, uncut = masked_forward(model), masked_forward(model, crop=False)
    with torch.no_grad():
        plain = model(x)
        scale = float(plain.abs().max())
        first = forward(keep, x)
        assert bool(torch.isfinite(first).all())
        assert float((first - plain).abs().max()) > 1e-6 * scale, "the mask does nothing"
        # a plan changes nothing but the rounding
        torch.testing.assert_close(forward(keep, x), first, rtol=1e-4, atol=1e-5 * scale)
        # hidden pixels: exactly no influence
        for value in (float("nan"), 1e3):
            assert torch.equal(forward(keep, x.masked_fill(~keep, value)), forward(keep, x))
        # visible ones: some
        assert not torch.equal(forward(keep, x + 0.1 * keep), forward(keep, x))
        # everything visible: the plain model, to the bit
        assert torch.equal(forward(torch.ones(1, SIZE, SIZE), x), plain)
        # rows do not see each other
        alone = torch.cat([uncut(k, i[None]) for k, i in zip(keep, x, strict=True)])
        torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-5 * scale)
        share = None
        if cuts is not None:
            box = torch.zeros(1, SIZE, SIZE)
            box[:, 3:29, 35:61] = 1
            boxed = forward(box, x)
            torch.testing.assert_close(boxed, uncut(box, x), rtol=1e-4, atol=1e-5 * scale)
            share = forward.stats.computed
            assert share < 0.7 if cuts else share == 1.0, share
        empty = torch.zeros(1, SIZE, SIZE)
        if nothing == "refused":
            with pytest.raises(SkipError, match="nothing is visible"):
                forward(empty, x)
            return share
        answer = forward(empty, x)
        assert bool(torch.isfinite(answer).all()) and bool((answer == answer[:1]).all())
        if nothing not in ("head", "same"):
            assert torch.equal(answer[0], model.get_submodule(nothing).bias)
    return share


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    laws(name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_named(name):
    make, words = REFUSED[name]
    with pytest.raises(SkipError, match=words), torch.no_grad():
        masked_forward(make().eval())(masks(), torch.randn(3, 3, SIZE, SIZE))


@torch.no_grad()
def test_a_transformer_without_the_tokens():
    """Dropping tokens is the same as a transformer that is given those tokens only."""
    model = build("ViT (timm)")
    x, keep = torch.randn(2, 3, SIZE, SIZE), torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    keep[0, :, :32, :48] = True
    keep[1, :, 16:48, 16:32] = True
    found = masked_forward(model)(keep, x)
    tokens = model._pos_embed(model.patch_embed(x))
    grid = keep[:, 0, ::16, ::16].flatten(1)
    for row in range(2):
        kept = torch.cat([tokens[row, :1], tokens[row, 1:][grid[row]]])[None]
        wanted = model.forward_head(model.norm(model.blocks(model.norm_pre(kept))))
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-5, atol=1e-5)


def table():
    """What is proven, in Markdown: vision/layer_masking/README.md holds it."""
    nothings = {"fc": "classifier's bias", "classifier": "classifier's bias", "head": "the head of zero features",
                "same": "class token alone", "refused": "refused"}  # fmt: skip
    lines = ["| family | what it exercises | box is cut | nothing visible gives |", "|---|---|---|---|"]
    for name, (words, _, cuts, nothing) in FAMILIES.items():
        cut = {True: "yes", False: "no", None: "tokens"}[cuts]
        lines.append(f"| {name} | {words} | {cut} | {nothings[nothing]} |")
    return "\n".join(lines)


def test_the_readme_has_the_table():
    readme = Path(__file__).parents[2] / "vision" / "layer_masking" / "README.md"
    assert table() in readme.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
