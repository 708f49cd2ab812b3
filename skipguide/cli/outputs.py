"""What a command writes: names, checks before the work begins, notes next to the result."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipguide.errors import SkipError
from skipguide.files import LONGEST, fitting, landing, parse_json, replacing, versions

__all__ = ["check_output", "one_line", "plain_arguments", "replacing", "sidecar", "slug", "versions", "write_json"]


def slug(text: str, length: int = 60) -> str:
    """A file name made of the words of `text`."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")
    return words[:length].strip("-_") or "clip"


def sidecar(path: Path) -> Path:
    """Where the notes on `path` go: `out.gif.json` for `out.gif`."""
    return path.with_name(fitting(path.name, ".json"))


def check_output(path: Path, suffixes: Sequence[str], *, force: bool, notes: bool = True) -> None:
    """Refuse early what would fail, or destroy something, late.

    Raises:
        SkipError: for a kind of file that is not written here, a file that exists, or a folder that cannot
            hold it.
    """
    if path.suffix.lower() not in suffixes:
        raise SkipError(f"expected a file name that ends in {', '.join(suffixes)}; got {path}")
    if path.suffix.lower() == ".mp4":
        from skipguide.media.movies import require_video

        require_video()
    if (size := len(os.fsencode(path.name))) > LONGEST:
        raise SkipError(f"cannot write {path}: its name has {size} bytes, and a file system holds {LONGEST}")
    for file in (path, sidecar(path)) if notes else (path,):
        if file.is_dir():
            raise SkipError(f"{file} is a folder; expected the name of a file")
        if file.exists() and not force:
            raise SkipError(f"{file} exists already: choose another name with -o, or replace it with --force")
    folder = landing(path).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise SkipError(f"cannot write {path}: {folder} is not a folder that can be written to")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record`, readable, with what JSON does not know as text."""
    path.write_text(_text(record, indent=2) + "\n", encoding="utf-8")


def one_line(record: dict[str, Any]) -> str:
    """`record` on a line, as `write_json` writes it."""
    return _text(record)


def _text(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: the half of a pair, as from a file name of other bytes, is written as an escape."""
    text = json.dumps(record, indent=indent, default=str, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record, indent=indent, default=str)
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None if there is no such file, or it is something else."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"), str(path), finite=False)
    except (OSError, ValueError):  # a SkipError, or bytes that are no text
        return None
    return found if isinstance(found, dict) else None


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed arguments as plain data."""
    hidden = ("run", "version", "traceback", "command")
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in hidden
    }
