"""Cache contexts: the name of the `cache_context` that a pipeline has opened on its denoiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from skipguide.hosts.copies import copied_without

# model -> name; a mapping is never changed, so that threads and tasks do not see each other's
_NAMES: ContextVar[Mapping[int, str]] = ContextVar("skipguide_cache_contexts", default={})  # noqa: B039


class ContextNames:
    """Takes the place of a model's `cache_context` and remembers the name of the open one, thread by thread.

    Pipelines announce with it which branch they are about to compute. One listener serves all guidance on a model.

    Args:
        model: the denoiser, which has a `cache_context`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.key = id(model)
        # who listens, by id: they end it while they live; and what is called before a context opens
        self.users: dict[int, Callable[[], None] | None] = {}
        self.own = "cache_context" in model.__dict__
        self.original: Any = model.cache_context

    @classmethod
    def listen(cls, model: nn.Module, user: object, before: Callable[[], None] | None = None) -> None:
        """Take the place of `cache_context`, or count one listener more; without cache contexts nothing happens.

        Args:
            model: the denoiser.
            user: who listens.
            before: called before each context opens, and so before the denoiser is.
        """
        if not hasattr(model, "cache_context"):
            return
        here = model.__dict__.get("cache_context")
        if not isinstance(here, cls):
            here = model.__dict__["cache_context"] = cls(model)
        here.users[id(user)] = before

    @classmethod
    def leave(cls, model: nn.Module, user: object) -> None:
        """End one listening; the last one puts back what was there. It can be repeated."""
        here = model.__dict__.get("cache_context")
        if not isinstance(here, cls):
            return
        here.users.pop(id(user), None)
        if not here.users and here.own:
            model.__dict__["cache_context"] = here.original
        elif not here.users:
            del model.__dict__["cache_context"]

    @staticmethod
    def name(model: nn.Module) -> str:
        """The name in force, or an empty one."""
        return _NAMES.get().get(id(model), "")

    @contextmanager
    def __call__(self, name: str, **where: Any) -> Iterator[None]:
        """What the model's own `cache_context` does, under a name that is remembered."""
        for before in tuple(self.users.values()):
            if before is not None:
                before()
        token = _NAMES.set({**_NAMES.get(), self.key: name})
        try:
            with self.original(name, **where):
                yield
        finally:
            _NAMES.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has its own `cache_context` and no listener."""
        if self.own:
            return copy.deepcopy(self.original, memo)
        return copied_without(getattr(self.original, "__self__", None), "cache_context", self.original, memo)
