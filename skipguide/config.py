"""Config: frozen settings with a JSON round trip, the form of everything a user applies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Self

from skipguide.errors import SkipError
from skipguide.files import replacing

VERSION = 1


def write_json(path: str | Path, data: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write JSON to a temporary name first, then rename: a reader never sees half a file.

    Raises:
        SkipError: if `path` exists and `overwrite` is False.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise SkipError(f"{target} exists; pass overwrite=True to replace it")
    with replacing(target) as (partial,):
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The JSON in a file.

    Raises:
        SkipError: if it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of bytes that are no text
        raise SkipError(f"expected JSON in {path}; got something else: {error}") from error


def check_keys(found: Mapping[str, Any], expected: set[str], what: str) -> None:
    """Refuse data with a version or keys that are not known here."""
    if not isinstance(found, Mapping):
        raise SkipError(f"expected {what} as a mapping of its settings; got {type(found).__name__}")
    if found.get("version") != VERSION:
        raise SkipError(f"expected {what} of version {VERSION}; got version {found.get('version')!r}")
    if unknown := set(found) - expected - {"version"}:
        raise SkipError(f"unknown keys in {what}: {sorted(unknown)}; expected {sorted(expected)}")


def _plain(value: Any) -> Any:
    """Settings inside settings as plain data too."""
    if isinstance(value, JsonConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class JsonConfig:
    """Mixin for frozen dataclasses whose fields are plain data."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with a version."""
        return {"version": VERSION} | {
            f.name: _plain(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown or missing key, or another version, is an error."""
        known = fields(cls)  # type: ignore[arg-type]
        check_keys(data, {f.name for f in known}, f"a {cls.__name__}")
        needed = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
        if missing := needed - set(data):
            raise SkipError(f"a {cls.__name__} needs {sorted(missing)} too; got {sorted(data)}")
        return cls(**{k: v for k, v in data.items() if k != "version"})

    def save_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the settings; an existing file is kept unless `overwrite`."""
        write_json(path, self.to_dict(), overwrite=overwrite)

    @classmethod
    def load_json(cls, path: str | Path) -> Self:
        """Read settings that `save_json` wrote."""
        return cls.from_dict(read_json(path))
