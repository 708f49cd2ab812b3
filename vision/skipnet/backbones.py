"""The residual networks that SkipNet gates: the CIFAR ResNets, and those of torchvision and timm by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.config import as_list, as_whole, as_wholes
from skipguide.errors import SkipError

# Blocks per group of the CIFAR ResNets (arXiv 1711.09485, section 4); the depth is 6 n + 2 convolutions.
CIFAR = {"resnet38": 6, "resnet74": 12, "resnet110": 18, "resnet152": 25}
IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """The ResNet for small images (arXiv 1512.03385, section 4.2): a 3x3 stem and groups of basic blocks.

    Every group after the first begins with stride 2 and a 1x1 projection.

    Args:
        blocks: basic blocks of every group.
        widths: channels of every group.
        num_classes: outputs of the head.
        in_channels: channels of the images.

    Input `[B, in_channels, H, W]`, output logits `[B, num_classes]`.

    Raises:
        SkipError: for blocks and widths that are not positive or of different number.

    Example:
        >>> CifarResNet([2, 2], [8, 16], num_classes=4)(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 4])
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int] = WIDTHS, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        from torchvision.models.resnet import BasicBlock

        super().__init__()
        blocks, widths = as_list("blocks", blocks), as_list("widths", widths)
        if len(blocks) != len(widths):
            raise SkipError(f"expected blocks and widths, one of each per group; got {blocks} and {widths}")
        num_classes, in_channels = as_wholes(num_classes=num_classes, in_channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.groups = nn.Sequential()
        before = widths[0]
        for group, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stride = 1 if group == 0 else 2
            first = BasicBlock(before, width, stride, _projection(before, width, stride))
            self.groups.append(nn.Sequential(first, *(BasicBlock(width, width) for _ in range(count - 1))))
            before = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=math.sqrt(2 / self.fc.weight.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.groups(x)
        out: Tensor = self.fc(self.avgpool(x).flatten(1))
        return out


def _projection(before: int, after: int, stride: int) -> nn.Module | None:
    if stride == 1 and before == after:
        return None
    return nn.Sequential(_Projection(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))


class _Projection(nn.Conv2d):
    """A 1x1 convolution that a narrow network can be trained through in `channels_last` on a CPU.

    oneDNN, which torch calls there, writes past the end of its memory for the weights' gradient if the convolution is
    strided and has fewer input channels than the processor's vectors hold: 8 with AVX2, 16 with AVX-512
    (uxlfoundation/oneDNN, issue 6035, open in torch 2.14). Such a one takes the places of the stride first and has no
    stride then: the same sum. Pooling takes them, and not an index, because layer masking follows it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= 16:
            return super().forward(x)
        return F.conv2d(F.avg_pool2d(x, 1, self.stride), self.weight, self.bias)


def build_backbone(name: str, num_classes: int = 10, pretrained: bool | str | None = None) -> nn.Module:
    """The ungated network of a name.

    Args:
        name: `"resnet38"`, `"resnet74"`, `"resnet110"`, `"resnet152"` (CIFAR) or `"resnet18"`, `"resnet34"`,
            `"resnet50"`, `"resnet101"`, `"resnet152"` (ImageNet, torchvision's layout). ResNet-152 is in both lists:
            `"cifar_resnet152"` and `"imagenet_resnet152"` name one of them, the plain name is the CIFAR network unless
            `pretrained` or 1000 classes ask for the other. `"torchvision/NAME"` and `"timm/NAME"` are any other model
            whose blocks are known.
        num_classes: size of the head. Pretrained weights with another number of classes get a fresh head.
        pretrained: None is a random start; `"torchvision"` (or True) and `"timm"` download that library's ImageNet
            weights; `"torchvision:IMAGENET1K_V1"` names the weights.

    Raises:
        SkipError: for an unknown name, or weights that do not exist.
    """
    num_classes = as_whole("num_classes", num_classes)
    source, _, plain = name.rpartition("/")
    plain = plain.removeprefix("imagenet_").removeprefix("cifar_")
    library, _, weights = _library(pretrained).partition(":")
    if source:
        if source not in ("torchvision", "timm") or library not in ("", source):
            raise SkipError(
                f"expected a name like torchvision/regnet_y_400mf or timm/resnet26d, with weights of the same library; "
                f"got {name!r} with pretrained={pretrained!r}"
            )
        return _from_library(source, plain, num_classes, weights or ("DEFAULT" if library else ""))
    is_cifar = plain in CIFAR and (plain not in IMAGENET or (not library and num_classes < 1000))
    if (is_cifar or name.startswith("cifar_")) and plain in CIFAR and not name.startswith("imagenet_"):
        if library:
            raise SkipError(
                f"there are no ImageNet weights for the CIFAR network {name!r}; SkipNet.from_reference_checkpoint "
                f"reads the published CIFAR checkpoints"
            )
        return CifarResNet([CIFAR[plain]] * 3, WIDTHS, num_classes)
    if plain in IMAGENET and not name.startswith("cifar_"):
        return _from_library(library or "torchvision", plain, num_classes, weights or ("DEFAULT" if library else ""))
    raise SkipError(
        f"unknown network {name!r}; expected {', '.join(CIFAR)} (CIFAR), {', '.join(IMAGENET)} (ImageNet), "
        f"torchvision/NAME or timm/NAME"
    )


def unweighted(name: str, pretrained: bool | str | None) -> str:
    """The name under which `build_backbone` gives the same network without weights.

    Example:
        >>> unweighted("resnet152", "timm"), unweighted("resnet38", None)
        ('timm/resnet152', 'resnet38')
    """
    library = _library(pretrained).partition(":")[0]
    return f"{library}/{name.removeprefix('imagenet_')}" if library and "/" not in name else name


def _library(pretrained: bool | str | None) -> str:
    if pretrained is None or pretrained is False:
        return ""
    found = "torchvision" if pretrained is True else pretrained
    if str(found).partition(":")[0] not in ("torchvision", "timm"):
        raise SkipError(
            f"expected pretrained to be None, 'torchvision', 'timm' or 'torchvision:WEIGHTS'; got {pretrained!r}"
        )
    return found


def _from_library(library: str, name: str, num_classes: int, weights: str) -> nn.Module:
    if library == "timm":
        import timm

        if name not in timm.list_models():
            raise SkipError(f"timm has no model {name!r}: see timm.list_models()")
        tag = "" if weights in ("", "DEFAULT") else f".{weights}"
        found: nn.Module = _downloaded(
            name, lambda: timm.create_model(name + tag, pretrained=bool(weights), num_classes=num_classes)
        )
        return found
    from torchvision import models

    if name not in models.list_models():
        raise SkipError(f"torchvision has no model {name!r}: see torchvision.models.list_models()")
    if not weights:
        fresh: nn.Module = models.get_model(name, num_classes=num_classes)
        return fresh
    try:
        chosen = models.get_model_weights(name)[weights]
    except KeyError as error:
        known = [entry.name for entry in models.get_model_weights(name)]
        raise SkipError(f"torchvision's {name} has weights {known}; got {weights!r}") from error
    return _with_head(_downloaded(name, lambda: models.get_model(name, weights=chosen)), num_classes)


def _downloaded(name: str, load: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights may have to be fetched.

    Raises:
        SkipError: where they cannot be, such as offline.
    """
    try:
        return load()
    except OSError as error:  # of urllib, requests and the hub alike
        raise SkipError(
            f"the pretrained weights of {name} are not on this machine and cannot be downloaded ({error}): fetch them "
            f"once where there is a network, or leave pretrained away"
        ) from error


def _with_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Replace the last linear layer where it has another number of outputs."""
    name, head = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    if head.out_features != num_classes:
        parent, _, leaf = name.rpartition(".")
        fresh = nn.Linear(head.in_features, num_classes, head.bias is not None)
        setattr(model.get_submodule(parent), leaf, fresh)
    return model


@torch.no_grad()
def measure_blocks(
    model: nn.Module, image: Sequence[int], blocks: Sequence[tuple[nn.Module, nn.Module | None]]
) -> tuple[list[tuple[tuple[int, ...], int, int]], int]:
    """Shapes and costs of a network's blocks, measured on the meta device: nothing is computed.

    Args:
        model: the network.
        image: `(channels, height, width)` of one image.
        blocks: every block with the projection on its skip path.

    Returns:
        Per block the shape that enters it, its MACs and those of its projection; and the MACs of the whole network.
    """
    from torch.utils.flop_counter import FlopCounterMode

    entering: dict[int, tuple[int, ...]] = {}
    spent: dict[int, int] = {}
    counter = FlopCounterMode(display=False)
    watched = [module for pair in blocks for module in pair if module is not None]

    def enters(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            entering[id(module)] = tuple(args[0].shape)
        spent[id(module)] = -counter.get_total_flops()

    def leaves(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        spent[id(module)] += counter.get_total_flops()

    handles = [m.register_forward_pre_hook(enters) for m in watched] + [
        m.register_forward_hook(leaves) for m in watched
    ]
    was_training = {module: module.training for module in model.modules()}
    state = {name: t.to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    try:
        model.eval()
        with counter:
            torch.func.functional_call(model, state, torch.empty(1, *image, device="meta", dtype=dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise SkipError(f"{type(model).__name__} does not take images of shape {tuple(image)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    if unseen := [type(block).__name__ for block, _ in blocks if id(block) not in entering]:
        raise SkipError(
            f"{len(unseen)} residual blocks of {type(model).__name__} ({unseen[0]}) do not run as modules, because it "
            "was traced or compiled into one graph: give SkipNet the network as it was before"
        )
    sites = [
        (entering[id(block)], spent[id(block)] // 2, spent[id(short)] // 2 if short is not None else 0)
        for block, short in blocks
    ]
    return sites, counter.get_total_flops() // 2
