"""The split model: a CLIP frozen up to a block of each tower and trained from there on, beside the given one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.hosts.accelerate import execution_device
from skipguide.vision.skip_tuning.adapter import fingerprint
from skipguide.vision.skip_tuning.towers import check_no_dropout, find_towers


class SplitModel:
    """A copy of a CLIP whose last blocks are trained in fp32. The given model itself is never changed.

    Args:
        model: the pretrained model.
        skip_layers: how many blocks of each tower are frozen; None is half of them; a dict sets the towers apart.
        trainable: narrows what is trained by parameter name.
        device: where to work; None is the model's own device.

    Attributes:
        pretrained: the given model.
        model: the copy; it shares the frozen tensors unless it works on another device.
        towers: of the copy.
        image_layer: the first trained block of the image tower.
        text_layer: the first trained block of the text tower.
        names: of the trained parameters.
        device: where the work happens.

    Raises:
        SkipError: for layers out of range, a model with dropout, nothing to train.
        UnknownBlockError: for another kind of model.
    """

    def __init__(
        self,
        model: nn.Module,
        skip_layers: int | Mapping[str, int] | None = None,
        trainable: Callable[[str], bool] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        given = find_towers(model)
        check_no_dropout(model)
        self.image_layer, self.text_layer = _layers(skip_layers, len(given.image.blocks), len(given.text.blocks))
        self.pretrained = model
        at = execution_device(model)
        self.device = at if device is None else torch.device(device)
        self.names = [n for n in given.trained(self.image_layer, self.text_layer) if trainable is None or trainable(n)]
        if not self.names:
            raise SkipError("expected parameters to train; `trainable` refused all of them")
        # Frozen tensors are shared with the given model unless the work happens on another device.
        suffix = set(given.trained(self.image_layer, self.text_layer))
        self.offload = self.device != at
        frozen = set() if self.offload else {n for n, _ in model.named_parameters()} - suffix
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.data, requires_grad=False) for n, p in model.named_parameters() if n in frozen
        }
        self.model = copy.deepcopy(model, shared)
        self.model.requires_grad_(False)
        self.model.eval()
        parameters = dict(self.model.named_parameters())
        for name in suffix:  # fp32 master weights, and beside them what `trainable` leaves out
            parameters[name].data = parameters[name].data.to(self.device, torch.float32)
            parameters[name].requires_grad_(name in self.names)
        self._frozen = [] if not self.offload else [p for n, p in parameters.items() if n not in suffix]
        self.towers = find_towers(self.model)
        self._tuned: dict[str, Tensor] | None = None
        self._fingerprint: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        wanted = set(self.names)
        return {name: p for name, p in self.model.named_parameters() if name in wanted}

    @property
    def fingerprint(self) -> str:
        """Identifies the pretrained model."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.pretrained)
        return self._fingerprint

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained parameters by name."""
        for name, parameter in self.parameters().items():
            parameter.data.copy_(tensors[name])

    def forget_answers(self) -> None:
        """Forget what was computed with the present weights, because they are going to be trained."""
        self._tuned = None

    def prefix_to(self, device: torch.device) -> None:
        """Bring the frozen tensors to a device, if they are its own and not shared."""
        for parameter in self._frozen:
            parameter.data = parameter.data.to(device)
        if self._frozen:
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))

    def cast(self, pixels: Tensor) -> Tensor:
        """Pixels in the dtype of the first layer."""
        return pixels.to(next(self.pretrained.parameters()).dtype)

    def interpolate(self, alpha: float) -> Self:
        """Move the weights between the pretrained (0) and the tuned ones (1), as WiSE-FT does.

        Calls do not add up: `interpolate(1)` brings the tuned weights back. What is saved is what is set here.
        """
        if not 0 <= alpha <= 1:
            raise SkipError(f"expected alpha from 0 (pretrained) to 1 (tuned); got {alpha}")
        if self._tuned is None:
            self._tuned = {name: p.detach().clone() for name, p in self.parameters().items()}
        start = dict(self.pretrained.named_parameters())
        self.load_parameters(
            {
                name: torch.lerp(start[name].detach().float().to(t.device), t, alpha) if alpha < 1 else t
                for name, t in self._tuned.items()
            }
        )
        return self

    def changed_tensors(self) -> dict[str, Tensor]:
        """The trained parameters that differ from the pretrained model's."""
        start = dict(self.pretrained.named_parameters())
        return {
            name: p.detach()
            for name, p in self.parameters().items()
            if not torch.equal(p.detach().cpu(), start[name].detach().float().cpu())
        }

    def merge(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A stock model with the tuned weights, of the pretrained model's class and device.

        Tuning changes weights by less than half precision holds: a merged model in float16 or bfloat16 keeps few of
        the changes, and a warning says how many are lost.

        Args:
            dtype: of the whole merged model; None is the pretrained model's.
        """
        if any("lora_" in name for name in self.names):
            raise SkipError("expected tuned layers; these are peft's: merge them with peft's merge_and_unload")
        merged = copy.deepcopy(self.pretrained)
        if dtype is not None:
            merged = merged.to(dtype)
        tuned, start = self.parameters(), dict(self.pretrained.named_parameters())
        changed = lost = 0
        for name, parameter in merged.named_parameters():
            if name in tuned:
                parameter.data.copy_(tuned[name].detach())
                before = start[name].detach().float().cpu()
                moved = tuned[name].detach().cpu() != before
                changed += int(moved.sum())
                lost += int((moved & (parameter.detach().float().cpu() == before)).sum())
        if lost > 0.01 * changed:
            kind = next(merged.parameters()).dtype
            warnings.warn(
                f"of the weights that tuning changed, {100 * lost / changed:.0f} % are lost by rounding to {kind}: "
                "pass merge(dtype=torch.float32), or keep the adapter",
                RuntimeWarning,
                stacklevel=2,
            )
        return merged


def _layers(given: int | Mapping[str, int] | None, image: int, text: int) -> tuple[int, int]:
    if given is None:
        return image // 2, text // 2
    wanted: tuple[Any, Any]
    if isinstance(given, Mapping):
        if set(given) != {"image", "text"}:
            raise SkipError(f'expected skip_layers with "image" and "text"; got {sorted(given)}')
        wanted = given["image"], given["text"]
    else:
        wanted = given, given
    layer: Any  # what a user or a JSON file gives
    for tower, layer, blocks in (("image", wanted[0], image), ("text", wanted[1], text)):
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < blocks:
            raise SkipError(
                f"expected skip_layers from 0 to {blocks - 1}, because the {tower} tower has {blocks} blocks and one "
                f"has to be trained; got {layer!r}"
            )
    return wanted
