"""Watch: the residual stream before and after every sublayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, Intervention
from skipguide.arguments import Arguments
from skipguide.errors import SkipError
from skipguide.gate import Installation, gate_of
from skipguide.hosts.kv_cache import empty
from skipguide.llm.find import sublayer_map
from skipguide.llm.passes import Pass, PassReader, decodes
from skipguide.llm.sublayers import Part
from skipguide.model_pass import ModelPass
from skipguide.shown import Shown
from skipguide.stats import Stats

OnSublayer = Callable[[int, Part, Tensor, Tensor], None]


class Watch(Shown):
    """Calls back with the residual stream around every sublayer; a context manager.

    In serial layers x -> a = x + attn(norm(x)) -> m = a + mlp(norm(a)). In parallel layers, where both sublayers read
    x, the sums are taken in the same order: a = x + attn(norm(x)) is computed for the watcher, and m is what the
    layer returns. The tensors are the model's own, `[B, T, D]`: do not write into them, and do not wait for them.

    A layer that a plan leaves out whole is not reported. A sublayer that a plan leaves out alone is reported: the
    stream after it is then `h`, or `h * scale`.

    Attributes:
        now: the running `Pass` (its `mask` says which tokens are padding), or None between passes.
    """

    def __init__(
        self, model: nn.Module, on_sublayer: OnSublayer, on_pass: Callable[[Pass], None] | None = None
    ) -> None:
        self.map = sublayer_map(model)
        if not self.map.watchable:
            raise SkipError(
                f"the layers of {type(self.map.model).__name__} have no single residual stream to watch "
                f"({self.map.layout.note})"
            )
        self.on_sublayer = on_sublayer
        self.on_pass = on_pass
        self.now: Pass | None = None
        self._root = gate_of(self.map.decoder)
        self._active = ActivePlan(self._root, Stats())
        self._installation = Installation([self._root], inside=self._root)
        self._active.interventions[self._root.key] = _WatchPass(self)
        for i, layer in enumerate(self.map.layers):
            ends = _LayerEnds(self, i)
            self._add(layer, ends)
            if self.map.layout.between:
                middle = layer.get_submodule(self.map.layout.between)
                self._add(middle, _BetweenSublayers(ends))
            else:
                self._add(self.map.attn(i), _AfterAttention(ends))

    def _heading(self) -> str:
        state = "watching" if self._installation in self._root.users else "not entered"
        return f"Watch on {type(self.map.model).__name__} ({state}), {self.map.num_layers} layers"

    def _add(self, module: nn.Module, intervention: Intervention) -> None:
        gate = gate_of(module)
        self._installation.gates.append(gate)
        self._active.interventions[gate.key] = intervention

    def __enter__(self) -> Watch:
        """Install the gates and watch in this thread or task."""
        try:
            self._installation.install()
            self._active.enter()
            return self
        except BaseException:
            self.remove()
            raise

    def __exit__(self, *exc: object) -> None:
        """Stop, and take the gates away."""
        try:
            self.remove()
        except BaseException:  # Ctrl-C: what was broken off is done again
            self.remove()
            raise

    def remove(self) -> None:
        """Stop watching; a second call does nothing."""
        self._active.leave_all()
        self._installation.remove()


def watch(model: nn.Module, on_sublayer: OnSublayer, on_pass: Callable[[Pass], None] | None = None) -> Watch:
    """Watch the residual stream of a causal language model.

    Args:
        model: a model of a known family.
        on_sublayer: called with layer, `"attn"` or `"mlp"`, and the stream before and after, each `[B, T, D]`.
        on_pass: called with the `Pass` before each forward pass.

    Raises:
        SkipError: for a model that is not known, or has recurrent layers.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> seen = []
        >>> with watch(model, lambda layer, part, before, after: seen.append((layer, part))):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> seen
        [(0, 'attn'), (0, 'mlp'), (1, 'attn'), (1, 'mlp')]
    """
    return Watch(model, on_sublayer, on_pass)


class _WatchPass(ModelPass):
    """At the decoder: what the running pass is."""

    __slots__ = ("reader", "watch")

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.reader = PassReader(watch.map.decoder)

    @property
    def handle(self) -> Watch:
        """What the user holds."""
        return self.watch

    def open(self, plan: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Describe the pass, and call `on_pass`."""
        watch, reader = self.watch, self.reader
        cache = reader.cache(args, kwargs)
        held = cache is not None and not empty(cache)
        decode = held and bool(decodes(reader.tokens(args, kwargs), decoded=True))
        watch.now = reader.describe(args, kwargs, cache, decode=decode, fresh=not held)
        plan.batch = watch.now.batch
        if watch.on_pass is not None:
            watch.on_pass(watch.now)

    def end(self, plan: ActivePlan) -> None:
        """No pass is running."""
        self.watch.now = None


class _LayerEnds:
    """The ends of a layer; what lies between them is filled in by the other interventions."""

    def __init__(self, watch: Watch, layer: int) -> None:
        self.watch = watch
        self.layer = layer
        self.arguments = Arguments(watch.map.layers[layer])
        self.before: Tensor | None = None
        self.between: Tensor | None = None

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before: Tensor = self.arguments.get("hidden_states", args, kwargs)
        self.before, self.between = before, None
        try:
            out = call(*args, **kwargs)
            if (between := self._between()) is not None:
                report = self.watch.on_sublayer
                between = between.view(before.shape)  # OPT flattens the rows
                report(self.layer, "attn", before, between)
                report(self.layer, "mlp", between, out[0] if isinstance(out, tuple) else out)
        finally:
            self.before = self.between = None
        return out

    def _between(self) -> Tensor | None:
        """What the interventions inside the layer have left here."""
        return self.between


class _BetweenSublayers:
    def __init__(self, layer: _LayerEnds) -> None:
        self.layer = layer

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.layer.between = args[0] if args else next(iter(kwargs.values()))
        return call(*args, **kwargs)


class _AfterAttention:
    def __init__(self, layer: _LayerEnds) -> None:
        self.layer = layer

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = call(*args, **kwargs)
        added = out[0] if isinstance(out, tuple) else out
        before = self.layer.before
        self.layer.between = None if before is None else torch.add(before, added)
        return out
