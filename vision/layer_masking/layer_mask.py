"""LayerMask: a region of the image is absent in every layer, not painted over (layer masking, arXiv 2211.14646)."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, end_everywhere, everywhere_at, hold_everywhere
from skipguide.config import as_flag, as_list, check_keys
from skipguide.errors import SkipError
from skipguide.gate import Gate, Installation, gate_of
from skipguide.shown import Row, Shown
from skipguide.vision.layer_masking.activation_info import info_of
from skipguide.vision.layer_masking.baselines import PixelScale
from skipguide.vision.layer_masking.checks import FILLS, check_fill, check_keep, check_model, expanded
from skipguide.vision.layer_masking.masker import Masker, MaskStats


@dataclass(frozen=True, eq=False, repr=False)
class LayerMask(Shown):
    """Hides a region of the images from every layer of a convolutional network or vision transformer.

    Activations behind the hidden pixels are never read: a convolution sees the mean of known neighbours in their
    place, a pooling leaves them out, a transformer drops their tokens. Hidden pixels have exactly zero influence.

    Args:
        keep: bool `[N or 1, H, W]` or `[N or 1, 1, H, W]`, True = visible; one mask for all images, or one each.
        fill: "neighbours" is layer masking; "zeros" and "partial" (partial convolution) are the paper's ablations
            of it. "black", "grey", "mean", "blur" and "noise" paint the pixels instead: the usual baselines, under
            the same interface.
        crop: compute only the box of every activation that the answer depends on.

    Raises:
        SkipError: for a mask of another type or shape.

    Example:
        >>> import torch
        >>> from skipguide.vision import LayerMask
        >>> import torchvision
        >>> model = torchvision.models.resnet18(num_classes=5).eval()
        >>> keep = torch.zeros(1, 64, 64, dtype=torch.bool)
        >>> keep[:, 16:48, 16:48] = True
        >>> images = torch.randn(2, 3, 64, 64)
        >>> with LayerMask(keep).apply(model) as applied:
        ...     first = model(images)
        ...     again = model(images.masked_fill(~keep[:, None], 1e6))
        >>> torch.equal(first, again), applied.stats.visible
        (True, 0.25)
    """

    keep: Tensor
    fill: str = "neighbours"
    crop: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))
        check_fill(self.fill)
        object.__setattr__(self, "crop", as_flag("crop", self.crop))

    def _heading(self) -> str:
        count, _, height, width = self.keep.shape
        crop = "" if self.crop else ", crop=False"
        return f"LayerMask({count} x {height} x {width}, {self._kept} of the pixels kept, fill={self.fill!r}{crop})"

    @property
    def _kept(self) -> str:
        return f"{self.keep.float().mean():.0%}"

    def apply(self, model: nn.Module) -> AppliedMask:
        """Put the mask on a model, until the `with` block ends or `remove()`.

        Raises:
            SkipError: for a model that cannot be masked, in training with batch norm, or on another device.
        """
        check_model(model, self.keep, self.fill)
        return AppliedMask(self, model)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the mask packed, eight pixels to a byte."""
        bits = self.keep.cpu().flatten().to(torch.uint8)
        bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
        packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        text = base64.b64encode(packed.numpy().tobytes()).decode("ascii")
        return {"version": 1, "shape": list(self.keep.shape), "keep": text, "fill": self.fill, "crop": self.crop}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            SkipError: for something else, or a damaged mask.
        """
        check_keys(data, {"shape", "keep", "fill", "crop"}, "a LayerMask")
        try:
            shape, fill, crop = as_list("shape", data["shape"]), data["fill"], data["crop"]
            packed = torch.frombuffer(bytearray(base64.b64decode(data["keep"], validate=True)), dtype=torch.uint8)
            bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            if len(packed) != -(-math.prod(shape) // 8):
                raise ValueError(f"{len(packed)} bytes")
            keep = bits.flatten()[: math.prod(shape)].bool().view(shape)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SkipError(
                f"expected the packed mask that LayerMask.to_dict wrote, of shape {data.get('shape')}; it is damaged "
                f"({error})"
            ) from error
        return cls(keep, fill, crop)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerMask):
            return NotImplemented
        return (self.fill, self.crop) == (other.fill, other.crop) and torch.equal(self.keep.cpu(), other.keep.cpu())

    __hash__ = object.__hash__


@dataclass(eq=False, repr=False)
class AppliedMask(Shown):
    """A mask on a model. A context manager; `remove()` takes it off.

    Attributes:
        mask: the settings.
        model: the model.
        stats: what its passes ran.
    """

    mask: LayerMask
    model: nn.Module
    masker: Masker = field(init=False)
    gate: Gate | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        gate = gate_of(self.model)
        if everywhere_at(gate, AppliedMask):
            raise SkipError(
                "this model has a mask already: remove it first (or skipguide.remove_from(model), if its handle is "
                "gone), or apply the product (keep1 & keep2)"
            )
        self.masker = Masker(self.model, self.mask.fill, self.mask.crop)
        self._installation = Installation([gate])
        self.gate = gate
        try:
            self._installation.install()
            hold_everywhere(gate, self)
        except BaseException:
            self.remove()
            raise

    @property
    def handle(self) -> Self:
        """What the user holds, or had."""
        return self

    def _heading(self) -> str:
        where = f"on {type(self.model).__name__}" if self.gate is not None else "removed"
        return f"Layer mask ({where}), {self.mask._kept} of the pixels kept, fill {self.mask.fill!r}"

    def _rows(self) -> list[Row]:
        return self.stats._rows()

    @property
    def stats(self) -> MaskStats:
        """What its passes ran."""
        return self.masker.stats

    # The rules of a masked pass read values at every operation: under torch.compile it runs as without.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable, which imports dynamo at once
    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        name = None
        if not args:
            given = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
            name = next((key for key in given if kwargs[key].ndim == 4), given[0] if given else None)
            if name is None:
                raise SkipError("expected the model to be called with images")
        images, rest = (args[0], args[1:]) if args else (kwargs[name], ())  # type: ignore[index]
        others = {key: value for key, value in kwargs.items() if key != name}
        check_model(self.model, None, self.mask.fill)
        keep, images = expanded(self.mask.keep, images)
        if name is None:
            return self.masker(call, keep, images, rest, others)
        return self.masker(lambda x, **more: call(**{name: x}, **more), keep, images, rest, others)

    def __enter__(self) -> Self:
        """The mask is on since `apply`."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Take the mask off."""
        try:
            self.remove()
        except BaseException:  # Ctrl-C: what was broken off is done again
            self.remove()
            raise

    def remove(self) -> None:
        """Take the mask off; the model is as it was. A second call does nothing."""
        if self.gate is not None:
            end_everywhere(self.gate, self)
        self._installation.remove()
        self.gate = None  # last: until here it can be repeated


class MaskedForward(Shown):
    """`f(keep, images) -> logits`: the model as a function of the mask, the form that captum attributes.

    Attributes:
        stats: what its passes ran.
    """

    def __init__(
        self, model: nn.Module, fill: str = "neighbours", *, crop: bool = True, scale: PixelScale | None = None
    ) -> None:
        check_fill(fill)
        check_model(model, None, fill)
        self.model = model
        self.masker = Masker(model, fill, as_flag("crop", crop), scale)

    def _heading(self) -> str:
        return f"MaskedForward of {type(self.model).__name__}, fill {self.masker.fill!r}"

    def _rows(self) -> list[Row]:
        return self.stats._rows()

    @property
    def stats(self) -> MaskStats:
        """What its passes ran."""
        return self.masker.stats

    def __call__(self, keep: Tensor, images: Tensor) -> Any:
        """The model's answer.

        Args:
            keep: `[N or 1, H, W]` or `[N or 1, 1, H, W]`, bool, or numbers that are all 0 or 1.
            images: `[N or 1, C, H, W]`; one image is taken for all masks.

        Raises:
            SkipError: for a soft mask, or one that does not belong to the images.
        """
        if everywhere_at(gate_of(self.model), AppliedMask):
            raise SkipError("this model has a mask applied already: remove it first, or use the product of both masks")
        given: Any = keep  # check_keep names what is wrong with it
        check_model(self.model, given if isinstance(given, Tensor) else None, self.masker.fill)
        kept, images = expanded(check_keep(keep, soft=True), images)
        return self.masker(self.model, kept, images, (), {})


def masked_forward(
    model: nn.Module, fill: str = "neighbours", *, crop: bool = True, scale: PixelScale | None = None
) -> MaskedForward:
    """The model as a function of the mask: `f(keep, images) -> logits`.

    Args:
        model: in eval mode.
        fill: as for `LayerMask`.
        crop: as for `LayerMask`.
        scale: mean and standard deviation of the model's preprocessing, which "black" and "noise" are defined by;
            by default what timm says of the model, else ImageNet's.

    Raises:
        SkipError: for a model that cannot be masked.

    Example:
        >>> import torch
        >>> from skipguide.vision import masked_forward
        >>> import torchvision
        >>> f = masked_forward(torchvision.models.resnet18(num_classes=3).eval())
        >>> nothing = torch.zeros(1, 1, 64, 64)
        >>> torch.equal(f(nothing, torch.randn(1, 3, 64, 64))[0], f.model.fc.bias)
        True
    """
    return MaskedForward(model, fill, crop=crop, scale=scale)


def mask_of(activation: Tensor) -> Tensor | None:
    """The mask of an activation, asked for in a forward hook of a masked pass: bool `[N or 1, 1, h, w]`."""
    info = info_of(activation)
    if info is None or info.number is None:
        return None
    with torch._C.DisableTorchFunction():  # a hook runs inside the watched pass
        return info.owner.mask(info.number).clone()


__all__ = ["FILLS", "AppliedMask", "LayerMask", "MaskStats", "MaskedForward", "mask_of", "masked_forward"]
