"""Files: they appear whole or not at all, JSON is read in one place, and results say which versions they came from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from skipguide._version import __version__
from skipguide.errors import SkipError

LONGEST = 255  # bytes of a file's name that today's file systems hold
SUFFIX = 32  # bytes of a suffix that a temporary name keeps
DEEPEST = 32  # lists and mappings inside each other that JSON may have; our own files have six at most


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names for `paths`, in the same folders: renamed if the block ends well, removed if not.

    A symbolic link stays one: what it points to is written, whether that is there already or not.

    Raises:
        SkipError: for links that lead round in a circle.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "notes.txt")) as (partial,):
        ...         _ = partial.write_text("whole")
        ...     [path.name for path in Path(folder).iterdir()]
        ['notes.txt']
    """
    places = [landing(path) for path in paths]
    temporary = [place.with_name(_temporary_name(place)) for place in places]
    try:
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for source, place in zip(temporary, places, strict=True):
            os.replace(source, place)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)


def landing(path: Path) -> Path:
    """Where a file or folder is written: the path itself, or what a symbolic link in it points to, dangling or not.

    Raises:
        SkipError: for links that lead round in a circle.
    """
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise SkipError(f"{path} is a symbolic link that leads back to itself: remove it, or choose another name")
    return place


def fitting(stem: str, ending: str, longest: int = LONGEST) -> str:
    """A file name of a stem and an ending; a stem that is too long for a name is cut, and told apart by a hash.

    Example:
        >>> fitting("clip.gif", ".json"), len(fitting(255 * "a", ".json"))
        ('clip.gif.json', 255)
    """
    if len(os.fsencode(stem + ending)) <= longest:
        return stem + ending
    mark = f"~{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}{ending}"
    return _cut(stem, longest - len(os.fsencode(mark))) + mark


def temporary_stem(stem: str) -> str:
    """What the temporary names of a result begin with, behind a dot; a mark and the suffix follow."""
    return fitting(stem, "", LONGEST - SUFFIX - 10)


def _temporary_name(place: Path) -> str:
    # The suffix stays last: writers choose the format by it. None of theirs is long.
    return f".{temporary_stem(place.stem)}.{secrets.token_hex(4)}{_cut(place.suffix, SUFFIX)}"


def _cut(text: str, length: int) -> str:
    """The beginning of a text that has so many bytes at most."""
    return os.fsencode(text)[:length].decode("utf-8", "ignore")


def read_json(path: str | Path) -> Any:
    """The JSON in a file, as `parse_json` reads it.

    Raises:
        SkipError: if it is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise SkipError(f"expected JSON in {path}; got something else: {error}") from error
    return parse_json(text, str(path))


def read_settings(path: str | Path) -> Mapping[str, Any]:
    """The settings in a file of JSON, as `read_json` reads it.

    Raises:
        SkipError: if it is not JSON, or no mapping.
    """
    if not isinstance(found := read_json(path), Mapping):
        raise SkipError(f"expected settings as a mapping in {path}; got {type(found).__name__}")
    return found


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """Read JSON, from whomever: everything that the library reads as JSON goes through here.

    Args:
        text: the JSON.
        where: it is from, for the error.
        finite: refuse NaN and infinity, which JSON does not have; the configs of other libraries have them.

    Raises:
        SkipError: if it is not JSON, is nested deeper than any file of ours, or has a number that is not finite.

    Example:
        >>> parse_json('{"layers": [3]}', "a plan")
        {'layers': [3]}
        >>> parse_json("[" * 1000 + "]" * 1000, "a plan")
        Traceback (most recent call last):
        ...
        skipguide.errors.SkipError: expected JSON in a plan that is nested at most 32 deep; got more
    """
    more: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        found = json.loads(text, **more)
    except RecursionError:
        found = too_deep = True
    except ValueError as error:
        raise SkipError(f"expected JSON in {where}; got something else: {error}") from error
    else:
        too_deep = not is_shallow(found)
    if too_deep:
        raise SkipError(f"expected JSON in {where} that is nested at most {DEEPEST} deep; got more")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def is_shallow(data: Any) -> bool:
    """Whether lists and mappings lie at most `DEEPEST` deep inside each other; counted without recursion."""
    level = [data]
    for _ in range(DEEPEST + 1):
        level = [each for each in level if isinstance(each, Mapping | list | tuple)]
        if not level:
            return True
        level = [item for each in level for item in (each.values() if isinstance(each, Mapping) else each)]
    return False


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    found = {"python": platform.python_version(), "skipguide": __version__}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
