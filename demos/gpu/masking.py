"""Layer masking on ResNet-50: what a hidden region costs, next to the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from demos.gpu.race import Variant, race
from demos.gpu.setting import Setting
from skipguide.vision import LayerMask

BAR = 1.15  # patches, of the plain model's time


def patches(batch: int, size: int, count: int) -> Tensor:
    """Half of `count` x `count` patches hidden, another half for every image."""
    shown = torch.rand(batch, 1, count, count, generator=torch.Generator().manual_seed(count)) > 0.5
    side = size // count
    return shown.repeat_interleave(side, 2).repeat_interleave(side, 3)


def box(size: int) -> Tensor:
    """Half of the picture's area in its middle, the rest hidden."""
    keep = torch.zeros(1, 1, size, size, dtype=torch.bool)
    edge = size // 7
    keep[..., edge : size - edge, edge : size - edge] = True
    return keep


def measure(setting: Setting) -> dict[str, Any]:
    """Calls under a plan that is there, and calls that make theirs (`_planned`), in float32 and bfloat16."""
    import torchvision

    torch.manual_seed(0)
    batch, size, calls = setting.pick((32, 224, 5), (2, 56, 1))
    masks = {"patches_14": patches(batch, size, 14), "patches_7": patches(batch, size, 7), "box": box(size)}
    architecture = setting.pick("resnet50", "resnet18")
    tables = {}
    for dtype in setting.pick((torch.float32, torch.bfloat16), (torch.float32,)):
        model = getattr(torchvision.models, architecture)().eval().to(setting.device, dtype)
        images = torch.randn(batch, 3, size, size, device=setting.device, dtype=dtype)

        def work(model: Any = model, images: Tensor = images) -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    model(images)

        def once(model: Any = model, images: Tensor = images) -> None:
            with torch.inference_mode():
                model(images)

        variants = {"plain": Variant(nullcontext, work), "plain_once": Variant(nullcontext, once)}
        for name, mask in masks.items():
            applied = under(model, mask.to(setting.device))
            variants[name] = Variant(lambda applied=applied, once=once: ready(applied, once), work)
            variants[f"{name}_planned"] = Variant(applied, once)
        found = race(setting, variants, rounds=setting.pick(6, 1))
        for name in masks:
            planned, plain = found[f"{name}_planned"], found["plain_once"]
            if "seconds" in planned and "seconds" in plain:  # one call against one call
                planned["to_plain"] = {"median": round(planned["seconds"] / plain["seconds"], 5)}
        tables[str(dtype).removeprefix("torch.")] = found
    return {
        "model": architecture,
        "batch": batch,
        "size": size,
        "bar": BAR,
        "by_dtype": tables,
    }


def under(model: Any, mask: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """The model's calls leave the hidden pixels out."""
    return lambda: LayerMask(mask).apply(model)


@contextmanager
def ready(applied: Callable[[], AbstractContextManager[Any]], once: Callable[[], None]) -> Iterator[None]:
    """The same, with the plan made."""
    with applied():
        once()
        yield
