"""The settings of a run, as frozen data; the defaults are the reference's base-to-new experiments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skipguide.config import JsonConfig, is_one_of, normalize_fields
from skipguide.errors import SkipError


@dataclass(frozen=True, repr=False)
class TuneConfig(JsonConfig):
    """Settings of `SkipTuner.fit`.

    Attributes:
        shots: images per class that are drawn with `seed`; None takes all.
        epochs: passes over them.
        batch_size: images per step and process.
        lr_text: peak learning rate of the text tower (the reference's base-to-new value).
        lr_image: peak learning rate of the image tower.
        warmup_epochs: epochs at `warmup_lr`.
        warmup_lr: learning rate of the warm-up.
        optimizer: `"sgd"` (the reference) or `"adamw"`.
        momentum: of SGD.
        weight_decay: of all trained parameters.
        homogeneous: batches of one class; None does it from 4 shots on, as the reference does.
        seed: of the drawn shots, the order, the views and the kept ranks.
        views: how many augmented versions of every image are cached and taken in turn; `"per_epoch"` computes the
            prefix anew in every epoch (the reference).
        augment: `"crop"` (random resized crop and flip), or None. With None there is one view.
        precision: `"fp32"`, `"bf16"` or `"fp16"` autocast over fp32 master weights; `"auto"` is bf16 (else fp16) on
            a GPU and fp32 on the CPU.
        cache: where prefix features are held: `"auto"`, `"device"`, `"host"` or `"disk"`.
        cache_dtype: their dtype; `"auto"` is that of the computation.
        cache_limit: most bytes of cached features; None is no limit.
        extract_batch: images per batch while features are extracted.

    Raises:
        SkipError: for a value that makes no sense.

    Example:
        >>> TuneConfig(epochs=5) == TuneConfig.from_dict(TuneConfig(epochs=5).to_dict())
        True
    """

    shots: int | None = None
    epochs: int = 20
    batch_size: int = 4
    lr_text: float = 2e-5
    lr_image: float = 5e-6
    warmup_epochs: int = 1
    warmup_lr: float = 1e-6
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    homogeneous: bool | None = None
    seed: int = 1
    views: int | Literal["per_epoch"] = 1
    augment: Literal["crop"] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    cache: Literal["auto", "device", "host", "disk"] = "auto"
    cache_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    cache_limit: float | None = None
    extract_batch: int = 128

    def __post_init__(self) -> None:
        rates = ("lr_text", "lr_image", "warmup_lr", "weight_decay", "momentum")
        normalize_fields(
            self,
            wholes={"shots": 1, "epochs": 1, "batch_size": 1, "warmup_epochs": 0, "seed": None, "extract_batch": 1},
            numbers=dict.fromkeys((*rates, "cache_limit"), 0),  # bytes are written 2e9 too
            flags=("homogeneous",),
            optional=("shots", "cache_limit", "homogeneous"),
        )
        if not is_one_of(self.views, ("per_epoch",)):
            normalize_fields(self, {"views": 1})
        choices = {
            "optimizer": ("sgd", "adamw"),
            "augment": ("crop", None),
            "precision": ("auto", "fp32", "bf16", "fp16"),
            "cache": ("auto", "device", "host", "disk"),
            "cache_dtype": ("auto", "float32", "float16", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SkipError(f"expected {name} to be one of {allowed}; got {getattr(self, name)!r}")

    def one_class_batches(self) -> bool:
        """Whether a batch holds images of one class only."""
        return (self.shots or 0) >= 4 if self.homogeneous is None else self.homogeneous
