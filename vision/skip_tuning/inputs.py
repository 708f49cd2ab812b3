"""Where images, labels and class texts come from: folders, datasets, pairs; processors and tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.media.frames import as_rgb

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"}


def plain(name: str) -> str:
    """A class name as it is written in a prompt: `_` and `-` of folder names become blanks."""
    return " ".join(name.replace("_", " ").split())


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
    from PIL import Image

    if not folder.is_dir():
        raise SkipError(f"expected a folder with one folder of images per class; {folder} is no folder")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not names:
        raise SkipError(f"expected one folder of images per class in {folder}; it has no folders")
    paths = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not paths:
        raise SkipError(f"expected images ({', '.join(sorted(SUFFIXES))}) in the folders of {folder}; there are none")

    def load(place: int) -> Any:
        path = paths[place][0]
        try:
            with Image.open(path) as image:
                return as_rgb(image, path)
        except (OSError, SyntaxError) as error:
            raise SkipError(f"expected an image in {path}; it cannot be read ({error})") from error

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
    names = getattr(source, "classes", None)
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], tuple):
        images, raw = source
        if len(images) != len(raw):
            raise SkipError(f"expected as many labels as images; got {len(images)} images and {len(raw)} labels")
        load = lambda i: images[i]  # noqa: E731
        labels = raw.tolist() if isinstance(raw, Tensor) else list(raw)
    elif hasattr(source, "features") and hasattr(source, "column_names"):  # Hugging Face datasets
        column = next((c for c in ("label", "labels", "fine_label") if c in source.column_names), None)
        if column is None or "image" not in source.column_names:
            raise SkipError(f"expected the columns `image` and `label`; got {source.column_names}")
        names = getattr(source.features[column], "names", None)
        load = lambda i: source[i]["image"]  # noqa: E731
        labels = list(source[column])
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        load = lambda i: source[i][0]  # noqa: E731
        known = getattr(source, "targets", None)
        labels = list(known) if known is not None else [source[i][1] for i in range(len(source))]
    else:
        raise SkipError(
            "expected a folder, a dataset of (image, label) pairs, or a pair (images, labels); "
            f"got {type(source).__name__}"
        )
    if labels and isinstance(labels[0], str):
        if names is None:
            wanted = {plain(name): name for name in classnames or ()}
            found = {plain(label): label for label in sorted(set(labels))}
            names = list((wanted | {k: v for k, v in found.items() if k not in wanted}).values())
        place = {plain(name): i for i, name in enumerate(names)}
        if unknown := sorted({label for label in labels if plain(label) not in place}):
            raise SkipError(f"expected labels among the class names; got {_some(unknown)}")
        labels = [place[plain(label)] for label in labels]
    if odd := [label for label in labels if int(label) != label]:
        raise SkipError(f"expected labels as whole numbers or class names; got {odd[0]!r}")
    labels = [int(label) for label in labels]
    names = names or classnames or [str(i) for i in range(max(labels, default=-1) + 1)]
    if labels and not 0 <= min(labels) <= max(labels) < len(names):
        raise SkipError(
            f"expected labels from 0 to {len(names) - 1} for {len(names)} class names; "
            f"got {min(labels)} to {max(labels)}"
        )
    return Examples(load, labels, list(names))


@dataclass
class Preparer:
    """Pixels and token ids from images and texts, by whatever processor was given.

    Attributes:
        image: PIL image -> pixels [3, H, W]; None if only prepared pixels can be taken.
        text: texts -> token ids [N, L]; None if no tokenizer was given.
        name: what identifies the preprocessing, for the key of a cache.
    """

    image: Callable[[Any], Tensor] | None
    text: Callable[[list[str]], Tensor] | None
    name: str

    def pixels(self, item: Any) -> Tensor:
        """Pixels [3, H, W] of one image."""
        if isinstance(item, Tensor):
            if item.ndim != 3:
                raise SkipError(f"expected prepared pixels [3, H, W] of one image; got {list(item.shape)}")
            if not bool(torch.isfinite(item).all()):
                raise SkipError("expected finite pixels; an image has NaN or infinity: clean or drop it first")
            return item
        if self.image is None:
            raise SkipError(
                "expected prepared pixels [3, H, W], because only a tokenizer was given: "
                "give SkipTuner a processor (CLIPProcessor), which prepares PIL images too"
            )
        return self.image(as_rgb(item, "the image") if hasattr(item, "convert") else item)

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids [N, L] of texts."""
        if self.text is None:
            raise SkipError("expected a tokenizer, because texts have to be encoded; only images can be prepared here")
        return self.text(texts)


def find_preparer(given: Any, *, fixed_length: int | None) -> Preparer:
    """What prepares images and texts.

    Args:
        given: a transformers processor (CLIPProcessor, SiglipProcessor) or tokenizer; a pair
            `(image_transform, tokenizer)` as open_clip gives them; or a function texts -> ids.
        fixed_length: pad every text to this length (SigLIP pools the last position); None pads to the longest.

    Raises:
        SkipError: for anything else.
    """
    if isinstance(given, tuple) and len(given) == 2:
        transform, tokenizer = given
        inner = find_preparer(tokenizer, fixed_length=fixed_length)
        return Preparer(transform, inner.text, repr(transform))
    if hasattr(given, "tokenizer") and hasattr(given, "image_processor"):
        images = given.image_processor

        def image(item: Any) -> Tensor:
            pixels: Tensor = images(images=item, return_tensors="pt")["pixel_values"][0]
            return pixels

        inner = find_preparer(given.tokenizer, fixed_length=fixed_length)
        return Preparer(image, inner.text, repr(images.to_dict()))
    if callable(given):
        return Preparer(None, _text_encoder(given, fixed_length), "")
    if given is None:
        return Preparer(None, None, "")
    raise SkipError(
        "expected a transformers processor or tokenizer, a pair (image_transform, tokenizer), or a function of texts; "
        f"got {type(given).__name__}"
    )


def _text_encoder(tokenizer: Any, fixed_length: int | None) -> Callable[[list[str]], Tensor]:
    def encode(texts: list[str]) -> Tensor:
        if hasattr(tokenizer, "convert_tokens_to_ids") and hasattr(tokenizer, "pad_token"):
            more = {"padding": True} if fixed_length is None else {"padding": "max_length", "max_length": fixed_length}
            out = tokenizer(texts, truncation=True, return_tensors="pt", **more)
        else:
            out = tokenizer(texts)
        if isinstance(out, Mapping) or hasattr(out, "input_ids"):
            out = out["input_ids"]
        return torch.as_tensor(out).long()

    return encode
