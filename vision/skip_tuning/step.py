"""One training step on cached prefix features: rank the classes, keep some, resume both towers, compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.vision.skip_tuning.classes import ClassSkip, choose, rank
from skipguide.vision.skip_tuning.tower import Towers


@dataclass
class TextPrefix:
    """The class texts at the input of the resumed block.

    Attributes:
        hidden: [C, L, width], cut behind the last end-of-text token.
        where: the pooled position of every text [C].
        prototypes: unit-length features of the model before tuning [C, E].
    """

    hidden: Tensor
    where: Tensor
    prototypes: Tensor

    def gather(self, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The texts of some classes, cut to the longest of them."""
        hidden, where = (self.hidden, self.where) if kept is None else (self.hidden[kept], self.where[kept])
        return hidden[:, : int(where.max()) + 1], where


class StepModule(nn.Module):
    """Loss of a batch of prefix features; a module, so that several processes can average its gradients.

    Attributes:
        classes: how classes are skipped, or None.
        kept: the classes of the last step, sorted ids [K].
    """

    def __init__(
        self, towers: Towers, texts: TextPrefix, image_layer: int, text_layer: int, classes: ClassSkip | None, seed: int
    ) -> None:
        super().__init__()
        self.model = towers.model
        self.towers, self.texts, self.classes = towers, texts, classes
        self.image_layer, self.text_layer = image_layer, text_layer
        self.kept = torch.arange(len(texts.where))
        self.generator = torch.Generator().manual_seed(seed)
        self.ranks = None if classes is None else classes.draw(len(texts.where), self.generator)

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits.

        Args:
            hidden: image prefix features [N, L, width].
            labels: classes [N].

        Returns:
            The mean cross-entropy, and the logits [N, K] of the classes in `kept`.
        """
        first = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        images = F.normalize(self.towers.image.suffix(hidden, first, self.image_layer), dim=-1)
        kept = None
        if self.classes is not None and self.ranks is not None:
            if self.classes.resample == "step":
                self.ranks = self.classes.draw(len(self.texts.where), self.generator)
            with torch.no_grad():
                order = rank(images.detach().float(), labels, self.texts.prototypes.float())[1]
            kept = choose(order, self.ranks.to(order.device), labels)
            self.kept = kept
        texts = F.normalize(self.towers.text.suffix(*self.texts.gather(kept), self.text_layer), dim=-1)
        logits = self.towers.scale() * images @ texts.T + self.towers.bias()
        target = labels if kept is None else torch.searchsorted(kept, labels)
        return F.cross_entropy(logits.float(), target), logits
