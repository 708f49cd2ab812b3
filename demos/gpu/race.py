"""Interleaved timing of variants that may fail: each failure is recorded, and the others go on.

In every round each variant runs once, every second round in reverse order; ratios are taken within a round and their
median is reported, because a machine's speed changes while it works.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from demos.benchmarks.measure import Ratio, synchronize
from demos.gpu.setting import Setting


@dataclass
class Variant:
    """One way of doing the work.

    Attributes:
        context: entered around every run, and not timed.
        run: the work.
        seconds: of every round.
        peak: most bytes that a run held beyond what was there before it; 0 on a CPU.
        total: most bytes in all.
        error: why the variant was given up; empty while it runs.
    """

    context: Callable[[], AbstractContextManager[Any]]
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    total: int = 0
    error: str = ""

    def attempt(self, work: Callable[[], object]) -> None:
        """Do something inside the context; what goes wrong is kept as text."""
        try:
            with self.context():
                work()
        except Exception as error:  # one variant must not end the others
            self.error = describe(error)
            clear()


def describe(error: BaseException) -> str:
    """Class and message, on one line and not endless."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def clear() -> None:
    """Give unused memory back, so that the next measurement starts as the first did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tell(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def race(setting: Setting, variants: Mapping[str, Variant], rounds: int, warm: bool = True) -> dict[str, Any]:
    """Time the variants against the first one.

    Args:
        setting: no round starts that would end after its `until`; the first always does.
        variants: by name; the first is what the others are compared with.
        rounds: how often each runs, at most.
        warm: run each once before, untimed.

    Returns:
        For every variant its median `seconds`, the ratio `to_<first>`, `peak_bytes` beyond what was there,
        `total_bytes` and the seconds of every round (`every`), or an `error`.
    """
    if warm:
        for name, variant in variants.items():
            began = time.monotonic()
            variant.attempt(variant.run)
            tell(f"    warm {name}: {variant.error or f'{time.monotonic() - began:.2f} s'}")
    for number in range(rounds):
        began = time.monotonic()
        with uncollected():
            for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
                variant = variants[name]
                if not variant.error:
                    variant.attempt(lambda variant=variant: measure(variant))
                    tell(f"    {name}: {variant.error or f'{variant.seconds[-1]:.4f} s'}")
        if setting.left < time.monotonic() - began:
            break
    return report(variants)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which takes a tenth of a second and always hits the same variant."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure(variant: Variant) -> None:
    """One timed run, with its peak memory."""
    before = 0
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    synchronize()
    began = time.perf_counter()
    variant.run()
    synchronize()
    seconds = time.perf_counter() - began
    if torch.cuda.is_available():
        variant.total = max(variant.total, torch.cuda.max_memory_allocated())
        variant.peak = max(variant.peak, variant.total - before)
    variant.seconds.append(seconds)


def report(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """The figures of a race."""
    first = next(iter(variants))
    base = variants[first].seconds
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        if variant.error:
            found[name] = {"error": variant.error}
            continue
        row: dict[str, Any] = {"seconds": round(statistics.median(variant.seconds), 6)}
        if name != first and len(base) == len(variant.seconds):
            row[f"to_{first}"] = Ratio.of(variant.seconds, base).to_dict()
        row |= {"peak_bytes": variant.peak, "total_bytes": variant.total}
        found[name] = row | {"every": [round(seconds, 6) for seconds in variant.seconds]}
    return found


def ratio(found: Mapping[str, Any], name: str, to: str) -> dict[str, Any] | None:
    """The ratio of two variants of one race, where both ran in every round."""
    above, below = (found.get(each, {}).get("every", []) for each in (name, to))
    return Ratio.of(above, below).to_dict() if above and len(above) == len(below) else None
