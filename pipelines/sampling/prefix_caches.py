"""Prefix caches: keys and values that a denoiser keeps from its first call of a run, one set for each pass of a step.

Text and pictures that are the same at every step are computed in the first one (`"extract"`); later calls read what was
kept (`"cached"`). What a skipped pass keeps differs behind the block that it skips, so it has a cache of its own: then
guidance is what it is without the cache. It follows that a pass has to run in the first step to run in a later one.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from skipguide.arguments import Arguments
from skipguide.errors import SkipError
from skipguide.plan import SkipPlan

_MODE, _FILLS, _READS = "kv_cache_mode", "extract", "cached"


class PrefixCaches:
    """The caches of a run.

    Args:
        arguments: of the denoiser.
        name: its argument that holds a cache, or empty.
    """

    def __init__(self, arguments: Arguments, name: str) -> None:
        self.arguments = arguments
        self.name = name
        self._own: dict[tuple[str, SkipPlan], Any] = {}
        self._filled: dict[str, SkipPlan | None] = {}

    def forget(self) -> None:
        """A run begins, or is over."""
        self._own.clear()
        self._filled.clear()

    def mode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """`"extract"`, `"cached"`, or None for a call without a cache."""
        return self.arguments.get(_MODE, args, kwargs) if self.name else None

    def meet(self, branch: str, plan: SkipPlan | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass of the pipeline's own, with its own cache.

        Args:
            branch: of the step.
            plan: what it skips inside.
            args: of the call.
            kwargs: of the call.

        Raises:
            SkipError: if what it reads was kept by another pass than it is.
        """
        mode = self.mode(args, kwargs)
        if mode == _FILLS:
            self._filled[branch] = plan
        elif mode == _READS and self._filled.get(branch, _MODE) != plan:
            raise self._refusal("the unconditional pass")

    def own(
        self, branch: str, plan: SkipPlan, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call of a skipped pass with the cache of its own; its plain pass has run.

        Raises:
            SkipError: if it did not run in the first step.
        """
        mode, theirs = self.mode(args, kwargs), self.arguments.get(self.name, args, kwargs) if self.name else None
        if mode == _FILLS and theirs is not None:
            self._own[branch, plan] = _with_the_same_tensors(theirs)
        elif mode != _READS or theirs is None:
            return args, kwargs
        if (branch, plan) not in self._own:
            raise self._refusal("a skipped pass")
        return self.arguments.put({self.name: self._own[branch, plan]}, args, kwargs)

    def take(self, branch: str, plan: SkipPlan, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """After a skipped pass: where the denoiser makes its cache itself, it returns it behind the prediction."""
        if self.mode(args, kwargs) == _FILLS and isinstance(out, tuple) and len(out) > 1:
            self._own[branch, plan] = out[1]

    def _refusal(self, what: str) -> SkipError:
        return SkipError(
            f"{what} reads what the denoiser keeps of the first step ({self.name}), and it did not run there in this "
            f"way: skip the same layers in every step from the first one on, with CFG in the first step (start=0, no "
            f"cfg_interval, one set of layers), or turn the pipeline's cache off where it can be (use_kv_cache=False)"
        )


def _with_the_same_tensors(cache: Any) -> Any:
    """A copy of the containers of a cache, so that what is written there is written there alone."""
    if isinstance(cache, Tensor):
        return cache
    if isinstance(cache, (list, tuple)):
        return type(cache)(_with_the_same_tensors(each) for each in cache)
    if isinstance(cache, dict):
        return {key: _with_the_same_tensors(each) for key, each in cache.items()}
    if not hasattr(cache, "__dict__"):
        return cache
    new = copy.copy(cache)
    vars(new).update({key: _with_the_same_tensors(each) for key, each in vars(cache).items()})
    return new
