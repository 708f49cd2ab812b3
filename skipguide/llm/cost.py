"""Cost: how long every sublayer of a language model takes, on this machine, at this context length.

At 4,096 tokens an MLP of an 8-billion-parameter model costs three times an attention, at 131,072 a third: how much a
left-out sublayer saves has to be measured where it is used.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.config import JsonConfig, as_numbers, as_wholes, is_one_of, normalize_fields
from skipguide.errors import SkipError
from skipguide.hosts.accelerate import execution_device
from skipguide.hosts.kv_cache import as_argument, cache_of
from skipguide.llm.elsewhere import refuse_skipping
from skipguide.llm.find import sublayer_map
from skipguide.llm.passes import evaluating

Timestamp = float | torch.cuda.Event


@dataclass(frozen=True)
class SublayerCosts(JsonConfig):
    """Milliseconds of every sublayer in one forward pass, the norm before it included.

    Attributes:
        attn_ms: per layer.
        mlp_ms: per layer.
        rest_ms: everything else: embedding, residual sums, last norm and head.
        tokens: prompt length for `"prefill"`, context length for `"decode"`.
        phase: `"prefill"` is one pass over the prompt, `"decode"` one token with a cache.
        device: where it was measured.

    Raises:
        SkipError: for lists of different lengths, or times that are not above 0.

    Example:
        >>> costs = SublayerCosts((1.0, 1.0), (3.0, 3.0), 2.0, tokens=512)
        >>> round(costs.share_for(speedup=1.25), 6)  # a fifth of 10 ms, as a share of the sublayers' 8 ms
        0.25
    """

    attn_ms: tuple[float, ...]
    mlp_ms: tuple[float, ...]
    rest_ms: float
    tokens: int
    phase: str = "prefill"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what is no measurement."""
        for name in ("attn_ms", "mlp_ms"):
            values = as_numbers(name, getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or len(values) != len(self.attn_ms) or not all(v > 0 for v in values):
                raise SkipError(f"expected a time above 0 ms per layer in {name}; got {values}")
        normalize_fields(self, {"tokens": 1}, {"rest_ms": 0}, texts=("device",))
        if not is_one_of(self.phase, ("prefill", "decode")):
            raise SkipError(f'expected phase "prefill" or "decode"; got {self.phase!r}')

    @property
    def sublayers_ms(self) -> float:
        """All sublayers together."""
        return sum(self.attn_ms) + sum(self.mlp_ms)

    @property
    def total_ms(self) -> float:
        """The whole pass."""
        return self.sublayers_ms + self.rest_ms

    def share_for(self, speedup: float) -> float:
        """The share of the sublayers' time to leave out for a speed-up of the whole pass.

        Raises:
            SkipError: for a speed-up that leaving out all sublayers would not reach.
        """
        limit = self.total_ms / self.rest_ms if self.rest_ms > 0 else math.inf
        if not 1 <= speedup < limit:
            raise SkipError(
                f"expected a speed-up from 1 to below {limit:.2f}x, where no sublayer would be left at {self.tokens} "
                f"tokens; got {speedup!r}"
            )
        return (1 - 1 / speedup) * self.total_ms / self.sublayers_ms


def measure_costs(
    model: nn.Module, tokens: int, phase: str = "prefill", repeats: int = 5, batch: int = 1
) -> SublayerCosts:
    """Time every sublayer: the least of all repeats, then the median over the layers of the same shape.

    Run it without a skipping plan on the model, on the machine and at the context length that it will be used at.

    Args:
        model: a causal language model of a known family.
        tokens: prompt length, or context length in decoding.
        phase: `"prefill"` or `"decode"`.
        repeats: passes that are timed, after one that is not.
        batch: rows.

    Raises:
        SkipError: for a wrong argument, or a plan that leaves sublayers of the model out.
        UnknownBlockError: if the model's layers are not described.
    """
    if phase not in ("prefill", "decode"):
        raise SkipError(f'expected phase "prefill" or "decode"; got {phase!r}')
    tokens, repeats, batch = as_wholes(tokens=tokens, repeats=repeats, batch=batch)
    found = sublayer_map(model)
    refuse_skipping(found)
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    device = execution_device(model)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    clocks: dict[tuple[int, str], _Clock] = {(site.layer, site.part): _Clock(device) for site in found.sites}
    totals: list[float] = []
    per_pass: dict[tuple[int, str], list[float]] = defaultdict(list)
    with evaluating(model), ExitStack() as stack:
        for site in found.sites:
            for module in (site.module, *site.helper_modules):
                stack.enter_context(clocks[site.layer, site.part].on(module))
        for run in _passes(model, ids, phase, repeats + 1):
            clock = _Clock(device)
            clock.start()
            run()
            clock.stop()
            totals.append(clock.read())
            for key, sublayer in clocks.items():
                per_pass[key].append(sublayer.read())
    # the least of all repeats: whatever else the machine does only ever adds
    times = {key: min(values[1:]) for key, values in per_pass.items()}
    rest = min(total - sum(values[n] for values in per_pass.values()) for n, total in enumerate(totals) if n)
    alike: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    shape_of = {}
    for site in found.sites:
        window = getattr(site.module, "sliding_window", None)
        shape = (site.part, *(tuple(p.shape) for p in site.module.parameters()), window)
        shape_of[site.layer, site.part] = shape
        alike[shape].append(times[site.layer, site.part])
    smooth = {key: statistics.median(alike[shape]) for key, shape in shape_of.items()}
    attn, mlp = ([smooth[i, part] for i in range(len(found))] for part in ("attn", "mlp"))
    return SublayerCosts(tuple(attn), tuple(mlp), max(0.0, rest), tokens, phase, str(device))


def _passes(model: nn.Module, ids: Tensor, phase: str, count: int) -> Iterator[Callable[[], object]]:
    """The passes to time, one after the other."""
    if phase == "prefill":
        last = last_token_only(model)  # as generate does
        for _ in range(count):
            yield partial(model, input_ids=ids, use_cache=False, **last)
        return
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    if ids.shape[1] <= limit < ids.shape[1] + count:  # learned positions would end before the last step
        ids = ids[:, : max(1, limit - count)]
    cache = as_argument(model, cache_of(model(input_ids=ids, use_cache=True)))
    for _ in range(count):
        yield lambda: model(input_ids=ids[:, -1:], use_cache=True, **cache)


def last_token_only(model: nn.Module) -> dict[str, int]:
    """The argument with which a model computes its head for the last token alone, where it has one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class _Clock:
    """Milliseconds between starts and stops; on CUDA by events, which are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Timestamp, Timestamp]] = []
        self._began: Timestamp = 0.0

    def start(self, *_: object) -> None:
        self._began = self._mark()

    def stop(self, *_: object) -> None:
        self.marks.append((self._began, self._mark()))

    def read(self) -> float:
        """Milliseconds since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        total = 0.0
        for began, ended in self.marks:
            if isinstance(began, float) and isinstance(ended, float):
                total += 1000 * (ended - began)
            elif isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
                total += began.elapsed_time(ended)
        self.marks.clear()
        return total

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Time every call of a module."""
        handles = (module.register_forward_pre_hook(self.start), module.register_forward_hook(self.stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self) -> Timestamp:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
