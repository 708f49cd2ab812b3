"""Accuracy and computation of a SkipNet, and of controls that decide without looking at the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.shown import Row, Shown
from skipguide.vision.skipnet.net import SkipNet
from skipguide.vision.skipnet.objectives import check_labels


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """A network on a data set.

    Attributes:
        correct: bool `[N]`.
        gates: bool `[N, G]`, the gated blocks that ran.
        macs: `[N]` float64, of every image.
        macs_fraction: their mean over the ungated network's.
        block_rows: rows that the gated blocks computed, counted where they ran.
    """

    correct: Tensor
    gates: Tensor
    macs: Tensor
    macs_fraction: float
    block_rows: int

    def _heading(self) -> str:
        return f"Evaluation on {len(self.correct)} images"

    def _rows(self) -> list[Row]:
        return [tuple(self.to_dict()), tuple(self.to_dict().values())]

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return float(self.correct.double().mean())

    @property
    def blocks(self) -> Tensor:
        """Blocks run for every image, `[N]`; the first always runs."""
        return 1 + self.gates.sum(1)

    @property
    def mean_blocks(self) -> float:
        """Blocks run, on average."""
        return float(self.blocks.double().mean())

    def per_class(self, labels: Tensor) -> list[dict[str, Any]]:
        """Images, accuracy, blocks and MACs of every class."""
        rows = []
        for label in labels.unique().tolist():
            of = labels == label
            rows.append(
                {
                    "class": label,
                    "images": int(of.sum()),
                    "accuracy": float(self.correct[of].double().mean()),
                    "blocks": float(self.blocks[of].double().mean()),
                    "macs": float(self.macs[of].mean()),
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the images."""
        return {
            "accuracy": self.accuracy,
            "blocks": self.mean_blocks,
            "blocks_fraction": self.mean_blocks / (self.gates.shape[1] + 1),
            "macs_fraction": self.macs_fraction,
        }


Decide = Callable[[int, int], Tensor]


@torch.inference_mode()
def evaluate(
    net: SkipNet,
    images: Tensor,
    labels: Tensor,
    mode: str = "hard",
    decide: Decide | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> Evaluation:
    """Run a network over images.

    Args:
        net: in eval mode.
        images: `[N, C, H, W]`.
        labels: `[N]`.
        mode: `"hard"`, `"sample"` or `"open"`.
        decide: `(first, count) -> bool [count, G]`, decisions that replace the gates' own.
        batch_size: of a pass.
        seed: of the sampled gates.
    """
    if net.training:
        raise SkipError("evaluation needs the network in eval mode: call net.eval()")
    if batch_size < 1:
        raise SkipError(f"expected a batch_size of at least 1; got {batch_size}")
    if len(images) != len(labels) or not len(images):
        raise SkipError(f"expected as many labels as images, at least one; got {len(labels)} and {len(images)}")
    labels = check_labels(labels, len(images))
    random = torch.Generator(images.device).manual_seed(seed)
    correct, gates, macs, rows = [], [], [], 0
    costs = None
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        decisions = None if decide is None else decide(first, len(batch))
        routing = net(batch, return_routing=True, mode=mode, decisions=decisions, generator=random)
        correct.append(routing.logits.argmax(1) == labels[first : first + batch_size])
        gates.append(routing.gates > 0.5)
        macs.append(routing.macs)
        rows += sum(routing.stats.rows.values())
        costs = routing.costs
    assert costs is not None
    every = torch.cat(macs)
    return Evaluation(torch.cat(correct), torch.cat(gates), every, float(every.mean()) / costs.dense, rows)


def random_gates(rates: Tensor, seed: int = 0) -> Decide:
    """A control: each gate opens at its usual rate, whatever the image."""
    random = torch.Generator().manual_seed(seed)

    def decide(first: int, count: int) -> Tensor:
        return torch.rand(count, len(rates), generator=random) < rates.cpu()

    return decide


def fixed_gates(decisions: Tensor) -> Decide:
    """A control: the same blocks for every image."""

    def decide(first: int, count: int) -> Tensor:
        return decisions.expand(count, -1)

    return decide


def best_subset(net: SkipNet, images: Tensor, labels: Tensor, blocks: int, rates: Tensor | None = None) -> Tensor:
    """The best subset of the gated blocks, the same for every image, that leaves out blocks greedily.

    From all blocks, the one whose absence hurts the likelihood least is left out until `blocks` remain; with `rates`,
    the blocks that the gates open most often are tried too, and the better of the two is returned.

    Args:
        net: in eval mode.
        images: of a validation set: choosing on the test set would flatter the control.
        labels: theirs.
        blocks: gated blocks that may run.
        rates: `[G]`, how often each gate opens.

    Returns:
        bool `[G]`.
    """
    if net.training:
        raise SkipError("a subset is chosen with the network in eval mode: call net.eval()")
    count = len(net.gates)
    if not 0 <= blocks <= count:
        raise SkipError(f"expected between 0 and {count} blocks; got {blocks}")
    kept = torch.ones(count, dtype=torch.bool)
    while int(kept.sum()) > blocks:
        tries = [_without(kept, place) for place in kept.nonzero()[:, 0].tolist()]
        kept = min(tries, key=lambda chosen: _loss(net, images, labels, chosen))
    if rates is None:
        return kept
    often = torch.zeros(count, dtype=torch.bool)
    often[rates.argsort(descending=True)[:blocks].cpu()] = True
    return min((kept, often), key=lambda chosen: _loss(net, images, labels, chosen))


def _without(kept: Tensor, place: int) -> Tensor:
    fewer = kept.clone()
    fewer[place] = False
    return fewer


@torch.inference_mode()
def _loss(net: SkipNet, images: Tensor, labels: Tensor, decisions: Tensor) -> float:
    logits = net(images, return_routing=True, decisions=decisions).logits
    return float(torch.nn.functional.cross_entropy(logits, labels))
