"""UNet++: nested skip connections with deep supervision, and pruning as a choice of head.

After Zhou et al., "UNet++: A Nested U-Net Architecture for Medical Image Segmentation" (arXiv 1807.10165, section 3;
1912.05074). Head L needs the nodes with i + j <= L: to ask for it is to skip the others, the deep encoder included. The
authors have applied for a patent on the architecture in the United States.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.config import as_flag, as_number, as_whole, whole
from skipguide.errors import SkipError
from skipguide.vision.pretrained import PretrainedMixin
from skipguide.vision.recording import is_exported, is_traced
from skipguide.vision.state_dicts import read_state_dict
from skipguide.vision.unet_grid import Node, NodeValues, UNetGrid, check_images
from skipguide.vision.weights import check_weights

# keys of the plain PyTorch UNet++: conv{level}_{column}, and final without deep supervision
_NODE = re.compile(r"conv(\d+)_(\d+)\.(.+)")
_HEAD = re.compile(r"final(\d*)\.(.+)")
_FIRST = re.compile(r"conv\d+_0\.conv1\.weight")

Head = int | Literal["mean", "adaptive"] | None


@dataclass(frozen=True)
class GridRun:
    """One forward pass, and what of the grid it ran.

    Attributes:
        logits: `[N, classes, H, W]` of the head that was asked for.
        heads: logits of every head that was computed for the whole batch, by level.
        levels: `[N]`, the deepest head that each image ran.
        rows_run: images per node; nodes that did not run are not in it.
    """

    logits: Tensor
    heads: dict[int, Tensor]
    levels: Tensor
    rows_run: dict[Node, int]


class UNetPlusPlus(UNetGrid, PretrainedMixin, library_name="skipguide", license="apache-2.0"):
    """A UNet++ whose nodes run on demand (arXiv 1807.10165, section 3.1 to 3.3).

    Args:
        encoder: None for the paper's plain network, or a timm backbone with features at several strides. Its finest
            features are at stride 2 or 4, and so is the grid then: see `full_resolution`.
        classes: output channels; independent masks, one sigmoid each.
        deep_supervision: one head per column; False keeps the last head alone (no pruning, no averaging).
        in_channels: channels of the images.
        widths: channels per level, finest first; the paper's 32 to 512 by default, for a timm backbone 16 times the
            stride and at most 256.
        depth: deepest level, hence the last head; all levels by default.
        nested: False builds the plain U-Net out of the same blocks, as a baseline.
        full_resolution: with a timm backbone, add a level at the size of the image, as the paper's grid has. Without it
            the masks are drawn at stride 2 or 4 and enlarged: cheaper, and 5 points of IoU worse on nuclei a few pixels
            wide. Pass True where what you look for is small.
        pretrained: load timm's weights for the backbone.
        encoder_args: further arguments of `timm.create_model`.

    Raises:
        SkipError: for a backbone whose features all have one stride, or settings that contradict each other.

    Example:
        >>> import torch
        >>> from skipguide.vision import UNetPlusPlus
        >>> model = UNetPlusPlus(classes=2, widths=(4, 8, 16)).eval()
        >>> images = torch.rand(1, 3, 33, 50)
        >>> [tuple(head.shape) for head in model(images)]
        [(1, 2, 33, 50), (1, 2, 33, 50)]
        >>> torch.equal(model(images, head=1), model(images)[0])
        True
        >>> sorted(model.run(images, head=1).rows_run)
        [(0, 0), (0, 1), (1, 0)]
    """

    def __init__(
        self,
        encoder: str | None = None,
        classes: int = 1,
        deep_supervision: bool = True,
        *,
        in_channels: int = 3,
        widths: Sequence[int] | None = None,
        depth: int | None = None,
        nested: bool = True,
        full_resolution: bool = False,
        pretrained: bool = False,
        encoder_args: dict[str, Any] | None = None,
    ) -> None:
        classes, nested = as_whole("classes", classes), as_flag("nested", nested)
        deep_supervision = as_flag("deep_supervision", deep_supervision)
        if deep_supervision and not nested:
            raise SkipError("a plain U-Net has one head: pass deep_supervision=False with nested=False")
        super().__init__(
            encoder,
            in_channels,
            widths,
            depth,
            nested=nested,
            full_resolution=full_resolution,
            pretrained=pretrained,
            encoder_args=encoder_args,
        )
        self.classes, self.deep_supervision = classes, deep_supervision
        self._settings = {
            "encoder": encoder,
            "classes": classes,
            "in_channels": self.in_channels,
            "widths": list(self.widths),
            "nested": nested,
            "full_resolution": full_resolution,
            "encoder_args": encoder_args,
        }
        levels = range(1, self.depth + 1) if deep_supervision else [self.depth]
        self.head = nn.ModuleDict({str(level): nn.Conv2d(self.widths[0], classes, 1) for level in levels})

    @property
    def levels(self) -> list[int]:
        """The heads that can be asked for."""
        return [int(level) for level in self.head]

    def forward(self, images: Tensor, head: Head = None, tolerance: float = 0.05) -> Tensor | list[Tensor]:
        """Segment images.

        Args:
            images: finite floats `[N, in_channels, H, W]`, any H and W.
            head: None for every head; L for head L, running the nodes with i + j <= L and no others; "mean" for the
                average of the heads' probabilities; "adaptive" to go deeper, image by image, only while the masks of
                two heads differ.
            tolerance: for "adaptive", the share of the union of two masks in which they may differ.

        Returns:
            Logits `[N, classes, H, W]`. With `head=None` and deep supervision a list of them, shallowest head first:
            what `deep_supervision_loss` takes. Sigmoid turns all of them into probabilities, those of "mean" too.

        Raises:
            SkipError: for other shapes, NaN, or a head that the model does not have.
        """
        if head is None and self.deep_supervision:
            return list(self.run(images).heads.values())
        return self.run(images, head, tolerance).logits

    def run(self, images: Tensor, head: Head = None, tolerance: float = 0.05) -> GridRun:
        """As `forward`, and tell what ran; `logits` is the deepest head where `forward` returns them all."""
        check_images(images, self.in_channels)
        values = NodeValues(self, images)
        named = head if isinstance(head, str) else ""
        if named == "adaptive":
            return self._adaptive(values, len(images), as_number("tolerance", tolerance))
        if head is None:
            wanted = self.levels
        elif named == "mean":
            wanted = self._all_heads("mean")
        else:
            wanted = [self._check_head(head)]
        values.reach(wanted[-1])
        heads = {level: self._head(values, level) for level in wanted}
        logits = mean_of_probabilities(list(heads.values())) if named == "mean" else heads[wanted[-1]]
        levels = torch.full((images.shape[0],), wanted[-1], device=images.device)
        return GridRun(logits, heads, levels, values.rows_run)

    def pruned(self, level: int) -> Self:
        """A smaller model that is head `level` alone: its weights are copies, what it does not need is gone.

        Its logits are those of `forward(images, head=level)`, bit by bit.

        Args:
            level: 1 to `depth`, the paper's L.

        Raises:
            SkipError: if there is no such head; without deep supervision there is the last one only.
        """
        level = self._check_head(level)
        settings: dict[str, Any] = self._settings | {"depth": level, "deep_supervision": False}
        reference = next(self.parameters())
        smaller = type(self)(**settings).to(reference.device, reference.dtype)
        state = self.state_dict()
        smaller.load_state_dict({key: state[key] for key in smaller.state_dict()})
        for name, parameter in smaller.named_parameters():
            parameter.requires_grad_(self.get_parameter(name).requires_grad)
        return smaller.train(self.training)

    @classmethod
    def from_reference_checkpoint(cls, state: Any) -> Self:
        """Read the weights of the widespread plain PyTorch UNet++ (keys `conv0_0.conv1.weight`, `final1.weight`).

        Args:
            state: its state dict, a checkpoint with one under "state_dict" or "model", or the path of a file with
                either; widths, classes and deep supervision are read off the shapes.

        Raises:
            SkipError: if it is none, or keys are missing, unknown or of other shapes.
        """
        tensors = read_state_dict(state)
        depth = sum(bool(_FIRST.fullmatch(name)) for name in tensors) - 1
        renamed, unknown = {}, []
        for name, tensor in tensors.items():
            if found := _NODE.fullmatch(name):
                renamed["node.{}.{}.{}".format(*found.groups())] = tensor
            elif found := _HEAD.fullmatch(name):
                renamed[f"head.{found[1] or depth}.{found[2]}"] = tensor
            else:
                unknown.append(name)
        if depth < 1 or not any(key.startswith("head.") for key in renamed):
            raise SkipError(f"expected keys like conv0_0.conv1.weight and final.weight; got {sorted(tensors)[:4]}")
        try:
            model = cls(
                classes=len(renamed[f"head.{depth}.bias"]),
                deep_supervision="head.1.weight" in renamed,
                in_channels=renamed["node.0.0.conv1.weight"].shape[1],
                widths=[len(renamed[f"node.{i}.0.conv1.bias"]) for i in range(depth + 1)],
            )
        except KeyError as error:
            raise SkipError(f"the checkpoint of depth {depth} lacks {error}") from error
        except (IndexError, TypeError) as error:  # a single number in place of a tensor with sides
            raise SkipError(f"the checkpoint's shapes do not fit together: {error}") from error
        own = model.state_dict()
        shared = {name: tensor for name, tensor in renamed.items() if name in own}
        check_weights(shared, own, "the checkpoint", "its shapes do not fit together")
        loaded = model.load_state_dict(renamed, strict=False)
        if unknown := [*unknown, *loaded.unexpected_keys]:
            raise SkipError(f"the checkpoint has {unknown[:4]} too ({len(unknown)} keys in all), which no UNet++ has")
        missing = [k for k in loaded.missing_keys if "num_batches" not in k]
        if missing:
            raise SkipError(f"the checkpoint lacks {missing[:4]} ({len(missing)} keys in all)")
        return model.eval()

    def _head(self, values: NodeValues, level: int) -> Tensor:
        node = (0, level)
        return values.finish(self.head[str(level)](values(*node)))

    def _all_heads(self, what: str) -> list[int]:
        if self.nested and len(self.levels) == self.depth:
            return self.levels
        raise SkipError(f"head={what!r} needs every head; this model has {self.levels}: use deep_supervision=True")

    def _check_head(self, head: Any) -> int:
        level = whole(head)
        if level is None or str(level) not in self.head:
            hint = "" if self.deep_supervision else "; the others need deep_supervision=True"
            raise SkipError(f"expected a head out of {self.levels}, 'mean' or 'adaptive'; got {head!r}{hint}")
        return level

    def _adaptive(self, values: NodeValues, count: int, tolerance: float) -> GridRun:
        self._all_heads("adaptive")
        if is_traced() or is_exported():
            raise SkipError(
                "head='adaptive' decides image by image how deep to go, which a trace or export would fix to what its "
                f"example needed: pass head={self.depth} or head='mean'"
            )
        if self.training:
            raise SkipError("head='adaptive' takes images apart and would change batch norm: call model.eval() first")
        if not 0 <= tolerance <= 1:
            raise SkipError(f"expected a tolerance in 0..1; got {tolerance}")
        device = values.images.device
        going = torch.arange(count, device=device)
        levels = torch.ones(count, dtype=torch.long, device=device)
        logits = before = self._head_first(values)
        heads = {1: before}
        for level in range(2, self.depth + 1):
            # Two heads are needed to compare, so the encoder goes to level 2 at first and then to the bottom.
            values.reach(level if level == 2 else self.depth)
            now = self._head(values, level)
            if len(going) == count:
                heads[level] = now
            logits = logits.index_copy(0, going, now)
            levels[going] = level
            differ = mask_disagreement(before, now) > tolerance
            if level == self.depth or not bool(differ.any()):
                break
            values.keep(differ)
            going, before = going[differ], now[differ]
        return GridRun(logits, heads, levels, values.rows_run)

    def _head_first(self, values: NodeValues) -> Tensor:
        values.reach(min(2, self.depth))
        return self._head(values, 1)


def mean_of_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Logits of the average of the heads' sigmoids (the paper's accurate mode); exact where a sigmoid is 0 or 1.

    >>> mean_of_probabilities([torch.tensor(0.0), torch.tensor(0.0)]).item()
    0.0
    """
    stacked = torch.stack(list(logits))
    return torch.logsumexp(F.logsigmoid(stacked), 0) - torch.logsumexp(F.logsigmoid(-stacked), 0)


def mask_disagreement(first: Tensor, second: Tensor) -> Tensor:
    """`[N]`: the share of the union of two masks (logits above 0) that lies in one of them only; 0 if both are empty.

    >>> mask_disagreement(torch.tensor([[1.0, 1.0, -1.0]]), torch.tensor([[1.0, -1.0, -1.0]])).item()
    0.5
    """
    a, b = first.flatten(1) > 0, second.flatten(1) > 0
    union = (a | b).sum(1)
    return (a ^ b).sum(1) / union.clamp(min=1)
