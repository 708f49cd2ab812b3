"""Trains a SkipNet in stages, on accelerate: one process or several, resumable to the step.

"dense" trains the network with every block running; "supervised" the gates straight through their threshold on the
cross-entropy alone, as the paper's first stage; "budget" adds a price on the computation (the default: it is what works
in small runs); "reinforce" is the paper's second stage, sampled gates and a policy gradient, with batch statistics
frozen. Two are controls: "fixed" trains one subset of blocks for all images; "random" draws the blocks of every image,
which is also stochastic depth (arXiv 1603.09382), the network that is trained to lose blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar, say
from skipguide.vision.skipnet.net import SkipNet, kind_of
from skipguide.vision.skipnet.objectives import budget_loss, check_labels, reinforce_loss
from skipguide.vision.skipnet.routing import Routing
from skipguide.vision.skipnet.sampler import batches
from skipguide.vision.skipnet.train_config import DECIDED, STAGES, TrainConfig
from skipguide.vision.skipnet.train_state import TrainState

__all__ = ["DECIDED", "STAGES", "Augment", "TrainConfig", "stage_loss", "train"]

# What accelerate leaves on a module that it prepares: mixed precision is a forward of the instance.
_PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


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
        decisions: bool `[G]`, the blocks of "fixed"; floating point `[G]` in 0..1, how often each runs in "random".
        resume: False starts again; a folder with a state is refused then.
        workers: of the data loader.
        accelerator: an `accelerate.Accelerator` (mixed precision, devices, processes); by default a plain one.

    Returns:
        The history: step, loss, cross_entropy, accuracy and computation (share of the gated blocks) of each step.

    Raises:
        SkipError: for a stage without what it needs, a state of another config or network, a damaged one, a folder with
            a `config.json` of something else, labels that are no classes of the network, or a loss that is not finite.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    _check_decisions(decisions, net, config)
    if len(cast(Any, data)) < 1:
        raise SkipError("expected at least one image; the data set is empty")
    # a block that no row of a batch runs has no gradient in that step
    accelerator = accelerator or Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    blocks = None if decisions is None else decisions.tolist()
    state = TrainState(net, config, blocks, None if out is None else Path(out), resume, accelerator.is_main_process)
    if state.step == 0 and config.sharpen != 1:
        net.gates.sharpen(config.sharpen)
    before = {name: net.__dict__[name] for name in _PREPARED if name in net.__dict__}
    model, optimizer = accelerator.prepare(net, state.optimizer)
    _train_mode(net, config)
    steps = batches(data, config, state.step, accelerator, workers)
    shows = accelerator.is_local_main_process
    bar = progress_bar(steps, config.stage, show=shows, total=config.steps, initial=state.step)
    try:
        for images, labels in bar:
            random = _generator(config.seed, state.step, accelerator.process_index)
            if augment is not None:
                images, labels = augment(images, labels, random)
            labels = check_labels(labels, len(images))
            images, labels = images.to(accelerator.device), labels.to(accelerator.device)
            for group, times in zip(optimizer.param_groups, (1.0, config.gate_lr), strict=True):
                group["lr"] = config.lr * times * _schedule(state.step, config)
            device_random = torch.Generator(images.device).manual_seed(random.initial_seed())
            chosen = _drawn(decisions, len(images), random) if config.stage == "random" else decisions
            routing = model(images, return_routing=True, mode=config.mode, decisions=chosen, generator=device_random)
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
                say(bar, ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
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
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise SkipError(
            f"expected labels 0 to {logits.shape[1] - 1}, a class of the network for each image; got "
            f"{int(labels.min())} to {int(labels.max())}: drop images without a label"
        )
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


def _check_decisions(decisions: Any, net: SkipNet, config: TrainConfig) -> None:
    """Refuse decisions that do not go with the stage."""
    if (decisions is not None) != (config.stage in DECIDED):
        raise SkipError(
            f"decisions are given for the stages {' and '.join(DECIDED)}, and only there; the stage is {config.stage!r}"
        )
    if config.stage != "random":
        return  # the network checks those of "fixed"
    count = len(net.gates)
    if not isinstance(decisions, Tensor) or decisions.shape != (count,) or not decisions.is_floating_point():
        raise SkipError(
            f"expected how often each block runs as floats [{count}] for the stage 'random'; got {kind_of(decisions)}"
        )
    if not bool(((decisions >= 0) & (decisions <= 1)).all()):
        raise SkipError(f"expected how often each block runs as shares in 0..1; got {decisions.tolist()}")


def _drawn(shares: Any, count: int, random: torch.Generator) -> Tensor:
    """The blocks of a batch of "random", drawn for every image."""
    drawn: Tensor = torch.rand(count, len(shares), generator=random) < shares.detach().cpu()
    return drawn


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
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1009 + process) % 2**64)
