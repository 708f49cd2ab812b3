"""What the gates of a network decided in one pass, and what the pass cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from skipguide.config import is_one_of
from skipguide.errors import SkipError
from skipguide.shown import Row, Shown
from skipguide.stats import Stats
from skipguide.vision.recording import is_exported, is_recorded, is_traced
from skipguide.vision.skipnet.gates import Gates

# hard: p > 0.5, skipped rows do not run. sample: Bernoulli(p), the same. straight_through: hard forward, soft backward,
# every block computed. soft: p itself, every block computed. open: everything runs.
Mode = Literal["hard", "sample", "straight_through", "soft", "open"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one image, from the shapes of the network.

    Attributes:
        blocks: of every residual block, its projection included; the first one always runs.
        shortcuts: of every block's projection, which is paid where the block is skipped; 0 without one.
        gates: of the gate before every block; 0 for the first.
        rest: stem and head.
    """

    blocks: tuple[int, ...]
    shortcuts: tuple[int, ...]
    gates: tuple[int, ...]
    rest: int

    @property
    def dense(self) -> int:
        """The ungated network."""
        return sum(self.blocks) + self.rest


@dataclass(frozen=True, repr=False)
class Routing(Shown):
    """One pass of a gated network.

    Attributes:
        logits: `[B, num_classes]`.
        gates: `[B, G]`, what was multiplied or decided: 1 runs, 0 skips; gate g decides block g + 1.
        probabilities: `[B, G]` of running.
        gate_logits: `[B, G]`, of which the probabilities are the sigmoid.
        stats: calls and rows of every block.
        costs: MACs per image and block.
    """

    logits: Tensor
    gates: Tensor
    probabilities: Tensor
    gate_logits: Tensor
    stats: Stats
    costs: Costs

    def _heading(self) -> str:
        rows, gated = self.gates.shape
        return (
            f"Routing of {rows} images: {float(self.blocks.double().mean()):.1f} of {gated + 1} blocks run on average, "
            f"{self.macs_fraction:.1%} of the MACs"
        )

    def _rows(self) -> list[Row]:
        blocks, macs = self.blocks.tolist(), (self.macs / self.costs.dense).tolist()
        return [("image", "blocks", "MACs"), *((i, ran, f"{macs[i]:.1%}") for i, ran in enumerate(blocks))]

    @property
    def blocks(self) -> Tensor:
        """Blocks run for every image, `[B]`; the first one always runs."""
        return 1 + (self.gates.detach() > 0.5).sum(1)

    @property
    def macs(self) -> Tensor:
        """MACs of every image as the decisions cost them, `[B]` float64: stem, gates, blocks or projections, head."""
        ran = (self.gates.detach() > 0.5).double()
        block, passed, gate = (
            torch.tensor(values[1:], dtype=torch.float64, device=ran.device)
            for values in (self.costs.blocks, self.costs.shortcuts, self.costs.gates)
        )
        return self.costs.rest + self.costs.blocks[0] + gate.sum() + ran @ block + (1 - ran) @ passed

    @property
    def computation_percentage(self) -> float:
        """The paper's figure: blocks run in percent, every block counted equally, gates not counted."""
        return 100 * float(self.blocks.double().mean()) / (self.gates.shape[1] + 1)

    @property
    def macs_fraction(self) -> float:
        """MACs over those of the ungated network; gates are counted, so open gates give more than 1."""
        return float(self.macs.mean()) / self.costs.dense


class Decisions:
    """The decisions of one pass. `Router` calls it before every gated block; it asks the gate and keeps the answer."""

    def __init__(
        self, gates: Gates, mode: str, forced: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        if not is_one_of(mode, MODES):
            raise SkipError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
        if (mode in ("hard", "sample") or forced is not None) and (is_traced() or is_exported()):
            what = f"mode={mode!r}" if forced is None else "decisions"
            raise SkipError(
                f"{what} skips the rows that the gates leave out, which a trace or export would fix to those of its "
                "example: pass mode='straight_through', which decides the same and computes every block"
            )
        self.gates = gates
        self.mode = mode
        self.forced = forced
        self.generator = generator
        self.state: Any = None
        self.logits: list[Tensor] = []
        self.masks: list[Tensor] = []

    def __call__(self, place: int, x: Tensor) -> Tensor | None:
        """The decision before gated block `place`, for `Router`."""
        logit, self.state = self.gates(place, x, self.state)
        self.logits.append(logit)
        decision = self._decide(place, logit)
        self.masks.append(decision.to(logit.dtype))
        # Who records the pass cannot look whether all are open.
        return None if self.mode == "open" and self.forced is None and is_recorded() else decision

    def _decide(self, place: int, logit: Tensor) -> Tensor:
        if self.forced is not None:
            return self.forced[:, place]
        if self.mode == "open":
            return torch.ones_like(logit, dtype=torch.bool)
        if self.mode == "hard":
            return logit > 0
        p = logit.sigmoid()
        if self.mode == "soft":
            return p
        if self.mode == "sample":
            return torch.rand(p.shape, device=p.device, generator=self.generator) < p
        # p - p is exactly zero, so the value is exactly 0 or 1 and the gradient is that of p
        return (logit > 0).to(p.dtype) + (p - p.detach())

    def collect(self) -> tuple[Tensor, Tensor]:
        """Masks and gate logits of the pass, `[B, G]` each.

        Raises:
            SkipError: for gates that are not finite, which would silently skip blocks.
        """
        logits = torch.stack(self.logits, 1)
        if not is_recorded() and not bool(torch.isfinite(logits).all()):
            broken = (~torch.isfinite(logits)).any(0).nonzero()[:, 0].tolist()
            raise SkipError(
                f"the gates {broken[:5]} gave NaN or infinity (of {logits.shape[1]} gates): the images or the weights "
                f"are not finite"
            )
        return torch.stack(self.masks, 1), logits
