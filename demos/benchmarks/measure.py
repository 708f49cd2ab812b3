"""What the benchmarks share: interleaved timing, peak memory, the machine's description, atomic files.

Timing is interleaved, because a shared machine changes its speed from minute to minute: in every round each
variant runs once, every second round in reverse order, and only ratios within a round are compared. The median of
those ratios is what gets reported, with the quartiles beside it.
"""

from __future__ import annotations

import datetime
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipguide.files import replacing

Clocks = tuple[float, float]  # wall-clock and process seconds


def synchronize() -> None:
    """Wait until the accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> Clocks:
    """Both clocks, when all work is done."""
    synchronize()
    return time.perf_counter(), time.process_time()


def timed(run: Callable[[], object]) -> Clocks:
    """Seconds of one call, on both clocks; like timeit, without Python's garbage collector.

    With torch and diffusers loaded a full collection takes a tenth of a second, and always hits the same variant.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        wall, cpu = now()
        run()
        wall_after, cpu_after = now()
    finally:
        if was_enabled:
            gc.enable()
    return wall_after - wall, cpu_after - cpu


def interleaved(
    variants: Mapping[str, Callable[[], AbstractContextManager[object]]],
    run: Callable[[], object],
    rounds: int,
    progress: Callable[[str], object] = lambda name: None,
) -> Iterator[dict[str, Clocks]]:
    """Rounds of timings: in each, `run()` once inside every variant's context. Entering it is not timed."""
    order = list(variants)
    for number in range(rounds):
        clocks: dict[str, Clocks] = {}
        for name in order if number % 2 == 0 else reversed(order):
            progress(name)
            with variants[name]():
                clocks[name] = timed(run)
        yield clocks


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a ratio over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """From values of the same rounds."""
        ratios = [n / d for n, d in zip(numerators, denominators, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
        return cls(median, low, high)

    def to_dict(self) -> dict[str, float]:
        return {"median": round(self.median, 5), "quartiles": [round(self.low, 5), round(self.high, 5)]}


class ModuleClock:
    """Process seconds of every call of some modules' own forward; for the CPU.

    It sits below whatever is put around the modules later, so the cost of hooks and gates is not in it: what a run
    takes beyond the sum is its cost outside the modules.

    Attributes:
        calls: `(place, seconds)` of every call since the list was last cleared.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.calls: list[tuple[int, float]] = []

    def __enter__(self) -> ModuleClock:
        for place, module in enumerate(self.modules):
            module.forward = self._clocked(place, module.forward)
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self.modules:
            del module.forward

    def _clocked(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            out = forward(*args, **kwargs)
            self.calls.append((place, time.process_time() - began))
            return out

        return clocked


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run()` held at once in tensors, beyond what was there before.

    On CUDA from the caching allocator's own counter. On the CPU from the log of every allocation and release of
    torch's CPU allocator, which the profiler keeps: exact, temporaries inside operations included.
    """
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # quiet
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return peak_of(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))


def peak_of(changes: Iterable[int]) -> int:
    """Highest running total of a sequence of allocations (positive) and releases (negative)."""
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine and the versions."""
    names = ("torch", "diffusers", "transformers", "skipguide")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_text(path: Path, text: str) -> None:
    """Write a file at once: a reader sees the old one or the new one."""
    with replacing(path) as (partial,):
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as JSON, at once."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def keep_existing(path: Path, force: bool) -> None:
    """Leave with exit status 2 if results are there already and `--force` was not given."""
    if path.exists() and not force:
        print(f"{path} exists; --force replaces it", file=sys.stderr)
        raise SystemExit(2)
