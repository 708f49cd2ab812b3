"""Classifiers by name: the model, its preprocessing and the names of its classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.files import read_settings
from skipguide.shown import Shown
from skipguide.vision.layer_masking.baselines import IMAGENET, PixelScale
from skipguide.vision.state_dicts import read_state_dict
from skipguide.vision.weights import check_file

if TYPE_CHECKING:
    from PIL.Image import Image

BUNDLED = "tiny-cnn"


@dataclass(frozen=True, repr=False)
class Classifier(Shown):
    """A model with its preprocessing.

    Attributes:
        name: as given to `load_classifier`.
        model: in eval mode.
        prepare: from a picture to `[3, H, W]`, normalised.
        scale: mean and standard deviation of that normalisation.
        labels: the classes' names, or nothing.
    """

    name: str
    model: nn.Module
    prepare: Callable[[Image], Tensor]
    scale: PixelScale
    labels: tuple[str, ...] = ()

    def _heading(self) -> str:
        more = ", ..." if len(self.labels) > 8 else ""
        named = f", {len(self.labels)} classes: {', '.join(self.labels[:8])}{more}" if self.labels else ""
        return f"Classifier {self.name} ({type(self.model).__name__}){named}"

    def label(self, number: int) -> str:
        """What a class is called."""
        return self.labels[number] if number < len(self.labels) else f"class {number}"

    def seen(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """What of a picture the model sees, as left, top, right, bottom in pixels, to 1/255 of its sides.

        The preparation may be anybody's, so it is asked: a picture of its own coordinates is prepared.

        Args:
            size: width and height of the picture.
        """
        import torch
        from PIL import Image

        columns, rows = (torch.linspace(0, 255, side).round().byte() for side in size)
        pixels = torch.stack([columns.expand(size[1], -1), rows[:, None].expand(-1, size[0])], 2)
        x = self.prepare(Image.fromarray(torch.cat([pixels, pixels[..., :1]], 2).contiguous().numpy()))
        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in self.scale)
        found = (x * std + mean).clamp(0, 1)
        rounding = 1 / min(x.shape[-2:]) + 1 / 255  # where nothing was cut, a resized picture ends so near its edge

        def edges(channel: Tensor, side: int) -> tuple[int, int]:
            low, high = float(channel.min()), float(channel.max())
            return 0 if low < rounding else round(low * side), side if high > 1 - rounding else round(high * side)

        (left, right), (top, bottom) = edges(found[0], size[0]), edges(found[1], size[1])
        return left, top, right, bottom

    def picture(self, x: Tensor) -> Image:
        """What the model sees, as a picture."""
        from PIL import Image

        mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in self.scale)
        colours = ((x.detach() * std + mean).clamp(0, 1) * 255).round().byte().cpu()
        return Image.fromarray(colours.permute(1, 2, 0).numpy())


def load_classifier(
    name: str = BUNDLED, *, pretrained: bool = True, checkpoint: str | Path | None = None
) -> Classifier:
    """A classifier by name.

    Args:
        name: `"tiny-cnn"`, which ships; a folder that timm wrote; a name of timm (first) or torchvision.
        pretrained: False gives random weights.
        checkpoint: a file with weights of your own for that model: a state dict of torch or safetensors, or a
            checkpoint with one under "state_dict" or "model". The number of classes is read off it; other numbers than
            the model's own have no names.

    Raises:
        SkipError: for a name that neither knows, weights that cannot be had, or a checkpoint of another model.

    Example:
        >>> load_classifier("tiny-cnn").labels[:3]
        ('disc', 'ring', 'square')
    """
    import timm
    from torchvision import models

    from skipguide.assets import bundled

    folder = bundled(BUNDLED) if name == BUNDLED else Path(name)
    saved = (folder / "config.json").is_file()
    if checkpoint is not None:
        source = f"local-dir:{folder}" if saved else name if timm.is_model(name) else None
        return _with_weights(name, source, checkpoint)
    if saved:
        return _from_timm(name, _from_folder(name, folder, pretrained).eval())
    try:
        if timm.is_model(name):
            return _from_timm(name, timm.create_model(name, pretrained=pretrained).eval())
        if name in models.list_models():
            weights = models.get_model_weights(name).DEFAULT if pretrained else None
            return _from_torchvision(name, models.get_model(name, weights=weights).eval(), weights)
    except (OSError, RuntimeError) as error:
        raise SkipError(f"cannot load {name}: {error}") from error
    raise SkipError(
        f"no model {name!r}: expected {BUNDLED}, a folder with timm's config.json, or a name of timm or torchvision "
        f"(timm.list_models(), torchvision.models.list_models())"
    )


def _from_folder(name: str, folder: Path, pretrained: bool) -> nn.Module:
    """The model of a folder that timm wrote; what its file of weights has is compared with the model."""
    import timm
    from safetensors import SafetensorError

    read_settings(folder / "config.json")  # for its error: timm reads them again
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=pretrained)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise SkipError(f"cannot load {name}: {error}") from error
    if pretrained and (file := folder / "model.safetensors").is_file():
        check_file(file, model.state_dict(), f"save {name} anew, or take another folder")
    return model


def _with_weights(name: str, source: str | None, checkpoint: str | Path) -> Classifier:
    """The named model with the weights and the number of classes of a checkpoint."""
    import timm
    from torchvision import models

    state = read_state_dict(checkpoint)
    if source is None and name not in models.list_models():
        raise SkipError(f"no model {name!r} for the weights in {checkpoint}: expected a name of timm or torchvision")

    def build(classes: int | None) -> nn.Module:
        more = {} if classes is None else {"num_classes": classes}
        if source is None:
            return models.get_model(name, **more)
        return timm.create_model(source, pretrained=False, **more)

    model = build(None)
    heads = [(key, module) for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    key, head = heads[-1]
    own, found = len(head.weight), state.get(f"{key}.weight")
    if found is not None and len(found) != own:
        model = build(len(found))
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SkipError(f"{checkpoint} does not hold the weights of {name}: {reason[:300]}") from error
    same = found is not None and len(found) == own
    if source is not None:
        made = _from_timm(name, model.eval())
    else:
        weights = models.get_model_weights(name).DEFAULT
        made = _from_torchvision(name, model.eval(), weights)
    return made if same else replace(made, labels=())


def _from_timm(name: str, model: nn.Module) -> Classifier:
    from timm.data import create_transform, resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    labels = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or _imagenet_names(model)
    return Classifier(
        name, model, create_transform(**config, is_training=False), (config["mean"], config["std"]), tuple(labels)
    )


def _from_torchvision(name: str, model: nn.Module, weights: Any) -> Classifier:
    from torchvision.transforms import v2

    if weights is not None:
        preset = weights.transforms()
        return Classifier(
            name, model, preset, (tuple(preset.mean), tuple(preset.std)), tuple(weights.meta.get("categories", ()))
        )
    import torch

    steps = [v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return Classifier(name, model, v2.Compose([*steps, v2.Normalize(*IMAGENET)]), IMAGENET)


def _imagenet_names(model: nn.Module) -> tuple[str, ...]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(number) for number in range(info.num_classes()))
