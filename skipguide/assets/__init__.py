"""Assets: the small trained models that ship as package data, found by name from an installed wheel too."""

from __future__ import annotations

from pathlib import Path

from skipguide.errors import SkipError


def bundled(name: str = "tiny-t2v") -> Path:
    """The folder of a bundled model.

    Args:
        name: `"tiny-t2v"`, a text-to-video pipeline; `"tiny-lm"`, a language model of Python source; `"tiny-cnn"`, a
            classifier of drawn scenes (timm); `"tiny-clip"`, a CLIP of drawn shapes; `"tiny-unetpp"`, a UNet++ for
            cell nuclei; `"tiny-floorplan"`, a FloorPlanNet for made-up plans.

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
