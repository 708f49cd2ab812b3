"""Towers: an image or text encoder seen as embedding, blocks and head, so that it can start from the middle.

A tower computes only what its result depends on: text is cut behind the last end-of-text token, and the last
block runs for the one position that is pooled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


class Tower(ABC):
    """One encoder of a two-tower model.

    Attributes:
        blocks: the residual blocks in execution order.
        width: of the hidden states.
    """

    blocks: Sequence[nn.Module]
    width: int

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """What enters the first block, [N, L, width]."""

    @abstractmethod
    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Blocks `start` to `stop` (not included) on all positions."""

    @abstractmethod
    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        """The last block and the head, computed only for what is pooled: features [N, E], not normalised."""

    @abstractmethod
    def full(self, inputs: Tensor) -> Tensor:
        """The model's own features of the inputs, [N, E]; what `prefix` and `suffix` have to reproduce."""

    @abstractmethod
    def head(self) -> list[nn.Module | nn.Parameter]:
        """What comes after the blocks and is trained with them."""

    def prefix(self, inputs: Tensor, layer: int) -> Tensor:
        """The input of block `layer`, [N, L, width]."""
        return self.run(self.embed(inputs), 0, layer)

    def suffix(self, hidden: Tensor, where: Tensor, layer: int) -> Tensor:
        """Features [N, E], not normalised, from the input of block `layer`.

        Args:
            hidden: [N, L, width].
            where: the pooled position of every row [N]; image towers ignore it.
            layer: the block that `hidden` enters.
        """
        return self.last(self.run(hidden, layer, len(self.blocks) - 1), where)

    def trained(self, layer: int) -> list[nn.Parameter]:
        """The parameters from block `layer` on."""
        parts = [*self.blocks[layer:], *self.head()]
        return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


class TextTower(Tower):
    """A tower whose inputs are token ids [N, L]."""

    causal: bool

    @abstractmethod
    def pooled_at(self, tokens: Tensor) -> Tensor:
        """The position whose hidden state becomes the text's feature, [N]."""

    def crop(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the tokens that no result depends on; returns the tokens and the pooled positions."""
        where = self.pooled_at(tokens)
        return (tokens[:, : int(where.max()) + 1] if self.causal else tokens), where


@dataclass
class Towers:
    """Both encoders of one model, and how their features become logits.

    Attributes:
        model: the model.
        image: the image tower.
        text: the text tower.
        image_size: height and width of the pixels it takes.
        context: most tokens a text may have.
    """

    model: nn.Module
    image: Tower
    text: TextTower
    image_size: int
    context: int

    def scale(self) -> Tensor:
        """What cosines are multiplied with, a scalar without gradient."""
        return self.model.get_parameter("logit_scale").detach().exp().reshape(())

    def bias(self) -> float | Tensor:
        """What is added to the logits (SigLIP), a scalar, or 0."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias.detach().reshape(())

    def trained(self, image_layer: int, text_layer: int) -> list[str]:
        """Names of the parameters from the given blocks on, in the model's order."""
        wanted = {id(p) for p in self.image.trained(image_layer) + self.text.trained(text_layer)}
        return [name for name, p in self.model.named_parameters() if id(p) in wanted]
