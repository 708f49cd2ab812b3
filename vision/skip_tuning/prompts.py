"""Prompts: class names and templates that can be told apart and filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.labels import plain

DEFAULT_TEMPLATE = "a photo of a {}."


def check_names(classnames: Sequence[Any]) -> list[str]:
    """The class names, if each has words and no two are the same."""
    if isinstance(classnames, str) or not len(classnames):
        raise SkipError(f"expected a list of class names; got {classnames!r}")
    seen: dict[str, int] = {}
    for place, name in enumerate(classnames):
        if not isinstance(name, str) or not plain(name):
            raise SkipError(f"expected class names with words in them; class {place} is {name!r}")
        if plain(name) in seen:
            raise SkipError(
                f"expected different class names; classes {seen[plain(name)]} and {place} are both {name!r}"
            )
        seen[plain(name)] = place
    return list(classnames)


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """The templates, if each has one place for the class name."""
    found = [templates] if isinstance(templates, str) else list(templates)
    if not found:
        raise SkipError("expected at least one template")
    for template in found:
        if template.count("{}") != 1:
            raise SkipError(f"expected a template with one {{}} for the class name; got {template!r}")
    return found


def fill(template: str, classnames: Sequence[str]) -> list[str]:
    """The prompts of some classes.

    Example:
        >>> fill("a photo of a {}.", ["red_circle"])
        ['a photo of a red circle.']
    """
    return [template.replace("{}", plain(name)) for name in classnames]
