"""Missing blocks: a pass that ran fewer blocks than it should was answered by something that keeps state of its own.

TeaCache as published, ParaAttention and WaveSpeed put a forward in place of the model's that goes by what it saw at its
last call. A skipped pass between two of the pipeline's is one more call to it: it answers one from the other, mostly
without an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from skipguide.errors import SkipError
from skipguide.hosts.compilation import holds_blocks
from skipguide.hosts.wrappers import unwrap


class BlockCount:
    """What the blocks of a model ran, against what they should have run.

    Args:
        model: the denoiser.
        names: of its blocks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self._unseen: bool | None = None  # whether the blocks run inside a compiled graph; None: not looked yet

    def renew(self, model: nn.Module | None = None) -> None:
        """Look again whether the blocks run inside a compiled graph: a model can be compiled between two calls.

        Args:
            model: as it is called now, if it was wrapped since.
        """
        self._unseen = None
        if isinstance(model, nn.Module) and unwrap(model) is unwrap(self.model):
            self.model = model

    @property
    def unseen(self) -> bool:
        """Whether the blocks run inside a compiled graph, where they are not counted."""
        if self._unseen is None:
            self._unseen = holds_blocks(self.model, self.names)
        return self._unseen

    def refuse(self, ran: int, planned: int, what: str) -> None:
        """Refuse a pass that ran fewer blocks than planned, unless they run inside a compiled graph.

        Raises:
            SkipError: naming what keeps state between calls.
        """
        if not self.unseen:
            raise self.error(ran, planned, what)

    def refuse_failure(self, failure: Exception, ran: int, planned: int) -> None:
        """Refuse a skipped pass in which the model failed before its first block.

        The plain pass before it went well with the same inputs, so what failed is what it remembers. Memory that ran
        out is its own reason.

        Raises:
            SkipError: naming what keeps state between calls.
        """
        if ran or isinstance(failure, (SkipError, torch.OutOfMemoryError)):
            return
        if not self.unseen:
            what = f"a skipped pass and failed ({type(failure).__name__}: {failure})"
            raise self.error(ran, planned, what) from failure

    def error(self, ran: int, planned: int, what: str) -> SkipError:
        """The error for a pass that ran too few blocks."""
        return SkipError(
            f"{type(unwrap(self.model)).__name__} ran {ran} of the {planned} blocks of {what}: its forward keeps state "
            f"between calls and answers from it, as TeaCache, ParaAttention and WaveSpeed do, or blocks were taken "
            f"out. It would mix up skipped and plain passes: take it off before applying guidance, or use a cache that "
            f"goes together with it, such as FirstBlockCache or MagCache of diffusers"
        )
