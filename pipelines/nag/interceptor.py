"""NagInterceptor: gives the denoiser's guided passes the negative prompt, found by a probe that runs no block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, end_everywhere, hold_everywhere
from skipguide.arguments import Arguments, batch_size
from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.gate import Installation, gate_of
from skipguide.hosts.cache_contexts import ContextNames
from skipguide.hosts.compilation import untraced
from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.nag.attention import PASS, AtAttention, AtBlock, AtProjection, NagPass, projection_of
from skipguide.pipelines.nag.settings import NagSettings, NagStats
from skipguide.pipelines.registry.described import PipelineSpec, described_loop
from skipguide.pipelines.sampling.caches import refuse_caches
from skipguide.pipelines.sampling.call_stack import is_called_by
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.plan import SkipPlan
from skipguide.schedule import Schedule
from skipguide.skipper import Skipper


class NagInterceptor:
    """Normalized attention guidance at one denoiser of one pipeline."""

    def __init__(
        self,
        settings: NagSettings,
        pipe: Any,
        spec: PipelineSpec,
        denoiser: str,
        negative: Mapping[str, Tensor],
        state: PipelineCall,
        stats: NagStats,
    ) -> None:
        self.settings = settings
        self.pipe = pipe
        self.spec = spec
        self.denoiser = denoiser
        self.model: nn.Module = getattr(pipe, denoiser)
        self.negative = dict(negative)
        self.state = state
        self.stats = stats
        self.loop = described_loop(pipe)
        self.window = Schedule(settings.start, settings.stop)
        self.arguments = Arguments(unwrap(self.model))
        self.arguments.expect(self.model, f"pipe.{denoiser}", tuple(self.negative))
        self._met: Any = None  # timesteps of the pipeline call whose cache was checked
        self.handle: Any = None  # what the user was given: it can be had back from here
        self.map = find_blocks(self.model)
        self.placed: list[tuple[nn.Module, Any]] = []
        found = [(block, each) for block in self.map for each in block.sublayers("cross_attn")]
        if not found:
            raise SkipError(
                f"{type(self.model).__name__} has no attention to the text apart from the image's own: in its joint "
                f"attention the text changes from block to block, which this does not follow: take a pipeline with "
                f"CFG, or another model"
            )
        if settings.layers is not None:
            chosen = {block.index for block in self.map.select(settings.layers, "cross_attn")}
            found = [each for each in found if each[0].index in chosen]
        for block in self.map:
            self.placed.append((block.module, AtBlock(block)))
        for block, (name, module, _) in found:
            projection = projection_of(name, module)
            at = AtProjection(settings.scale, settings.tau, settings.alpha, projection)
            self.placed += [(module, AtAttention(name, module, block.spec.shared)), (projection, at)]
        self.probe = Skipper(self.model, SkipPlan(range(len(self.map))))
        self._installation = Installation([gate_of(self.model), *(gate_of(module) for module, _ in self.placed)])
        self._untraced = untraced(NagInterceptor._handle)

    def install(self) -> None:
        """Put the gates in place and follow the names of cache contexts."""
        self.probe.install()
        self._installation.install()
        for module, intervention in self.placed:
            hold_everywhere(gate_of(module), intervention)
        hold_everywhere(gate_of(self.model), self)
        ContextNames.listen(self.model, self)

    def remove(self) -> None:
        """Take everything away again."""
        end_everywhere(gate_of(self.model), self)
        for module, intervention in self.placed:
            end_everywhere(gate_of(module), intervention)
        ContextNames.leave(self.model, self)
        self._installation.remove()
        self.probe.remove()
        self.state.release()

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser by the pipeline."""
        return self._untraced(self, call, args, kwargs)

    def _handle(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_called_by(self.pipe, self.model, self.loop):
            return call(*args, **kwargs)
        self.state.refuse_other_threads(self.pipe)
        if self.spec.is_passive(kwargs):
            return call(*args, **kwargs)
        branch = self.state.enter(self.pipe, self.spec, ContextNames.name(self.model))
        if self.state.timesteps is not self._met:  # once a run: it looks through the whole model
            refuse_caches(self.model, "normalized attention guidance", "it answers in place of attention", self.pipe)
            self._met = self.state.timesteps
        if branch == "uncond" or not self.window.active(self.state.step, self.state.steps):
            return call(*args, **kwargs)
        batch = batch_size(args, kwargs)
        half = slice(0, batch // 2) if self.spec.cond_first else slice(batch // 2, batch)
        now = NagPass(batch, half if branch == "both" else slice(0, batch))
        self._find_negative(now, call, args, kwargs)
        token = PASS.set(now)
        try:
            out = call(*args, **kwargs)
        finally:
            PASS.reset(token)
        if not now.guided:
            raise SkipError(
                f"no attention of {type(self.model).__name__} was guided: its blocks did not run, or run inside a "
                f"graph that holds the whole model (compile them one by one: model.compile_repeated_blocks())"
            )
        self.stats.passes += 1
        self.stats.attentions += now.guided
        return out

    def _find_negative(self, now: NagPass, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the blocks are given for the negative prompt: a pass up to the first of them."""
        spec, clips = self.map.spec, now.rows.stop - now.rows.start
        mine = self.arguments.rows(
            args, kwargs, now.rows, now.batch, spec.shared, spec.listed, spec.folded, 0, spec.layered
        )
        values: dict[str, Any] = {}
        for name, value in self.negative.items():
            given = self.arguments.get(name, *mine)
            if not isinstance(given, Tensor):
                raise SkipError(
                    f"the pipeline does not give its denoiser {name!r}, so the negative prompt has no place there; it "
                    f"gives {', '.join(n for n in self.arguments.names if self.arguments.get(n, *mine) is not None)}"
                )
            rows = value.expand(clips, *value.shape[1:]) if len(value) == 1 else value
            if len(rows) != clips:
                raise SkipError(f"expected one negative {name}, or one for each of {clips} clips; got {len(rows)}")
            values[name] = rows.to(given.device, given.dtype)
        probing = NagPass(clips, slice(0, clips), probing=True)
        token = PASS.set(probing)
        try:
            with self.probe.running(), torch.no_grad():
                put = self.arguments.put(values, *mine)
                call(*put[0], **put[1])
        finally:
            PASS.reset(token)
        now.negative = probing.negative
