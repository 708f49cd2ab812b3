"""LayerMask: a region of the image is absent in every layer, not painted over (layer masking, arXiv 2211.14646)."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skipguide.config import check_keys
from skipguide.errors import SkipError
from skipguide.gate import Call, Gate, gate_of
from skipguide.vision.layer_masking.baselines import BASELINES, PixelScale, painted, pixel_scale
from skipguide.vision.layer_masking.plan import Plan, Trace, make_plan
from skipguide.vision.layer_masking.run import ChangedError, MaskedRun
from skipguide.vision.layer_masking.spot import TAG, spot_of
from skipguide.vision.layer_masking.tokens import run_tokens, tokens_of

logger = logging.getLogger(__name__)

LAYERS = {"neighbours": "neighbours", "zeros": "zeros", "partial": "partial"}
FILLS = (*LAYERS, *BASELINES)

# What a model does is the same whatever is masked: traces are kept for as long as their model lives.
_TRACES: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Trace]] = WeakKeyDictionary()


@dataclass
class MaskStats:
    """The ledger of an applied mask.

    Attributes:
        calls: passes of the model.
        rows: images in them.
        planned: passes that ran by a plan (the first at a resolution finds out what the model does).
        plain: passes without anything hidden, which are the model's own.
        fill_rounds: rounds of neighbour fill, over all operations and passes.
        computed: positions that convolutions computed, of those of the plain model, in the last pass.
        visible: fraction of the pixels that is visible, in the last pass.
    """

    calls: int = 0
    rows: int = 0
    planned: int = 0
    plain: int = 0
    fill_rounds: int = 0
    computed: float = 1.0
    visible: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class LayerMask:
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
        """Read what `to_dict` wrote."""
        check_keys(data, {"shape", "keep", "fill", "crop"}, "a LayerMask")
        packed = torch.frombuffer(bytearray(base64.b64decode(data["keep"])), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        count = 1
        for size in data["shape"]:
            count *= size
        return cls(bits.flatten()[:count].bool().view(data["shape"]), data["fill"], data["crop"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerMask):
            return NotImplemented
        return (self.fill, self.crop) == (other.fill, other.crop) and torch.equal(self.keep, other.keep)

    __hash__ = object.__hash__


def check_keep(keep: Any, soft: bool = False) -> Tensor:
    """A mask as bool `[R, 1, H, W]`; with `soft`, other types are taken if they hold only 0 and 1.

    Raises:
        SkipError: for anything else.
    """
    what = "expected keep of bool [N or 1, H, W] or [N or 1, 1, H, W], True = visible"
    if not isinstance(keep, Tensor):
        raise SkipError(f"{what}; got {type(keep).__name__}: pass a tensor")
    if keep.ndim == 3:
        keep = keep[:, None]
    if keep.ndim != 4 or keep.shape[1] != 1 or 0 in keep.shape:
        raise SkipError(f"{what}; got shape {tuple(keep.shape)}")
    if keep.dtype != torch.bool:
        hard = bool(((keep == 0) | (keep == 1)).all())
        if not hard:
            raise SkipError(
                f"{what}; got a soft mask ({keep.dtype}, values between 0 and 1): threshold it (keep > 0.5)"
            )
        if not soft:
            raise SkipError(f"{what}; got {keep.dtype}: pass keep.bool()")
        keep = keep.bool()
    return keep.detach()


def check_fill(fill: str) -> None:
    """Refuse an unknown fill."""
    if fill not in FILLS:
        raise SkipError(f"expected fill to be one of {', '.join(FILLS)}; got {fill!r}")


def check_model(model: nn.Module, keep: Tensor | None, fill: str) -> None:
    """Refuse a model that cannot be masked."""
    if not isinstance(model, nn.Module):
        raise SkipError(f"expected a torch module; got {type(model).__name__}")
    if model.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        raise SkipError(
            "the model is in training mode and has batch norm, whose statistics the mask would enter: call model.eval()"
        )
    if fill in LAYERS and tokens_of(model) is None and not any(_convolves(m) for m in model.modules()):
        raise SkipError(
            f"{type(model).__name__} has no 2D convolution: layer masking is for convolutional networks and the vision "
            f"transformers of timm and torchvision"
        )
    parameter = next(model.parameters(), None)
    if keep is not None and parameter is not None and keep.device != parameter.device:
        raise SkipError(f"the mask is on {keep.device} and the model on {parameter.device}: move the mask")


def _convolves(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Conv2d) or (isinstance(weight, Tensor) and weight.ndim == 4)


class Masker:
    """Runs one model under masks; shared by the applied mask and by `masked_forward`."""

    def __init__(self, model: nn.Module, fill: str, crop: bool, scale: PixelScale | None = None) -> None:
        self.model, self.fill, self.crop = model, fill, crop
        self.scale = scale
        self.stats = MaskStats()
        self.largest = 0  # bytes of the largest activation of one row, once a pass was traced
        self._plan: tuple[tuple[object, ...], Tensor, Plan] | None = None
        self._known: frozenset[int] | None = None

    def __call__(self, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The model's answer to `images` `[N, 3, H, W]` under `keep` `[N or 1, 1, H, W]`."""
        stats = self.stats
        stats.calls += 1
        stats.rows += images.shape[0]
        stats.visible = float(keep.float().mean())
        stats.computed = 1.0
        if stats.visible == 1.0 or bool(keep.all()):
            stats.plain += 1
            return call(images, *args, **kwargs)
        if self.fill in BASELINES:
            self.scale = self.scale or pixel_scale(self.model)
            return call(painted(images, keep, self.fill, self.scale), *args, **kwargs)
        tokens = tokens_of(self.model)
        if tokens is not None:
            return run_tokens(tokens, call, keep, images, args, kwargs, self.fill)
        return self._layers(call, keep, images, args, kwargs)

    def _layers(self, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        traces = _TRACES.setdefault(self.model, {})
        key = (tuple(images.shape[-2:]), len(args), tuple(kwargs), self.model.training)
        trace = traces.get(key)
        if trace is not None and not trace.dynamic:
            plan = self._plan_for(trace, keep, images)
            run = MaskedRun(plan.masks[0], self.fill, plan, trace.widest)  # type: ignore[arg-type]
            try:
                output = self._watched(run, call, images, args, kwargs)
            except ChangedError:
                logger.info("%s did something else than before: tracing it again", type(self.model).__name__)
                traces.pop(key, None)
                self._plan = None
            else:
                self.stats.planned += 1
                self.stats.fill_rounds += run.rounds
                self.stats.computed = plan.share
                return output
        run = MaskedRun(keep, self.fill, None, self._widest(), self._parameters())
        output = self._watched(run, call, images, args, kwargs)
        self.stats.fill_rounds += run.rounds
        self.largest = max(self.largest, run.largest)
        if not any(op.rounds or op.name == "conv2d" for op in run.ops):
            raise SkipError(f"{type(self.model).__name__} ran no convolution on the images: nothing was masked")
        traces[key] = run.trace()
        return output

    def _watched(self, run: MaskedRun, call: Call, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        entered = run.enter(images)
        with run:
            output = call(entered, *args, **kwargs)
        return run.leave(output)

    def _plan_for(self, trace: Trace, keep: Tensor, images: Tensor) -> Plan:
        key = (id(trace), images.dtype, self.fill, self.crop)
        # by value: a mask that was changed in place is another one, and an equal one from elsewhere is the same
        if self._plan is not None and self._plan[0] == key and torch.equal(self._plan[1], keep):
            return self._plan[2]
        with torch.no_grad():
            mine = keep.clone()
            plan = make_plan(trace, mine, images.dtype, self.fill, self.crop)
        self._plan = (key, mine, plan)
        return plan

    def _widest(self) -> int:
        return max((max(p.shape[-2:]) for p in self.model.parameters() if p.ndim == 4), default=1)

    def _parameters(self) -> frozenset[int]:
        tensors = (*self.model.parameters(), *self.model.buffers())
        return frozenset(id(t) for t in tensors)


def expanded(keep: Tensor, images: Any) -> tuple[Tensor, Tensor]:
    """Masks and images with the same number of rows, or one mask for all.

    Raises:
        SkipError: if they do not belong together.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise SkipError(f"expected images [N, C, H, W] of floats; got {got}")
    if keep.shape[-2:] != images.shape[-2:]:
        raise SkipError(f"expected a mask of the images' size {tuple(images.shape[-2:])}; got {tuple(keep.shape[-2:])}")
    if keep.device != images.device:
        raise SkipError(f"the mask is on {keep.device} and the images on {images.device}: move the mask")
    if images.shape[0] == 1 and keep.shape[0] > 1:
        images = images.expand(keep.shape[0], -1, -1, -1)
    if keep.shape[0] not in (1, images.shape[0]):
        raise SkipError(f"expected one mask or one for each of {images.shape[0]} images; got {keep.shape[0]}")
    return keep, images


@dataclass(eq=False)
class AppliedMask:
    """A mask on a model. A context manager; `remove()` takes it off.

    Attributes:
        mask: the settings.
        model: the model.
        stats: the ledger.
    """

    mask: LayerMask
    model: nn.Module
    masker: Masker = field(init=False)
    gate: Gate | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        gate = gate_of(self.model)
        if any(isinstance(handler, AppliedMask) for handler in gate.handlers):
            raise SkipError("this model has a mask already: remove it first, or apply the product (keep1 & keep2)")
        self.masker = Masker(self.model, self.mask.fill, self.mask.crop)
        gate.install()
        gate.handlers += (self,)
        self.gate = gate

    @property
    def stats(self) -> MaskStats:
        """The ledger."""
        return self.masker.stats

    def __call__(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        name = None
        if not args:
            name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
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
        self.remove()

    def remove(self) -> None:
        """Take the mask off; the model is as it was."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.handlers = tuple(handler for handler in gate.handlers if handler is not self)
            gate.remove()


class MaskedForward:
    """`f(keep, images) -> logits`: the model as a function of the mask, the form that captum attributes.

    Attributes:
        stats: the ledger.
    """

    def __init__(
        self, model: nn.Module, fill: str = "neighbours", *, crop: bool = True, scale: PixelScale | None = None
    ) -> None:
        check_fill(fill)
        check_model(model, None, fill)
        self.model = model
        self.masker = Masker(model, fill, crop, scale)

    @property
    def stats(self) -> MaskStats:
        """The ledger."""
        return self.masker.stats

    def __call__(self, keep: Tensor, images: Tensor) -> Any:
        """The model's answer.

        Args:
            keep: `[N or 1, H, W]` or `[N or 1, 1, H, W]`, bool, or numbers that are all 0 or 1.
            images: `[N or 1, C, H, W]`; one image is taken for all masks.

        Raises:
            SkipError: for a soft mask, or one that does not belong to the images.
        """
        if any(isinstance(handler, AppliedMask) for handler in gate_of(self.model).handlers):
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
        >>> import torchvision
        >>> f = masked_forward(torchvision.models.resnet18(num_classes=3).eval())
        >>> nothing = torch.zeros(1, 1, 64, 64)
        >>> torch.equal(f(nothing, torch.randn(1, 3, 64, 64))[0], f.model.fc.bias)
        True
    """
    return MaskedForward(model, fill, crop=crop, scale=scale)


def mask_of(activation: Tensor) -> Tensor | None:
    """What is known of an activation, seen from a forward hook during a masked pass: bool `[N or 1, 1, h, w]`."""
    spot = spot_of(activation)
    if spot is None or spot.number is None:
        return None
    with torch._C.DisableTorchFunction():  # a hook runs inside the watched pass
        return spot.run.mask(spot.number).clone()


Forward = Callable[[Tensor, Tensor], Any]

__all__ = ["FILLS", "TAG", "AppliedMask", "LayerMask", "MaskStats", "MaskedForward", "mask_of", "masked_forward"]
