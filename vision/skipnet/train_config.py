"""The settings of one stage of a SkipNet's training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from skipguide.config import JsonConfig, normalize_fields
from skipguide.errors import SkipError
from skipguide.vision.skipnet.objectives import Reinforce, budget_loss

STAGES = ("dense", "supervised", "budget", "reinforce", "fixed", "random")
DECIDED = ("fixed", "random")  # stages whose blocks are given, not learned


@dataclass(frozen=True, repr=False)
class TrainConfig(JsonConfig):
    """One stage.

    Args:
        stage: `"dense"`, `"supervised"`, `"budget"`, `"reinforce"`, `"fixed"` or `"random"`.
        steps: optimiser steps.
        batch_size: of one process.
        lr: highest learning rate; it rises over `warmup` of the steps and falls as a cosine.
        gate_lr: the gates' learning rate, as a multiple of `lr`.
        optimizer: `"adamw"`, or `"sgd"` with Nesterov momentum 0.9.
        weight_decay: of the optimiser.
        warmup: fraction of the steps.
        budget_weight: price of running every gated block, for "budget".
        budget_target: share of the gated blocks that is free.
        alpha: this and the next seven are `Reinforce`'s, for "reinforce".
        beta: see `Reinforce`.
        gamma: see `Reinforce`.
        rl_weight: see `Reinforce.weight`.
        reduction: see `Reinforce`.
        baseline: see `Reinforce`.
        detach: see `Reinforce`.
        epsilon: see `Reinforce`.
        sharpen: multiplies the gates' logits once, before the first step.
        freeze_bn: batch norms keep their statistics; None freezes them in "reinforce" only, where skipped rows
            would be missing from the statistics.
        seed: of the order of images, augmentation and sampled gates.
        save_every: steps between checkpoints.
    """

    stage: Literal["dense", "supervised", "budget", "reinforce", "fixed", "random"] = "budget"
    steps: int = 1000
    batch_size: int = 128
    lr: float = 2e-3
    gate_lr: float = 1.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.02
    warmup: float = 0.1
    budget_weight: float = 0.4
    budget_target: float = 0.0
    alpha: float = 0.1
    beta: float = 1.0
    gamma: float = 1.0
    rl_weight: float = 0.01
    reduction: Literal["mean", "sum"] = "mean"
    baseline: Literal["batch_mean", "none"] = "batch_mean"
    detach: bool = True
    epsilon: float = 0.0
    sharpen: float = 1.0
    freeze_bn: bool | None = None
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        rates = ("lr", "gate_lr", "weight_decay", "warmup", "budget_weight", "budget_target", "sharpen")
        terms = ("alpha", "beta", "gamma", "rl_weight", "epsilon")
        normalize_fields(
            self,
            wholes={"steps": 1, "batch_size": 1, "save_every": 1, "seed": None},
            numbers=dict.fromkeys((*rates, *terms), 0),
            flags=("detach", "freeze_bn"),
            optional=("freeze_bn",),
        )
        if self.stage not in STAGES:
            raise SkipError(f"unknown stage {self.stage!r}; expected one of {', '.join(STAGES)}")
        if self.optimizer not in ("adamw", "sgd"):
            raise SkipError(f"expected optimizer 'adamw' or 'sgd'; got {self.optimizer!r}")
        if not (self.lr > 0 and self.gate_lr > 0 and self.sharpen > 0 and self.warmup < 1):
            raise SkipError(f"expected positive lr, gate_lr and sharpen, and warmup in [0, 1); got {self}")
        _ = self.terms, budget_loss(torch.ones(1, 1), self.budget_target)

    @property
    def terms(self) -> Reinforce:
        """The reinforcement terms."""
        own = {f.name: getattr(self, f.name) for f in fields(Reinforce) if f.name != "weight"}
        return Reinforce(weight=self.rl_weight, **own)

    @property
    def frozen(self) -> bool:
        """Whether batch norms keep their statistics."""
        return self.stage == "reinforce" if self.freeze_bn is None else self.freeze_bn

    @property
    def mode(self) -> str:
        """The network's mode in this stage."""
        return {"dense": "open", "fixed": "open", "random": "open", "reinforce": "sample"}.get(
            self.stage, "straight_through"
        )
