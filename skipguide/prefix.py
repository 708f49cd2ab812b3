"""Resume: start a model from the middle. The streams that enter block k are captured once, and given to it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from skipguide.arguments import sequence_like
from skipguide.errors import SkipError


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
