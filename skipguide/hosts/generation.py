"""transformers' generate: what it is doing when it calls the model, and the methods of a model at which its ways begin.

A prompt can come in chunks, and a draft is verified several tokens at once. Both are passes of several tokens on a
cache that is filled, and nothing that the model is given says which of the two it is. The loop that calls it knows, so
the loop is asked.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from threading import RLock
from types import FrameType
from typing import Any, Literal, Protocol
from weakref import WeakSet, ref

from torch import nn

from skipguide.errors import SkipError

Stage = Literal["prompt", "chunk", "decode"]

_MODULE = "transformers.generation.utils"
_PROMPT, _ASSISTED, _PLAIN = "_prefill", "_assisted_decoding", ("_sample", "_beam_search")

# Where continuous batching begins, whatever it is called through, and where the candidates of assisted decoding do.
BATCHING, CANDIDATES = "init_continuous_batching", "_get_candidate_generator"


def stage() -> Stage | None:
    """Whether the `generate` that runs in this thread reads a prompt, one of its chunks, or decodes; None outside one.

    An assistant has a `generate` of its own inside the one that it drafts for: what it reads between two drafts are
    tokens that were decoded.
    """
    frame: FrameType | None = sys._getframe(1)
    found: Stage | None = None
    while frame is not None:
        name = frame.f_code.co_name
        if name[:1] == "_" and frame.f_globals.get("__name__") == _MODULE:
            if name == _ASSISTED:
                first = found is None and frame.f_locals.get("is_first_iteration", False)
                return "prompt" if first else "decode"
            if name == _PROMPT:
                found = "chunk" if len(frame.f_locals.get("input_chunks", ())) > 1 else "prompt"
            elif name in _PLAIN and found is None:
                found = "decode"
        frame = frame.f_back
    return found


def prompt_alone(generator: Any) -> None:
    """Let the first pass of assisted decoding read the prompt alone: drafts are verified from the next one on.

    Otherwise the first draft is verified in the pass that reads the prompt, and a plan for one of the two would hold
    for both. The draft is made and dropped, because an assistant reads the prompt for it.
    """
    candidates = generator.get_candidates

    def first(input_ids: Any, **more: Any) -> tuple[Any, None]:
        del generator.get_candidates
        drafted, _ = candidates(input_ids, **more)
        return drafted[:, : input_ids.shape[1]], None

    generator.get_candidates = first


class Follower(Protocol):
    """Who has a say where a way of generating begins."""

    def _enter_generation(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse it, or call on and change what comes back.

        Args:
            name: `BATCHING` or `CANDIDATES`.
            call: the model's method, or the next follower around it.
            args: of the method.
            kwargs: of the method.
        """


class EntryPoint:
    """Stands in for one method of one model, for as long as somebody follows it.

    Like a gate it is one per method, whoever follows: those who follow come and go in any order, and when the last one
    has gone the model's `__dict__` is what it was.
    """

    __slots__ = ("__weakref__", "_model", "_own", "followers", "name")

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = ref(model)
        self._own: Callable[..., Any] | None = model.__dict__.get(name)
        self.name = name
        self.followers: WeakSet[Any] = WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Ask all who follow, then run the method."""
        call = self._method()
        for follower in list(self.followers):
            call = partial(follower._enter_generation, self.name, call)
        return call(*args, **kwargs)

    def _method(self) -> Callable[..., Any]:
        model = self._model()
        assert model is not None, "a method is called on a model that is gone"
        if self._own is not None:
            return self._own
        method: Callable[..., Any] = getattr(type(model), self.name).__get__(model)
        return method

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has the method alone."""
        return copy.deepcopy(self._method(), memo)

    def __reduce__(self) -> Any:
        raise SkipError("this model has an active plan; leave the `with` block or call remove() before pickling it")


_LOCK = RLock()


def follow_generation(model: nn.Module, follower: Follower, *names: str) -> None:
    """Let `follower` be asked where ways of generating begin; a model without such a method is passed over."""
    for name in names:
        if not callable(getattr(model, name, None)):
            continue
        with _LOCK:
            standing = model.__dict__.get(name)
            if not isinstance(standing, EntryPoint):
                standing = EntryPoint(model, name)
            standing.followers.add(follower)  # first, so that leaving undoes whatever comes next
            model.__dict__[name] = standing


def leave_generation(model: nn.Module, follower: Follower, *names: str) -> None:
    """Ask it no longer; nothing happens to one that was not asked."""
    for name in names:
        with _LOCK:
            standing = model.__dict__.get(name)
            if not isinstance(standing, EntryPoint):
                continue
            standing.followers.discard(follower)
            if standing.followers:
                continue
            if standing._own is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = standing._own
