"""A timm backbone as an encoder that stops at a level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError

_OWN = {"features_only", "feature_cls", "in_chans", "pretrained", "strict_img_size"}  # what is passed to timm here


class TimmEncoder(nn.Module):
    """A timm backbone as levels of distinct stride, that runs no deeper than the level that is wanted.

    Args:
        name: a timm model.
        in_channels: channels of the images.
        depth: deepest level to keep; deeper weights are dropped. None keeps all.
        pretrained: load timm's weights.
        arguments: passed to `timm.create_model`.

    Raises:
        SkipError: for an unknown name, arguments that timm does not take or that are set here, a backbone without
            intermediate features, or one whose features all have one stride (a plain ViT).
    """

    def __init__(self, name: str, in_channels: int, depth: int | None, pretrained: bool, arguments: Any) -> None:
        super().__init__()
        import timm

        if not isinstance(arguments, Mapping) or not all(isinstance(each, str) for each in arguments):
            raise SkipError(f"expected encoder_args as a mapping of arguments of timm.create_model; got {arguments!r}")
        if own := sorted(set(arguments) & _OWN):
            raise SkipError(
                f"encoder_args has {', '.join(own)}, which the encoder sets itself: pretrained and in_channels are "
                "arguments of the network, the rest is fixed"
            )

        # Models with a window or a position table check the image size; some can be told not to.
        options = {"features_only": True, "feature_cls": "getter", "in_chans": in_channels, "pretrained": pretrained}
        flexible = True
        try:
            try:
                model = timm.create_model(name, **options, strict_img_size=False, **arguments)
            except TypeError:
                flexible = False
                model = timm.create_model(name, **options, **arguments)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            reason = str(error) or type(error).__name__
            raise SkipError(
                f"timm has no usable features for {name!r}: {reason}; pick one of timm.list_models(), one with "
                "forward_intermediates"
            ) from error
        body = model.model
        if not hasattr(body, "forward_intermediates"):
            raise SkipError(f"{name} has no forward_intermediates and cannot stop early; choose another backbone")
        strides = [int(r) for r in model.feature_info.reduction()]
        channels = model.feature_info.channels()
        last = {stride: at for at, stride in enumerate(strides)}  # of several features with one stride, the last
        levels = [last[stride] for stride in sorted(last)]
        if len(levels) < 2:
            raise SkipError(
                f"the features of {name} all have stride {strides[0]}: a grid needs levels of falling resolution; "
                "choose a backbone with stages (resnet, convnext, swin, pvt_v2, ...)"
            )
        if depth is not None:
            levels = levels[: depth + 1]
        self.strides = [strides[at] for at in levels]
        self.channels = [channels[at] for at in levels]
        self.indices = [int(model.out_indices[at]) for at in levels]
        if depth is not None:
            body.prune_intermediate_layers(self.indices, prune_norm=True)
        self.name = name
        self.model = body
        config = getattr(body, "pretrained_cfg", None) or {}
        self.multiple = math.lcm(*strides)  # of all levels, so that a pruned model pads as the full one does
        if config.get("fixed_input_size") and not flexible:
            self.multiple = math.lcm(self.multiple, int(arguments.get("img_size", config["input_size"][-1])))

    def forward(self, images: Tensor, level: int) -> list[Tensor]:
        """Features `[N, channels, h, w]` of levels 0 to `level`; what lies deeper does not run."""
        indices = self.indices[: level + 1]
        try:
            return cast(
                "list[Tensor]",
                self.model.forward_intermediates(
                    images, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
                ),
            )
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            height, width = images.shape[-2:]
            raise SkipError(
                f"the backbone {self.name} cannot take images of {height}x{width} pixels: {error}"
            ) from error
