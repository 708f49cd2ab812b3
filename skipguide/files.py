"""Files: they appear whole or not at all, and say which versions they came from."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from skipguide._version import __version__


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names for `paths`, in the same folders: renamed if the block ends well, removed if not.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "notes.txt")) as (partial,):
        ...         _ = partial.write_text("whole")
        ...     [path.name for path in Path(folder).iterdir()]
        ['notes.txt']
    """
    token = secrets.token_hex(4)
    # The suffix stays last: writers choose the format by it.
    temporary = [path.with_name(f".{path.stem}.{token}{path.suffix}") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for source, path in zip(temporary, paths, strict=True):
            os.replace(source, path)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    found = {"python": platform.python_version(), "skipguide": __version__}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
