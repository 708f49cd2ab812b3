"""Runs one model under masks, by a plan once its operations are known."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skipguide.active import Call, active_plans
from skipguide.errors import SkipError
from skipguide.hosts.torch_modes import call_in
from skipguide.shown import Row, Shown
from skipguide.vision.layer_masking.baselines import BASELINES, PixelScale, painted, pixel_scale
from skipguide.vision.layer_masking.masked_pass import ChangedError, MaskedPass
from skipguide.vision.layer_masking.masking_mode import MaskingMode
from skipguide.vision.layer_masking.plan import Plan, Trace, make_plan
from skipguide.vision.layer_masking.rules.arguments import pair_of
from skipguide.vision.layer_masking.tokens import run_tokens, tokens_of
from skipguide.vision.recording import is_exported, is_traced

logger = logging.getLogger(__name__)

# A trace does not depend on the masks, so it is kept for as long as its model lives.
_TRACES: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Trace]] = WeakKeyDictionary()


def _compiles(module: nn.Module) -> bool:
    """Whether torch.compile stands on a part of a model: a graph would pass by the rules of a masked pass."""
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return True
    return any(_compiles(child) for child in module._modules.values() if child is not None)


@dataclass(repr=False)
class MaskStats(Shown):
    """What the passes of an applied mask ran.

    Attributes:
        calls: passes of the model.
        rows: images in them.
        planned: passes that ran by a plan: all, but for models whose operations depend on the data.
        plain: passes without anything hidden, which are the model's own.
        fill_rounds: rounds of neighbour fill, over all operations and passes.
        computed: positions that convolutions computed, of those of the plain model, in the last pass.
        visible: fraction of the pixels that is visible, in the last pass.
    """

    calls: int = 0
    rows: int = 0
    planned: int = 0
    plain: int = 0
    fill_rounds: int = 0
    computed: float = 1.0
    visible: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))

    def _rows(self) -> list[Row]:
        return [tuple(self.to_dict()), tuple(self.to_dict().values())]


class Masker:
    """Runs one model under masks; shared by the applied mask and by `masked_forward`."""

    def __init__(self, model: nn.Module, fill: str, crop: bool, scale: PixelScale | None = None) -> None:
        self.model, self.fill, self.crop = model, fill, crop
        self.scale = scale
        self.stats = MaskStats()
        self.largest = 0  # bytes of the largest activation of one row, once a pass was traced
        self._plan: tuple[tuple[object, ...], Tensor, Plan] | None = None
        self._known: frozenset[int] | None = None

    def __call__(self, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The model's answer to `images` `[N, 3, H, W]` under `keep` `[N or 1, 1, H, W]`."""
        if is_traced() or is_exported():
            raise SkipError(
                "a masked pass is planned by the values of its mask, which a trace or export would fix: record the "
                "plain model, and mask where torch runs"
            )
        stats = self.stats
        stats.calls += 1
        stats.rows += images.shape[0]
        # Both in one transfer, so that a GPU is waited for once. The share alone does not do: it rounds to 1 where one
        # pixel of very many is hidden.
        stats.visible, whole = torch.stack([keep.float().mean(), keep.all().float()]).tolist()
        stats.computed = 1.0
        if whole:
            stats.plain += 1
            return call(images, *args, **kwargs)
        if self.fill in BASELINES:
            self.scale = self.scale or pixel_scale(self.model)
            return call(painted(images, keep, self.fill, self.scale), *args, **kwargs)
        tokens = tokens_of(self.model)
        with torch.compiler.set_stance("force_eager") if _compiles(self.model) else nullcontext():
            if tokens is not None:
                return run_tokens(tokens, call, keep, images, args, kwargs, self.fill)
            return self._layers(call, keep, images, args, kwargs)

    def _layers(self, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        """By a plan, the first time too: a pass without one computes whole activations, which round otherwise."""
        traces = _TRACES.setdefault(self.model, {})
        key = (tuple(images.shape[-2:]), len(args), tuple(kwargs), self.model.training)
        # One image shows what the model does; if the batch shows something else, all of it is traced. Not so under a
        # plan around this model, which counts what runs and whose gates keep a state from block to block: nothing may
        # run a second time inside its pass, so the masks are worked out on the way.
        for one in () if active_plans() else (True, False):
            trace = traces.get(key)
            if trace is None:
                trace = traces[key] = self._trace(call, keep, images, args, kwargs, one)
            if trace.dynamic:
                break
            try:
                return self._planned(self._plan_for(trace, keep, images), call, images, args, kwargs)
            except ChangedError:
                logger.info("%s did something else than before: tracing it again", type(self.model).__name__)
                traces.pop(key, None)
                self._plan = None
                if not one:
                    traces[key] = replace(trace, dynamic="its operations differ from pass to pass")
        masked, output = self._recorded(call, keep, images, args, kwargs)
        self.stats.fill_rounds += masked.rounds
        return output

    def _planned(self, plan: Plan, call: Call, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        masked = MaskedPass(plan.masks[0], self.fill, plan, plan.trace.widest)  # type: ignore[arg-type]
        output = self._watched(MaskingMode(masked), call, images, args, kwargs)
        self.stats.planned += 1
        self.stats.fill_rounds += masked.rounds
        self.stats.computed = plan.share
        return output

    def _recorded(
        self, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[MaskedPass, Any]:
        """A pass that works the masks out on the way, and its answer."""
        masked = MaskedPass(keep, self.fill, None, self._widest())
        output = self._watched(MaskingMode(masked, self._parameters()), call, images, args, kwargs)
        self.largest = max(self.largest, masked.largest)
        if not any(op.rounds or op.name == "conv2d" for op in masked.ops):
            raise SkipError(f"{type(self.model).__name__} ran no convolution on the images: nothing was masked")
        return masked, output

    def _trace(self, call: Call, keep: Tensor, images: Tensor, args: tuple[Any, ...], kwargs: Any, one: bool) -> Trace:
        """What the model does, from a pass that is no call: it draws no random numbers and keeps no graph.

        `one` takes the first image alone, where nothing else is given that may have rows.
        """
        with torch.no_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
            if one and len(images) > 1 and not args and not kwargs:
                try:
                    return self._recorded(call, keep[:1], images[:1], args, kwargs)[0].trace()
                except Exception as error:  # written for one size of batch; what is wrong with all of it comes below
                    logger.info("%s takes no single image (%s)", type(self.model).__name__, error)
            return self._recorded(call, keep, images, args, kwargs)[0].trace()

    def _watched(self, mode: MaskingMode, call: Call, images: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        entered = mode.masked.enter(images)
        return mode.masked.leave(call_in(mode, call, entered, *args, **kwargs))

    def _plan_for(self, trace: Trace, keep: Tensor, images: Tensor) -> Plan:
        key = (id(trace), images.dtype, self.fill, self.crop)
        # compared by value: a mask may have been changed in place, and an equal one may be another tensor
        if self._plan is not None and self._plan[0] == key and torch.equal(self._plan[1], keep):
            return self._plan[2]
        with torch.no_grad():
            mine = keep.clone()
            plan = make_plan(trace, mine, images.dtype, self.fill, self.crop)
        self._plan = (key, mine, plan)
        return plan

    def _widest(self) -> int:
        """Positions from the first to the last that the widest convolution reads."""
        spans = [1]
        for module in self.model.modules():
            apart = pair_of(module.dilation) if isinstance(getattr(module, "dilation", None), (int, tuple)) else (1, 1)
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))  # a blur's filter is a buffer
            spans += [(k - 1) * d + 1 for t in own if t.ndim == 4 for k, d in zip(t.shape[-2:], apart, strict=True)]
        return max(spans)

    def _parameters(self) -> frozenset[int]:
        tensors = (*self.model.parameters(), *self.model.buffers())
        return frozenset(id(t) for t in tensors)
