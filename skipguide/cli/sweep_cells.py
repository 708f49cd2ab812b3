"""Finished cells of a sweep, kept in a folder so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.cli.file_locks import FolderLocks, remove_leftovers
from skipguide.cli.outputs import replacing, write_json
from skipguide.config import layer_tuple, normalize_fields
from skipguide.errors import SkipError
from skipguide.files import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Cell:
    """One cell: what was skipped, how strongly, and what came of it.

    Args:
        layers: the blocks left out; empty for the plain clip.
        scale: strength; 0 for the plain clip.
        relative_cost: time of a step against the plain pipeline's, counted in blocks.
        difference: mean absolute difference from the plain clip, 0 to 1.
        seconds: how long the clip took.
        stats: the ledger of the guidance.
    """

    layers: tuple[int, ...]
    scale: float
    relative_cost: float
    difference: float
    seconds: float
    stats: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what no sweep writes."""
        object.__setattr__(self, "layers", layer_tuple(self.layers))
        normalize_fields(self, numbers={"scale": None, "relative_cost": 0, "difference": 0, "seconds": 0})
        if not isinstance(self.stats, dict):
            raise SkipError(f"expected stats as a mapping; got {self.stats!r}")

    @property
    def name(self) -> str:
        """The blocks as they are written on the command line and in the table."""
        return "+".join(map(str, self.layers)) or "plain"


class CellCache:
    """Cells on disk: a picture of a few frames and a JSON file each. The JSON comes last: it means "done"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.locks = FolderLocks(folder)

    def key(self, cell: str, settings: Mapping[str, Any]) -> str:
        """A file name for a cell that changes with everything that its picture depends on."""
        text = json.dumps(settings, sort_keys=True, default=str)
        return f"{cell[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def get(self, key: str) -> tuple[Cell, Image] | None:
        """A finished cell."""
        from PIL import Image

        try:
            record = parse_json((self.folder / f"{key}.json").read_text(encoding="utf-8"), key, finite=False)
            with Image.open(self.folder / f"{key}.png") as picture:
                image = picture.convert("RGB")
            return Cell(**record), image
        except (OSError, ValueError, TypeError, KeyError):
            return None  # not made yet, or by an older version: it is made again

    def put(self, key: str, cell: Cell, image: Image) -> None:
        """Keep a finished cell; its lock must be held."""
        remove_leftovers(self.folder, key)
        with replacing(self.folder / f"{key}.png", self.folder / f"{key}.json") as (picture, record):
            image.save(picture)
            write_json(record, asdict(cell))

    def get_clip(self, key: str) -> list[Image] | None:
        """The frames of the plain clip, which every other cell is compared with."""
        import numpy as np

        from skipguide.media.frames import as_images

        try:
            with np.load(self.folder / f"{key}.npz") as file:
                return as_images(file["frames"])
        except (OSError, ValueError, KeyError):
            return None

    def put_clip(self, key: str, images: list[Image]) -> None:
        """Keep the frames of the plain clip, exactly."""
        import numpy as np

        with replacing(self.folder / f"{key}.npz") as (file,):
            np.savez_compressed(file, frames=np.stack([np.asarray(image) for image in images]))
