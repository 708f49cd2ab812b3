"""Resume: start a model from the middle. The streams that enter block k are captured once, and given to it again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from skipguide.arguments import sequence_like
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from skipguide.skipper import Skipper


@dataclass
class Prefix:
    """The streams that enter one block: references to the tensors of the pass that captured them.

    Attributes:
        layer: the block, in execution order.
        streams: stream name -> tensor, as the block received it. Empty until a pass was captured.
        kept: name of an earlier block -> what it returned, for blocks that the model hears from again later.
    """

    layer: int
    streams: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def select(self, rows: slice, batch: int) -> Prefix:
        """The same point for some rows of the batch, as views.

        Args:
            rows: slice of the model's batch.
            batch: the model's batch size when the prefix was captured.
        """
        if not self.streams:
            raise self.unfilled()

        def rows_of(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return sequence_like(value, (rows_of(item) for item in value))
            if value is None:
                return None
            fold = value.shape[0] // batch  # Latte folds frames or positions into the batch
            start, stop, _ = rows.indices(batch)
            return value[start * fold : stop * fold]

        streams = {name: rows_of(tensor) for name, tensor in self.streams.items()}
        return Prefix(self.layer, streams, {name: rows_of(value) for name, value in self.kept.items()})

    def unfilled(self) -> SkipError:
        """The error for a prefix that no pass has filled yet."""
        return SkipError(
            f"nothing was captured at block {self.layer}: run the model once inside capture(model, prefix)"
        )

    def fill(self, other: Prefix) -> None:
        """Take over what another prefix of the same layer holds."""
        self.streams.update(other.streams)
        self.kept.update(other.kept)

    def clear(self) -> None:
        """Let go of the tensors."""
        self.streams.clear()
        self.kept.clear()


def capture(model: nn.Module, prefix: Prefix) -> AbstractContextManager[Skipper]:
    """Fill `prefix` on every pass of `model` inside the `with` block.

    Example:
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> import torch
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8).eval()
        >>> call = (torch.randn(1, 8, 4), torch.randn(1, 3, 8), torch.tensor([500.0]), None, 2, 2, 2)
        >>> prefix = Prefix(layer=2)
        >>> with torch.no_grad(), capture(model, prefix):
        ...     full = model(*call).sample
        >>> with torch.no_grad(), resume(model, prefix) as skipper:
        ...     again = model(*call).sample
        >>> torch.equal(full, again), list(skipper.stats.calls)
        (True, ['transformer_blocks.2'])
    """
    from skipguide.plan import SkipPlan
    from skipguide.skipper import Skipper

    return Skipper(model, SkipPlan(), capture=prefix)


def resume(model: nn.Module, prefix: Prefix) -> AbstractContextManager[Skipper]:
    """Run `model` from the captured point on: blocks before `prefix.layer` do not run.

    The result is bit-identical to the full pass at the same batch, and equal to rounding for other batch sizes.

    Raises:
        SkipError: if nothing was captured yet.
    """
    from skipguide.plan import SkipPlan
    from skipguide.skipper import Skipper

    if not prefix.streams:
        raise prefix.unfilled()
    return Skipper(model, SkipPlan(), resume=prefix)
