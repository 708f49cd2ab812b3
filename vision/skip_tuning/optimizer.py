"""The optimizer: a group per tower, and the rates that an epoch gives them."""

from __future__ import annotations

import torch

from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.schedule import learning_rate
from skipguide.vision.skip_tuning.trainable_classifier import TrainableClassifier


def make_optimizer(tuner: TrainableClassifier, config: TuneConfig) -> torch.optim.Optimizer:
    """One group per tower, text first."""
    image = {id(p) for p in tuner.towers.image.trained(0)}
    groups = [
        {"params": [p for p in tuner.parameters().values() if id(p) not in image], "tower": "text"},
        {"params": [p for p in tuner.parameters().values() if id(p) in image], "tower": "image"},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, config: TuneConfig, epoch: int) -> None:
    """Set the learning rates of an epoch."""
    for group in optimizer.param_groups:
        peak = config.lr_text if group["tower"] == "text" else config.lr_image
        group["lr"] = learning_rate(
            epoch, config.epochs, peak, warmup_epochs=config.warmup_epochs, warmup=config.warmup_lr
        )
