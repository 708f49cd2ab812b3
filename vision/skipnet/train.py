"""Train: the stages of a SkipNet on accelerate, one process or several, resumable to the step.

"dense" trains the network with every block running; "supervised" the gates straight through their threshold on the
cross-entropy alone, as the paper's first stage; "budget" adds a price on the computation (the default: it is what works
in small runs); "reinforce" is the paper's second stage, sampled gates and a policy gradient, with batch statistics
frozen; "fixed" trains one subset of blocks for all images, the control.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from skipguide.config import JsonConfig
from skipguide.errors import SkipError
from skipguide.files import replacing
from skipguide.vision.skipnet.net import SkipNet
from skipguide.vision.skipnet.objectives import Reinforce, budget_loss, reinforce_loss
from skipguide.vision.skipnet.routing import Routing

logger = logging.getLogger(__name__)

STAGES = ("dense", "supervised", "budget", "reinforce", "fixed")
# What accelerate leaves on a module that it prepares: mixed precision is a forward of the instance.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainConfig(JsonConfig):
    """One stage.

    Args:
        stage: `"dense"`, `"supervised"`, `"budget"`, `"reinforce"` or `"fixed"`.
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

    stage: Literal["dense", "supervised", "budget", "reinforce", "fixed"] = "budget"
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
        if self.stage not in STAGES:
            raise SkipError(f"unknown stage {self.stage!r}; expected one of {', '.join(STAGES)}")
        if self.optimizer not in ("adamw", "sgd"):
            raise SkipError(f"expected optimizer 'adamw' or 'sgd'; got {self.optimizer!r}")
        if (
            min(self.steps, self.batch_size, self.save_every) < 1
            or not (self.lr > 0 and self.gate_lr > 0)
            or not 0 <= self.warmup < 1
        ):
            raise SkipError(f"expected positive steps, batch_size, save_every and lr, and warmup in [0, 1); got {self}")
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
        return {"dense": "open", "fixed": "open", "reinforce": "sample"}.get(self.stage, "straight_through")


def train(
    net: SkipNet,
    data: Dataset[Any],
    config: TrainConfig,
    *,
    out: str | Path | None = None,
    augment: Augment | None = None,
    decisions: Tensor | None = None,
    resume: bool = True,
    workers: int = 0,
    accelerator: Any = None,
) -> list[dict[str, float]]:
    """Train one stage in place.

    Args:
        net: the network; in eval mode afterwards.
        data: of images `[C, H, W]` and labels.
        config: the stage.
        out: folder for `state.pt`, `config.json`, `history.csv`; None keeps nothing. With a state of the same
            config (and decisions) there, training goes on from it, to the same weights as without the interruption.
        augment: `(images, labels, generator) -> (images, labels)` for a batch.
        decisions: bool `[G]`, the blocks of "fixed".
        resume: False starts again; a folder with a state is refused then.
        workers: of the data loader.
        accelerator: an `accelerate.Accelerator` (mixed precision, devices, processes); by default a plain one.

    Returns:
        The history: step, loss, cross_entropy, accuracy and computation (share of the gated blocks) of each step.

    Raises:
        SkipError: for a stage without what it needs, a state of another config or network, a damaged one, a folder with
            a `config.json` of something else, or a loss that is not finite.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from tqdm import tqdm

    if (decisions is not None) != (config.stage == "fixed"):
        raise SkipError(f"decisions are given for the stage 'fixed', and only there; the stage is {config.stage!r}")
    if len(cast(Any, data)) < 1:
        raise SkipError("expected at least one image; the data set is empty")
    # a block that no row of a batch runs has no gradient in that step
    accelerator = accelerator or Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    blocks = None if decisions is None else decisions.tolist()
    state = _State(net, config, blocks, None if out is None else Path(out), resume, accelerator.is_main_process)
    if state.step == 0 and config.sharpen != 1:
        net.gates.sharpen(config.sharpen)
    before = {name: net.__dict__[name] for name in _PREPARED if name in net.__dict__}
    model, optimizer = accelerator.prepare(net, state.optimizer)
    _train_mode(net, config)
    batches = _batches(data, config, state.step, accelerator, workers)
    bar = tqdm(
        batches,
        total=config.steps,
        initial=state.step,
        desc=config.stage,
        leave=False,
        disable=not accelerator.is_local_main_process,
    )
    try:
        for images, labels in bar:
            random = _generator(config.seed, state.step, accelerator.process_index)
            if augment is not None:
                images, labels = augment(images, labels, random)
            images, labels = images.to(accelerator.device), labels.to(accelerator.device)
            for group, times in zip(optimizer.param_groups, (1.0, config.gate_lr), strict=True):
                group["lr"] = config.lr * times * _schedule(state.step, config)
            device_random = torch.Generator(images.device).manual_seed(random.initial_seed())
            routing = model(images, return_routing=True, mode=config.mode, decisions=decisions, generator=device_random)
            loss, row = stage_loss(routing, labels, config)
            if not bool(torch.isfinite(loss)):
                raise SkipError(
                    f"the loss is {float(loss.detach())} at step {state.step} of stage {config.stage!r}: lower lr"
                )
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state.record(row)
            if state.step % config.save_every == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
                state.save()
    finally:
        bar.close()
        net.eval()
        for name in _PREPARED:  # the next stage prepares it again, and who evaluates it chooses the precision
            net.__dict__.pop(name, None)
        net.__dict__.update(before)
    state.save()
    accelerator.wait_for_everyone()
    return state.history


def stage_loss(routing: Routing, labels: Tensor, config: TrainConfig) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch in a stage, and what to log of it."""
    logits = routing.logits.float()
    each = functional.cross_entropy(logits, labels, reduction="none")
    loss = each.mean()
    if config.stage == "budget":
        weights = torch.tensor(routing.costs.blocks[1:], dtype=torch.float, device=logits.device)
        loss = loss + config.budget_weight * budget_loss(routing.gates.float(), config.budget_target, weights)
    elif config.stage == "reinforce":
        loss = loss + reinforce_loss(routing.gate_logits.float(), routing.gates.float(), each, config.terms)
    return loss, {
        "loss": float(loss.detach()),
        "cross_entropy": float(each.detach().mean()),
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "computation": float((routing.gates.detach() > 0.5).float().mean()),
    }


def _train_mode(net: SkipNet, config: TrainConfig) -> None:
    net.train()
    if config.frozen:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _schedule(step: int, config: TrainConfig) -> float:
    """Fraction of the highest learning rate: a linear rise, then half a cosine to zero."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * (step - rise) / max(1, config.steps - rise))))


def _generator(seed: int, step: int, process: int) -> torch.Generator:
    """What is random in a step depends on the step alone, so that a resumed run repeats it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1009 + process)


def _batches(
    data: Dataset[Any], config: TrainConfig, start: int, accelerator: Any, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    order = _Order(len(cast(Any, data)), config, start, int(accelerator.process_index), int(accelerator.num_processes))
    if isinstance(data, TensorDataset):
        images, labels = data.tensors
        for numbers in order:
            yield images[numbers], labels[numbers]
    else:
        yield from DataLoader(data, batch_sampler=cast(Any, order), num_workers=workers)


class _Order:
    """The numbers of the images of every step from `start` on: epochs in an order that the seed and epoch give."""

    def __init__(self, size: int, config: TrainConfig, start: int, process: int, processes: int) -> None:
        self.size, self.config, self.start = size, config, start
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.config.batch_size * self.processes
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.start, self.config.steps):
            numbers = []
            for place in range(step * batch + self.process, (step + 1) * batch, self.processes):
                if place // self.size != epoch:
                    epoch = place // self.size
                    random = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
                    order = torch.randperm(self.size, generator=random)
                numbers.append(int(order[place % self.size]))
            yield numbers


class _State:
    """The step, the history and what is on disk."""

    def __init__(
        self, net: SkipNet, config: TrainConfig, decisions: Any, out: Path | None, resume: bool, main: bool
    ) -> None:
        self.net, self.config, self.decisions, self.out, self.main = net, config, decisions, out, main
        self.step = 0
        self.history: list[dict[str, float]] = []
        decay: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        groups = [{"params": list(net.backbone.parameters())}, {"params": list(net.gates.parameters())}]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, **decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, **decay)
        if out is None:
            return
        path = out / "state.pt"
        if path.exists():
            if not resume:
                raise SkipError(f"{path} exists; pass resume=True to go on from it, or another folder")
            self._load(path)
        elif main:
            notes = out / "config.json"
            if notes.exists():  # of a run that was stopped before its first state, or of a saved model
                try:
                    TrainConfig.load_json(notes)
                except SkipError as error:
                    raise SkipError(f"{notes} belongs to something else ({error}); take another folder") from error
            out.mkdir(parents=True, exist_ok=True)
            config.save_json(notes, overwrite=True)

    def _load(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SkipError(f"{path} is damaged ({error}); delete it, or take another folder") from error
        if found["config"] != self.config.to_dict():
            differ = sorted(k for k, v in self.config.to_dict().items() if found["config"].get(k) != v)
            raise SkipError(f"{path} is of a run with other settings ({', '.join(differ)}); take another folder")
        if found.get("decisions", self.decisions) != self.decisions:
            raise SkipError(f"{path} is of a run with other decisions, {found['decisions']}; take another folder")
        try:
            self.net.load_state_dict(found["net"])
        except RuntimeError as error:
            raise SkipError(f"{path} is of another network; take another folder: {error}") from error
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.history = found["step"], found["history"]
        logger.info("going on from step %d of %s", self.step, path)

    def record(self, row: dict[str, float]) -> None:
        """Count a step."""
        self.step += 1
        self.history.append({"step": self.step, **row})

    def save(self) -> None:
        """Write the state and the history, each under a temporary name first."""
        if self.out is None or not self.main:
            return
        state = {
            "config": self.config.to_dict(),
            "decisions": self.decisions,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
        }
        with replacing(self.out / "state.pt", self.out / "history.csv") as (weights, table):
            torch.save(state, weights)
            self._write_history(table)

    def _write_history(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            columns = ["step", "loss", "cross_entropy", "accuracy", "computation"]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: v if k == "step" else round(v, 5) for k, v in row.items()} for row in self.history)
