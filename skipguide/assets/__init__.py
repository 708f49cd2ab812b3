"""Assets: the small trained models that ship as package data, found by name from an installed wheel too."""

from __future__ import annotations

from pathlib import Path

from skipguide.errors import SkipError


def bundled(name: str = "tiny-t2v") -> Path:
    """The folder of a bundled model.

    Args:
        name: `"tiny-t2v"`, the small text-to-video pipeline; `"tiny-lm"`, the small language model of Python source.

    Raises:
        SkipError: if no such model ships, with those that do.

    Example:
        >>> bundled("tiny-t2v").name
        'tiny-t2v'
    """
    home = Path(__file__).parent
    names = sorted(folder.name for folder in home.iterdir() if folder.is_dir() and folder.name != "__pycache__")
    if name not in names:
        raise SkipError(f"no bundled model {name!r}; there are {', '.join(names) or 'none'}")
    return home / name
