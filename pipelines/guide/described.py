"""Described: a guider of diffusers as plain data, its class name and its config, and back."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from skipguide.errors import SkipError

_CONFIGS = ("LayerSkipConfig", "SmoothedEnergyGuidanceConfig")


def guider_names() -> tuple[str, ...]:
    """The guiders that the installed diffusers has, by class name."""
    import diffusers.guiders as home
    from diffusers.guiders.guider_utils import BaseGuidance

    found = (
        name for name in dir(home) if inspect.isclass(cls := getattr(home, name)) and issubclass(cls, BaseGuidance)
    )
    return tuple(name for name in found if name != "BaseGuidance")


def is_guider(value: Any) -> bool:
    """Whether this is a guider of diffusers."""
    from diffusers.guiders.guider_utils import BaseGuidance

    return isinstance(value, BaseGuidance)


def describe(guider: Any) -> dict[str, Any]:
    """A guider's class name and every argument that it was made with.

    Raises:
        SkipError: for a class that diffusers does not have, which could not be made again from its name.
    """
    name = type(guider).__name__
    if name not in guider_names():
        raise SkipError(
            f"expected a guider of diffusers, to be written as its class name and config "
            f"({', '.join(guider_names())}); got a {name}, which is applied as it is, and has no JSON"
        )
    config = {key: _plain(value) for key, value in guider.config.items() if not key.startswith("_")}
    return {"class": name, "config": config}


def make(data: Mapping[str, Any]) -> Any:
    """The guider that `describe` described.

    Raises:
        SkipError: for another form, a class that the installed diffusers does not have, or arguments it refuses.
    """
    if set(data) != {"class", "config"} or not isinstance(data["config"], Mapping):
        raise SkipError(f"expected a guider as its 'class' and its 'config', a mapping; got {sorted(map(str, data))}")
    if (name := data["class"]) not in guider_names():
        raise SkipError(f"unknown guider {name!r}; expected one of {', '.join(guider_names())}")
    import diffusers.guiders as home

    try:
        return getattr(home, name)(**data["config"])
    except (TypeError, ValueError, ImportError) as error:
        raise SkipError(f"{name} does not take this config: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value
