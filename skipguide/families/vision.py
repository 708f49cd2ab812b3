"""Data only: the residual blocks of torchvision and timm vision models, matched by class name.

Both libraries call some classes by one name. The entry `ResNet` fits both; where they differ, the key has the library's
name too.
A block whose shape changes has its projection on the skip path, without the activation that follows the sum.
"""

from __future__ import annotations

from skipguide.spec import BlockSpec, ModelSpec


def _stages(*names: str, stream: str = "x", shortcut: str = "", residual: str = "") -> ModelSpec:
    return ModelSpec(tuple(BlockSpec(name, streams=(stream,), shortcut=shortcut, residual=residual) for name in names))


def _one(stack: str, stream: str = "x", residual: str = "", classes: tuple[str, ...] = ()) -> ModelSpec:
    return ModelSpec((BlockSpec(stack, streams=(stream,), residual=residual, classes=classes),))


VISION_FAMILIES: dict[str, ModelSpec] = {
    "ResNet": _stages("layer1", "layer2", "layer3", "layer4", shortcut="downsample"),
    "CifarResNet": ModelSpec((BlockSpec("groups.*", streams=("x",), shortcut="downsample"),)),
    "torchvision.RegNet": ModelSpec((BlockSpec("trunk_output.*", streams=("x",), shortcut="proj"),)),
    "timm.RegNet": _stages("s1", "s2", "s3", "s4", shortcut="downsample", residual="downsample"),
    "torchvision.ConvNeXt": _one("features.*", "input", classes=("CNBlock",)),
    "timm.ConvNeXt": ModelSpec((BlockSpec("stages.*.blocks", streams=("x",), shortcut="shortcut"),)),
    "torchvision.EfficientNet": _one("features.*", "input", residual="use_res_connect"),
    "timm.EfficientNet": _one("blocks.*", residual="has_skip"),
    "timm.MobileNetV3": _one("blocks.*", residual="has_skip"),
    "torchvision.MobileNetV2": _one("features", residual="use_res_connect"),
    "torchvision.MobileNetV3": _one("features", "input", residual="use_res_connect"),
    "torchvision.VisionTransformer": _one("encoder.layers", "input"),
    "timm.VisionTransformer": _one("blocks"),
}
