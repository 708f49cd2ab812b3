"""PrefixReuse: the skip, perturbed-attention and STG passes that pipelines make by themselves, only cheaper."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipguide.active import everywhere_at
from skipguide.blocks import find_blocks
from skipguide.config import JsonConfig
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.pipelines.handle import PipelineHandle
from skipguide.pipelines.native.guiders import GUIDERS, refuse_broken
from skipguide.pipelines.native.listener import ReuseListener
from skipguide.pipelines.native.ltx2 import IDLE_STG, LTX2
from skipguide.pipelines.native.pag import PAG
from skipguide.pipelines.native.sd3 import SD3
from skipguide.pipelines.native.stats import ReuseStats
from skipguide.pipelines.native.variants import NativeKind
from skipguide.pipelines.registry.described import refuse_no_pipeline
from skipguide.pipelines.sampling.interceptor import Interceptor
from skipguide.shown import Row, Shown

logger = logging.getLogger(__name__)

KINDS: tuple[NativeKind, ...] = (LTX2, SD3, PAG, GUIDERS)
# under which names pipelines of diffusers have their denoisers
DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True, repr=False)
class PrefixReuse(JsonConfig):
    """Run the further passes of a pipeline's own guidance from where they differ; the result stays the same.

    A pass that skips or perturbs some blocks does what the conditional pass did up to the first of them. diffusers runs
    it whole; here it goes on from the activations that the conditional pass had there (design rule 5). Which pass is
    which is read from the arguments of the denoiser's call, never from its place in the step. That it is a variant of
    an earlier one is proven: by all other inputs of the call, compared as tensors, by the parameters up to that block
    and their versions, by the active adapters with their scales. What cannot be proven runs whole.

    The result is the plain call's: to the bit where the passes have the same batch, else equal to rounding, since a
    batch of another size moves the last bits (1e-5 relative in float32; in bfloat16 as near to a float32 run as the
    plain call is).

    Example:
        >>> PrefixReuse.from_dict(PrefixReuse().to_dict()) == PrefixReuse()
        True
    """

    def apply(self, pipe: Any) -> AppliedReuse:
        """Apply to a pipeline, until `remove()` or the end of the `with` block.

        Args:
            pipe: a pipeline of diffusers, classic or modular, with a denoiser whose blocks are known. Where it makes
                no pass that is a variant of another, nothing changes, and `stats` says so.

        Returns:
            A handle: context manager, `.remove()`, `.stats`.

        Raises:
            SkipError: for something that is no pipeline, one without a denoiser, one that has prefix reuse or
                skipguide's own guidance already, or one with a guider of diffusers that does not work on its denoiser.
            UnknownBlockError: if the denoiser's blocks are not described.
        """
        refuse_no_pipeline(pipe)
        names = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
        if not names:
            raise SkipError(f"expected a pipeline with a {' or '.join(DENOISERS)}; got a {type(pipe).__name__}")
        for name in ("guider", "guider_2", "audio_guider"):
            if any(cls.__name__ == "SkipGuider" for cls in type(getattr(pipe, name, None)).__mro__):
                raise SkipError(f"pipe.{name} is a SkipGuider, which shares the beginnings of its passes by itself")
        for name in names:
            refuse_broken(pipe, find_blocks(getattr(pipe, name)))
            gate = gate_of(getattr(pipe, name))
            if any(other.pipe is pipe for other in everywhere_at(gate, ReuseListener)):
                raise SkipError(f"PrefixReuse is applied to pipe.{name} already: call remove() on the earlier handle")
            if everywhere_at(gate, ReuseListener):
                raise SkipError(f"PrefixReuse is applied to pipe.{name} through another pipeline: remove() it first")
            if everywhere_at(gate, Interceptor):
                raise SkipError(
                    f"SpatiotemporalSkipGuidance is applied to pipe.{name}, and shares the beginnings of its own "
                    f"passes already: remove() it first, or leave PrefixReuse out"
                )
        applied = AppliedReuse(self, pipe, names)
        applied._install()
        return applied


class AppliedReuse(Shown, PipelineHandle):
    """Prefix reuse in force on a pipeline. Leave the `with` block or call `remove()` to end it.

    Attributes:
        settings: what was applied.
        stats: passes and blocks so far, what was reused, and what was not and why.
    """

    _name = "this PrefixReuse"

    def __init__(self, settings: PrefixReuse, pipe: Any, denoisers: list[str]) -> None:
        self.settings = settings
        self.stats = ReuseStats()
        self._hold(pipe, [ReuseListener(pipe, name, KINDS, self.stats) for name in denoisers])

    def _heading(self) -> str:
        return f"Prefix reuse ({self._where}): {self.stats._heading()}"

    def _rows(self) -> list[Row]:
        return self.stats._rows()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End it; a block in which nothing was reused, or a pass changed nothing from the start, is logged."""
        self.remove()
        if kind is None and any(IDLE_STG in each for each in (*self.stats.reused, *self.stats.not_reused)):
            logger.warning(
                "the pipeline makes a pass for its STG, and diffusers perturbs nothing in it, as the transformer's "
                "config has perturbed_attn=False: its prediction is the conditional one again. Call the pipeline with "
                "stg_scale=0.0, audio_stg_scale=0.0, or guide it by SpatiotemporalSkipGuidance"
            )
        if kind is None and not self.stats.reused:
            logger.warning("PrefixReuse was applied, and nothing was reused: %s", self.stats)
