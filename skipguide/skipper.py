"""Skip: a plan on a model, active inside a `with` block, without a trace after it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import Act, Call, Frame
from skipguide.arguments import first_tensor
from skipguide.attention import JointValuesPass, ValuesPass
from skipguide.blocks import Block, BlockMap, find_blocks
from skipguide.errors import LostGateError, SkipError
from skipguide.gate import Gate, gate_of, install_all
from skipguide.hosts.group_offload import SharedGroups
from skipguide.interventions import (
    AddNothing,
    Capture,
    ForOthers,
    Inject,
    Keep,
    OnRows,
    PassOn,
    PassThrough,
    Replay,
    WithoutKeys,
)
from skipguide.plan import SkipPlan
from skipguide.prefix import Prefix
from skipguide.schedule import Schedule
from skipguide.stats import Stats


class Skipper:
    """Leaves out what a plan names while the `with` block runs.

    Inside the block, `model(...)`, `model.generate(...)` or a pipeline around the model run without the named layers,
    in this thread or task only. Nested blocks add up. On leaving, also by an exception, the model is as it was.

    Args:
        model: a model whose blocks are known (`find_blocks`).
        plan: what to leave out; an empty plan changes nothing, to the bit.
        capture: a `Prefix` to fill with the streams that enter its layer, or several.
        resume: a filled `Prefix` to start from; the blocks before its layer do not run.
        share: block -> for each row of the batch the row whose result it has; a block runs for the rows that are
            their own source only.

    Attributes:
        stats: the ledger (`.calls`, `.skipped_fraction`).

    Raises:
        SkipError: at once, for a layer, part or stack that the model does not have.
        LostGateError: when somebody replaced a gate, so that the skip would silently not happen.

    Example:
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8)
        >>> with Skipper(model, SkipPlan([1], part="attn")) as skipper:
        ...     _ = model(torch.randn(1, 8, 4), torch.randn(1, 3, 8), torch.tensor([500.0]), None, 2, 2, 2)
        >>> skipper.stats.calls["transformer_blocks.0"], skipper.stats.skips
        (1, {'transformer_blocks.1.attn1': 1})
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SkipPlan,
        *,
        capture: Prefix | Sequence[Prefix] | None = None,
        resume: Prefix | None = None,
        share: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        if not isinstance(plan, SkipPlan):
            raise SkipError(f"expected a SkipPlan, such as SkipPlan([3, 5]); got {type(plan).__name__}")
        self.model = model
        self.plan = plan
        self.map = find_blocks(model)
        self.stats = Stats()
        root = gate_of(self.map.model)
        self.frame = Frame(root, self.stats)
        sites = _Sites(self.map, self.stats)
        for prefix in (capture,) if isinstance(capture, Prefix) else capture or ():
            sites.capture(prefix)
        if resume is not None:
            sites.resume(resume, plan)
        for layer, rows in (share or {}).items():
            block = self.map.select([layer])[0]
            sites.add(block.module, block.name, ForOthers(block, rows))
        for term in plan.terms:
            sites.skip(term)
        self._windows = sites.windows
        self._progress: float | None = None
        # a wrapper of the model has a gate too: drivers listen there
        outer = [] if model is self.map.model else [gate_of(model)]
        self.gates: list[Gate] = [*outer, root, *(gate_of(module) for module in sites.modules.values())]
        # a module that only serves a skipped sublayer is no entry of the ledger
        counted = {name: module for name, module in sites.modules.items() if name not in sites.helpers}
        self.frame.names.update({id(module): name for name, module in counted.items()})
        self.frame.acts.update(sites.acts)
        self.frame.acts[root.key] = _Entry(self.map.model, sites.modules)

    def __del__(self) -> None:
        """A Skipper that was dropped inside its `with` block ends its plan and lets go of the model."""
        if (frame := self.__dict__.get("frame")) is not None:
            frame.close()

    def __enter__(self) -> Skipper:
        """Install the gates and activate the plan in this thread or task."""
        self.install()
        self.frame.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        """Deactivate the plan and remove what nobody else uses."""
        self.frame.leave()
        self.remove()

    def install(self) -> None:
        """Put the gates in place without activating the plan; `running()` activates it for one pass."""
        install_all(self.gates, inside=self.frame.root)

    def remove(self) -> None:
        """Take the gates away that `install` put in place."""
        for gate in reversed(self.gates):
            gate.remove()

    @contextmanager
    def running(self) -> Iterator[Skipper]:
        """Activate the plan for passes inside this block; the gates must be installed."""
        self.frame.enter()
        try:
            yield self
        finally:
            self.frame.leave()

    @property
    def progress(self) -> float | None:
        """Fraction of the sampling steps done, 0 to 1; needed by plans with a window.

        Raises:
            SkipError: on setting, for anything that is no such fraction.
        """
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        try:
            value = float(value)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:  # NaN neither: no window would contain it
            raise SkipError("progress is the fraction of the steps done, 0 to 1: set it to step / steps")
        self._progress = value
        for window in self._windows:
            window.open = window.schedule.contains(value)


class _Sites:
    """Collects the acts of a plan, module by module."""

    def __init__(self, blocks: BlockMap, stats: Stats) -> None:
        self.blocks = blocks
        self.stats = stats
        self.acts: dict[int, Act] = {}
        self.windows: list[_InWindow] = []
        # every block has a gate, for the ledger and to notice a lost one
        self.modules: dict[str, nn.Module] = {block.name: block.module for block in blocks}
        self.helpers: set[str] = set()  # of the modules, those that only pass on: not a part of the ledger

    def add(self, module: nn.Module, name: str, act: Act) -> None:
        key = id(module)
        self.modules[name] = module
        self.acts[key] = _Both(self.acts[key], act) if key in self.acts else act

    def capture(self, prefix: Prefix) -> None:
        block = self.blocks.select([prefix.layer])[0]
        for before in self.blocks.blocks[: block.index]:
            if before.spec.kept:
                self.add(before.module, before.name, Keep(before, prefix))
        self.add(block.module, block.name, Capture(block, prefix))

    def resume(self, prefix: Prefix, plan: SkipPlan) -> None:
        block = self.blocks.select([prefix.layer])[0]
        for term in plan.terms:
            for earlier in self.blocks.select(term.layers, term.part, term.stack):
                if earlier.index < block.index:
                    raise SkipError(
                        f"the plan skips block {earlier.index}, which does not run when resuming from block "
                        f"{block.index}"
                    )
        for before in self.blocks.blocks[: block.index]:
            act: Act = Replay(before, prefix) if before.spec.kept else PassThrough(before, counted=False)
            if before.spec.cached:
                refusal = "the blocks before the one to resume from do not run, and make no keys"
                act = WithoutKeys(act, before.module, before.index, len(self.blocks), refusal)
            self.add(before.module, before.name, act)
        self.add(block.module, block.name, Inject(block, prefix))

    def skip(self, term: SkipPlan) -> None:
        for block in self.blocks.select(term.layers, term.part, term.stack):
            helpers = block.helper_modules(term.part)
            self.helpers |= {name for name, _ in helpers}
            for name, module, act in [*_acts_for(block, term.part), *((*found, PassOn()) for found in helpers)]:
                if block.spec.cached and not isinstance(act, PassOn):
                    act = self._without_keys(block, module, act, term)
                if term.rows is not None:
                    act = OnRows(act, term.rows, block, module)
                if (term.start, term.stop) != (0.0, 1.0):
                    act = _InWindow(act, term.schedule)
                    self.windows.append(act)
                self.add(module, name, act)
            runs = [s.calls for part in ("attn", "cross_attn", "mlp") for _, _, s in block.sublayers(part)]
            self.stats.weights |= {name: 1 / sum(runs) for name, _, _ in block.sublayers(term.part)}

    def _without_keys(self, block: Block, module: nn.Module, act: Act, term: SkipPlan) -> Act:
        """The act, for the attention of a language model: it minds the KV cache."""
        if term.part == "mlp" or not (attention := block.sublayers("attn")):
            return act
        name, found, sublayer = attention[0]
        if sublayer.shares and getattr(found, sublayer.shares, False):
            raise SkipError(f"{name} cannot be left out: later blocks read its keys and values (shared KV cache)")
        index = getattr(found, "layer_idx", None)
        refusal = "" if term.rows is None else "a plan for some batch rows cannot leave keys out of the others"
        return WithoutKeys(act, module, block.index if index is None else index, len(self.blocks), refusal)


def _acts_for(block: Block, part: str) -> list[tuple[str, nn.Module, Act]]:
    if part == "block":
        return [(block.name, block.module, PassThrough(block))]
    if part == "attn_identity" and block.spec.joint:
        return [(block.name, block.module, JointValuesPass(block))]
    sublayers = block.sublayers(part)
    if part == "attn_identity":
        return [(name, module, ValuesPass(name, module)) for name, module, _ in sublayers]
    return [(name, module, AddNothing(name, module, sublayer)) for name, module, sublayer in sublayers]


class _Both:
    """Two acts at one module, the first around the second."""

    __slots__ = ("inner", "outer")

    def __init__(self, outer: Act, inner: Act) -> None:
        self.outer = outer
        self.inner = inner

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def inner(*a: Any, **k: Any) -> Any:
            return self.inner(frame, call, a, k)

        return self.outer(frame, inner, args, kwargs)


class _InWindow:
    """An act in a window of the steps only."""

    __slots__ = ("act", "open", "schedule")

    def __init__(self, act: Act, schedule: Schedule) -> None:
        self.act = act
        self.schedule = schedule
        # decided when the progress is set: a compiled pass depends on this flag alone, not on the step's number
        self.open: bool | None = None

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.open is None:
            raise SkipError(
                f"the plan holds for the steps from {self.schedule.start} to {self.schedule.stop}, but nobody said "
                f"which step this is: set skipper.progress = step / steps before each pass"
            )
        if self.open:
            return self.act(frame, call, args, kwargs)
        return call(*args, **kwargs)


class _Entry:
    """At the model itself: notes the batch, counts the pass, and notices afterwards when a gate was lost."""

    __slots__ = ("gates", "model", "modules")

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model = model
        self.modules = modules
        self.gates = {name: gate_of(module) for name, module in modules.items()}

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            frame.batch = batch_size(args, kwargs)
            return call(*args, **kwargs)
        with frame.passing() as now:
            now.batch = batch_size(args, kwargs)
            now.stats.passes += 1
            for gate in self.gates.values():
                gate.settle()
            now.groups = SharedGroups.among(self.modules.values())
            try:
                out = call(*args, **kwargs)
            finally:
                if now.groups is not None:
                    now.groups.release()
                    now.groups = None
            self._check(now)
        return out

    def _check(self, frame: Frame) -> None:
        """Notice that a module was exchanged, or that its gate was lost: the skip did not happen."""
        for name, gate in self.gates.items():
            if (now := self.model.get_submodule(name)) is not self.modules[name]:
                raise LostGateError(
                    f"{name} is now another module ({type(now).__module__}.{type(now).__qualname__}) than the one "
                    f"the plan was applied to: apply plans after adapters are added, and remove them before"
                )
            if gate.key not in frame.seen and not gate.reachable():
                raise gate.lost(name)


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch size of a model call: rows of `hidden_states`, or of the first tensor there is."""
    hidden = kwargs.get("hidden_states")
    return (hidden if isinstance(hidden, Tensor) else first_tensor(args, kwargs)).shape[0]


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
    return Skipper(model, SkipPlan(), capture=prefix)


def resume(model: nn.Module, prefix: Prefix) -> AbstractContextManager[Skipper]:
    """Run `model` from the captured point on: blocks before `prefix.layer` do not run.

    The result is bit-identical to the full pass at the same batch, and equal to rounding for other batch sizes.

    Raises:
        SkipError: if nothing was captured yet.
    """
    if not prefix.streams:
        raise prefix.unfilled()
    return Skipper(model, SkipPlan(), resume=prefix)
