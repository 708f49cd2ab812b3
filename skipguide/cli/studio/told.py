"""Told: what goes wrong in a handler is shown on the page as its sentence, not as a traceback."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, TypeVar

from skipguide.cli.studio.run import Stopped
from skipguide.errors import SkipError

F = TypeVar("F", bound=Callable[..., Any])
logger = logging.getLogger(__name__)


@contextmanager
def _told() -> Iterator[None]:
    import gradio

    try:
        yield
    except gradio.Error:
        raise
    except Stopped:
        raise gradio.Error("stopped", title="skipguide", print_exception=False) from None
    except (SkipError, OSError, MemoryError) as error:
        sentence = escape(
            " ".join(str(error).split()) or type(error).__name__, quote=False
        )  # the page reads it as HTML
        raise gradio.Error(sentence, title="skipguide", duration=None, print_exception=False) from error
    except Exception as error:
        logger.exception("the studio met an error that it does not know")
        words = escape(f"{type(error).__name__}: {error}", quote=False)
        raise gradio.Error(words, title="skipguide", duration=None, print_exception=False) from error


def told(handler: F) -> F:
    """A handler of the page, or a generator that is one, whose errors are shown there as one sentence."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with _told():
                yield from handler(*args, **kwargs)

        return steps  # type: ignore[return-value]

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _told():
            return handler(*args, **kwargs)

    return call  # type: ignore[return-value]
