"""SkipNet: a residual network whose gates decide, per image, which blocks run (arXiv 1711.09485)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from skipguide.blocks import find_blocks
from skipguide.config import as_list
from skipguide.errors import SkipError
from skipguide.router import Router
from skipguide.vision.pretrained import PretrainedMixin
from skipguide.vision.skipnet.backbones import CifarResNet, build_backbone, measure_blocks, unweighted
from skipguide.vision.skipnet.gates import build_gates
from skipguide.vision.skipnet.routing import Costs, Decisions, Routing
from skipguide.vision.weights import check_weights


class SkipNet(nn.Module, PretrainedMixin):
    """A residual network with a gate before every block but the first.

    In eval mode a block runs for the images whose gate keeps it, and for no others; with all gates open the output is
    bit-equal to the network's own. In training every block is computed, and the decision's gradient passes straight
    through its threshold.

    Args:
        backbone: a name (`build_backbone` lists them), the arguments of a `CifarResNet` as a mapping, or any module
            whose blocks are known (`find_blocks`) and have one stream; it is used as it is, not copied.
        gate: `"rnn"`, the shared LSTM; `"ff1"` or `"ff2"`, a small network per block (section 3.3).
        num_classes: of a named backbone.
        pretrained: weights of a named backbone, see `build_backbone`.
        image_size: `(channels, height, width)` of the images that the costs are counted for; by default 32 pixels for
            the CIFAR networks and 224 for others.
        embed: embedding of the recurrent gate.
        hidden: state of the recurrent gate.

    Raises:
        SkipError: for an unknown network or gate, or a network with fewer than two residual blocks.

    Example:
        >>> import torch
        >>> from skipguide.vision import SkipNet
        >>> net = SkipNet({"blocks": [2, 2], "widths": [8, 16], "num_classes": 4}, gate="ff2").eval()
        >>> logits, gates = net(torch.randn(5, 3, 32, 32), return_gates=True)
        >>> logits.shape, gates.shape
        (torch.Size([5, 4]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        backbone: str | Mapping[str, Any] | nn.Module,
        gate: str = "rnn",
        num_classes: int = 10,
        pretrained: bool | str | None = None,
        image_size: Sequence[int] | None = None,
        embed: int = 10,
        hidden: int = 10,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            backbone = build_backbone(backbone, num_classes, pretrained)
        elif pretrained:
            raise SkipError("pretrained weights go with a network's name; a module comes with the weights it has")
        elif isinstance(backbone, Mapping):
            try:
                backbone = CifarResNet(**backbone)
            except TypeError as error:
                raise SkipError(
                    f"expected the arguments of a CifarResNet as backbone; got {backbone}: {error}"
                ) from error
        if not isinstance(backbone, nn.Module):
            raise SkipError(f"expected a network's name, arguments or module; got {type(backbone).__name__}")
        blocks = tuple(find_blocks(backbone))
        if len(blocks) < 2:
            raise SkipError(f"expected a network with at least two residual blocks; {type(backbone).__name__} has one")
        if image_size is None:
            image_size = _image_size(backbone)
        self.image_size = _checked_size(image_size)
        self.backbone = backbone
        self.gate = gate
        self._blocks = blocks
        self._router = Router(backbone, blocks[1:])
        sites, whole = measure_blocks(backbone, self.image_size, [(block.module, block.shortcut) for block in blocks])
        self._costs: dict[tuple[int, ...], Costs] = {}
        channels = [shape[1] if len(shape) == 4 else shape[-1] for shape, _, _ in sites[1:]]
        like = next(backbone.parameters())
        self.gates = build_gates(gate, channels, embed, hidden).to(device=like.device, dtype=like.dtype)
        self._costs[self.image_size] = self._count(sites, whole)  # refuses gates that the shapes do not fit

    @overload
    def forward(self, images: Tensor, return_gates: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_gates: Literal[True]) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        images: Tensor,
        *,
        return_routing: Literal[True],
        mode: str | None = None,
        decisions: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing: ...

    def forward(
        self,
        images: Tensor,
        return_gates: bool = False,
        *,
        return_routing: bool = False,
        mode: str | None = None,
        decisions: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Classify images.

        Args:
            images: `[B, C, H, W]`, floating point.
            return_gates: give `(logits, gates)`, with gates `[B, G]`: 1 runs, 0 skips.
            return_routing: give the whole `Routing` instead.
            mode: `"hard"` (eval's default: p > 0.5, skipped rows do not run), `"straight_through"` (in training),
                `"sample"` (Bernoulli, skipped rows do not run), `"soft"` (the probability itself) or `"open"`.
            decisions: bool `[B, G]` or `[G]`: run exactly these blocks, whatever the gates say.
            generator: of the samples.

        Raises:
            SkipError: for images, decisions or a mode that do not fit, or gates that are not finite.
        """
        self._check(images)
        asked = Decisions(
            self.gates,
            mode or ("straight_through" if self.training else "hard"),
            None if decisions is None else self._forced(decisions, images),
            generator,
        )
        # A replica of nn.DataParallel has modules of its own, which the original's gates do not stand on.
        replica = bool(getattr(self, "_is_replica", False))
        router = Router(self.backbone, tuple(find_blocks(self.backbone))[1:]) if replica else self._router
        with router.running(asked) as stats:
            logits = self.backbone(images)
        masks, gate_logits = asked.collect()
        if return_routing:
            return Routing(
                logits, masks, gate_logits.sigmoid(), gate_logits, stats, self.costs(tuple(images.shape[1:]))
            )
        return (logits, masks) if return_gates else logits

    def costs(self, image_size: Sequence[int] | None = None) -> Costs:
        """MACs of one image of a size, measured on the meta device and remembered."""
        size = self.image_size if image_size is None else _checked_size(image_size)
        if size not in self._costs:
            pairs = [(block.module, block.shortcut) for block in self._blocks]
            self._costs[size] = self._count(*measure_blocks(self.backbone, size, pairs))
        return self._costs[size]

    def _count(self, sites: list[tuple[tuple[int, ...], int, int]], whole: int) -> Costs:
        blocks = tuple(macs for _, macs, _ in sites)
        gates = tuple(_gate_macs(self.gates, place, shape) for place, (shape, _, _) in enumerate(sites[1:]))
        return Costs(blocks, tuple(macs for _, _, macs in sites), (0, *gates), whole - sum(blocks))

    @property
    def block_names(self) -> list[str]:
        """The residual blocks in execution order; gate g decides block g + 1."""
        return [block.name for block in self._blocks]

    @classmethod
    def from_reference_checkpoint(cls, state: Any, gate: str | None = None) -> SkipNet:
        """Read a published checkpoint of ucbdrive/skipnet, CIFAR or ImageNet.

        Args:
            state: the state dict, a checkpoint with one under "state_dict", or the path of a file with either. Keys
                are those of the gated networks (`group1_layer0.conv1.weight`) or of the plain ones they start from
                (`layer1.0.conv1.weight`), with or without `module.` before them.
            gate: of plain networks, whose gates start fresh; "rnn" by default.

        Raises:
            SkipError: for what cannot be read, naming the keys or shapes.
        """
        from skipguide.vision.skipnet.checkpoint import read_checkpoint

        config, weights = read_checkpoint(state, gate)
        net = cls(**config)
        own = net.state_dict()
        shared = {name: tensor for name, tensor in weights.items() if name in own}
        check_weights(shared, own, "the checkpoint", "its shapes do not fit the network that its keys describe")
        missing, unexpected = net.load_state_dict(weights, strict=False)
        fresh = [key for key in missing if key.startswith("gates.")] if not any("gates." in k for k in weights) else []
        if unexpected or set(missing) - set(fresh):
            raise SkipError(
                f"the checkpoint is not complete: missing {sorted(set(missing) - set(fresh))[:5]}, unexpected "
                f"{sorted(unexpected)[:5]}"
            )
        return net.eval()

    @classmethod
    def _from_pretrained(cls, **settings: Any) -> Self:
        backbone = settings.get("backbone")
        if backbone is None:
            raise SkipError(
                "these are weights of a network that was given as a module, which a config does not describe: pass a "
                "fresh one, SkipNet.from_pretrained(path, backbone=module)"
            )
        if isinstance(backbone, str):
            settings["backbone"] = unweighted(backbone, settings.get("pretrained"))
        return super()._from_pretrained(**settings)

    def _check(self, images: Any) -> None:
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or 0 in images.shape:
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise SkipError(f"expected images [B, C, H, W] of floats; got {got}")
        if images.shape[1] != self.image_size[0]:
            raise SkipError(f"expected images with {self.image_size[0]} channels; got {images.shape[1]}")

    def _forced(self, decisions: Any, images: Tensor) -> Tensor:
        wanted = (len(images), len(self.gates))
        if not isinstance(decisions, Tensor) or decisions.dtype is not torch.bool:
            raise SkipError(f"expected decisions as a bool tensor {list(wanted)}; got {kind_of(decisions)}")
        if decisions.shape not in (wanted, wanted[1:]):
            raise SkipError(f"expected decisions of shape {list(wanted)} or [{wanted[1]}]; got {list(decisions.shape)}")
        return decisions.to(images.device).expand(wanted)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without what belongs to this instance's modules."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_router", "_blocks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the blocks again, on the modules of this copy."""
        super().__setstate__(state)
        self._blocks = tuple(find_blocks(self.backbone))
        self._router = Router(self.backbone, self._blocks[1:])


def skipnet(
    name: str,
    gate: str = "rnn",
    num_classes: int = 10,
    pretrained: bool | str | None = None,
) -> SkipNet:
    """A SkipNet by name.

    Args:
        name: `"resnet38"`, `"resnet74"`, `"resnet110"`, `"resnet152"` for CIFAR, `"resnet18"`, `"resnet34"`,
            `"resnet50"`, `"resnet101"`, `"resnet152"` for ImageNet, `"torchvision/NAME"` or `"timm/NAME"`; see
            `build_backbone`.
        gate: `"rnn"`, `"ff1"` or `"ff2"`.
        num_classes: outputs.
        pretrained: `"torchvision"` or `"timm"` downloads ImageNet weights for the backbone; the gates are fresh.

    Raises:
        SkipError: for unknown names.

    Example:
        >>> logits, gates = skipnet("resnet38", gate="rnn").eval()(torch.randn(1, 3, 32, 32), return_gates=True)
        >>> logits.shape, gates.shape
        (torch.Size([1, 10]), torch.Size([1, 17]))
    """
    if not isinstance(name, str):
        raise SkipError(f"expected the name of a network; got {type(name).__name__}: SkipNet(module) gates a module")
    return SkipNet(name, gate, num_classes, pretrained)


def _image_size(backbone: nn.Module) -> tuple[int, int, int]:
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    side = 32 if isinstance(backbone, CifarResNet) else 224
    return channels, side, side


def _checked_size(size: Sequence[int]) -> tuple[int, ...]:
    found = tuple(as_list("image_size", size))
    if len(found) != 3:
        raise SkipError(f"expected an image size (channels, height, width); got {size!r}")
    return found


def kind_of(value: Any) -> str:
    """What was given, for a message: dtype and shape, or the type of what is no tensor."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _gate_macs(gates: nn.Module, place: int, shape: tuple[int, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    state = {name: t.to("meta") for name, t in [*gates.named_parameters(), *gates.named_buffers()]}
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    training = gates.training
    gates.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(gates, state, (place, torch.empty(shape, device="meta", dtype=dtype)))
    finally:
        gates.train(training)
    return counter.get_total_flops() // 2
