"""Where images and labels come from: folders, datasets, pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from skipguide.errors import SkipError
from skipguide.media.frames import open_picture
from skipguide.vision.skip_tuning.labels import plain, read_labels, refuse_twins
from skipguide.vision.skip_tuning.preparer import as_picture

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


@dataclass
class Examples:
    """Images and labels, read one at a time.

    Attributes:
        load: position -> PIL image, or pixels [3, H, W] that are already preprocessed.
        labels: class of every image.
        names: the class names that the labels count.
        marks: position -> something that changes when the image does, for the key of a cache.
    """

    load: Callable[[int], Any]
    labels: list[int]
    names: list[str]
    marks: Callable[[int], bytes] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, places: Sequence[int]) -> Examples:
        """Some of them, in the given order."""
        load, mark, kept = self.load, self.mark, list(places)
        return Examples(lambda i: load(kept[i]), [self.labels[i] for i in kept], self.names, lambda i: mark(kept[i]))

    def mark(self, place: int) -> bytes:
        """Identifies the image; falls back to a hash of its pixels."""
        if self.marks is not None:
            return self.marks(place)
        item = self.load(place)
        if isinstance(item, Tensor):
            return hashlib.blake2b(item.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()
        return hashlib.blake2b(repr(item.size).encode() + item.tobytes(), digest_size=16).digest()

    def relabelled(self, names: Sequence[str]) -> Examples:
        """Only the images of `names`, with labels that count `names`.

        Raises:
            SkipError: if a name is not among these classes.
        """
        refuse_twins(self.names)
        have = {plain(name): i for i, name in enumerate(self.names)}
        missing = [name for name in names if plain(name) not in have]
        if missing:
            raise SkipError(f"expected classes of the data ({_some(self.names)}); got {_some(missing)}")
        new = {have[plain(name)]: i for i, name in enumerate(names)}
        kept = [i for i, label in enumerate(self.labels) if label in new]
        chosen = self.subset(kept)
        return Examples(chosen.load, [new[label] for label in chosen.labels], list(names), chosen.marks)

    def require_every_class(self) -> None:
        """Raise a `SkipError` naming the classes without images."""
        seen = set(self.labels)
        if empty := [name for i, name in enumerate(self.names) if i not in seen]:
            raise SkipError(
                f"expected images of every class; {_some(empty)} {'has' if len(empty) == 1 else 'have'} none: "
                "add images, or leave the name out"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def read_folder(folder: Path) -> Examples:
    """A folder with one folder of images per class."""
    if not folder.is_dir():
        raise SkipError(f"expected a folder with one folder of images per class; {folder} is no folder")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not names:
        raise SkipError(f"expected one folder of images per class in {folder}; it has no folders")
    refuse_twins(names, f"the folders of {folder}")
    if {name.lower() for name in names} <= SPLITS and any(f.is_dir() for n in names for f in (folder / n).iterdir()):
        raise SkipError(
            f"expected one folder of images per class in {folder}; it has {_some(names)}, which are parts of a data "
            f"set with classes of their own: give one of them, such as {folder / names[-1]}"
        )
    paths = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not paths:
        raise SkipError(f"expected images ({', '.join(sorted(SUFFIXES))}) in the folders of {folder}; there are none")

    def load(place: int) -> Any:
        return open_picture(paths[place][0])

    def mark(place: int) -> bytes:
        path = paths[place][0]
        about = path.stat()
        return f"{path.resolve()}:{about.st_size}:{about.st_mtime_ns}".encode()

    return Examples(load, [label for _, label in paths], [plain(name) for name in names], mark)


def read_examples(source: Any, classnames: Sequence[str] | None = None) -> Examples:
    """Images and labels from whatever holds them.

    Args:
        source: a folder (path) with one folder per class; a dataset of `(image, label)` pairs such as torchvision's
            (its `classes` are the names); a Hugging Face dataset with `image` and `label`; or a pair
            `(images, labels)`. Images are PIL images, or preprocessed pixels [3, H, W]. Labels are integers that
            count the class names, or the names themselves.
        classnames: the classes to keep, in the order of the labels; None takes those of the data.

    Raises:
        SkipError: if there is nothing, or labels and names do not fit together.
    """
    if isinstance(source, Examples):
        found = source
    elif isinstance(source, str | Path):
        found = read_folder(Path(source))
    else:
        found = _from_sequence(source, classnames)
    if not len(found):
        raise SkipError("expected images; the data is empty")
    if classnames is None or list(classnames) == found.names:
        return found
    kept = found.relabelled(classnames)
    if not len(kept):
        raise SkipError(f"expected images of {_some(classnames)}; the data has none: check the names or the labels")
    return kept


def _from_sequence(source: Any, classnames: Sequence[str] | None) -> Examples:
    pair = _pair(source)
    if pair is not None:
        images, raw = pair
        if len(images) != len(raw):
            raise SkipError(f"expected as many labels as images; got {len(images)} images and {len(raw)} labels")
        load = lambda i: as_picture(images[i])  # noqa: E731
    elif hasattr(source, "features") and hasattr(source, "column_names"):  # Hugging Face datasets
        if "image" not in source.column_names:
            raise SkipError(f"expected the columns `image` and `label`; got {source.column_names}")
        load = lambda i: as_picture(source[i]["image"])  # noqa: E731
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        load = lambda i: as_picture(source[i][0])  # noqa: E731
    else:
        raise SkipError(
            "expected a folder, a dataset of (image, label) pairs, or a pair (images, labels); "
            f"got {type(source).__name__}"
        )
    labels, names = read_labels(source if pair is None else raw, classnames, alone=pair is not None)
    return Examples(load, labels, names)


def _pair(source: Any) -> tuple[Any, Any] | None:
    """Images and labels, where they were given as two; a list of two is one unless it holds two (image, label)."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        return None
    images, raw = source
    if isinstance(source, tuple):
        return None if isinstance(images, tuple) else (images, raw)
    alone = isinstance(raw, Tensor) or hasattr(raw, "dtype") or isinstance(raw, list)
    return (images, raw) if alone and not isinstance(images, tuple) and hasattr(images, "__len__") else None
