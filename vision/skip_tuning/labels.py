"""Labels: class names and numbers, from whatever holds them, so that a number never means another class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipguide.config import native
from skipguide.errors import SkipError


def plain(name: str) -> str:
    """A class name as it is written in a prompt: `_` of folder names becomes a blank, `-` stays (a t-shirt)."""
    return " ".join(name.replace("_", " ").split())


def refuse_twins(names: Sequence[str], where: str = "the class names") -> None:
    """Refuse names that are one class in a prompt, such as `red_circle` and `red circle`: their images would merge."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(plain(name), name)) != name:
            raise SkipError(
                f"expected different classes among {where}; {other!r} and {name!r} are one in a prompt: rename one, or "
                "move the images into one folder"
            )


def read_labels(source: Any, classnames: Sequence[str] | None, alone: bool) -> tuple[list[int], list[str]]:
    """The labels of a data set as numbers, and the names that they count.

    Args:
        source: a data set of `(image, label)` pairs, also as a part or a chain of others (`Subset`, `ConcatDataset`);
            with `alone` the labels themselves.
        classnames: the names, where the data has none of its own.
        alone: `source` is the labels.

    Raises:
        SkipError: for labels that are neither whole numbers nor names, or count other names.
    """
    labels, names = (_listed(source), None) if alone else _of_dataset(source)
    for place, label in enumerate(labels):
        if label is None or isinstance(label, list | tuple | dict):
            hint = "drop images without a label" if label is None else "of one-hot rows, pass labels.argmax(1)"
            raise SkipError(f"expected one label for each image; image {place} has {label!r}: {hint}")
    texts = [label for label in labels if isinstance(label, str)]
    if texts and len(texts) < len(labels):
        raise SkipError(f"expected labels as whole numbers or as class names; got both, such as {texts[0]!r}")
    if texts:
        found = sorted(set(labels))
        refuse_twins(found, "the labels")
        if names is None:
            wanted = {plain(name): name for name in classnames or ()}
            fresh = {plain(label): label for label in found}
            names = list((wanted | {k: v for k, v in fresh.items() if k not in wanted}).values())
        place_of = {plain(name): i for i, name in enumerate(names)}
        if unknown := [label for label in found if plain(label) not in place_of]:
            shown = ", ".join(map(repr, unknown[:5]))
            raise SkipError(f"expected labels among the class names; got {shown}")
        labels = [place_of[plain(label)] for label in labels]
    numbers = []
    for label in labels:
        try:
            whole = int(label)
        except (TypeError, ValueError, OverflowError):
            whole = None
        if whole is None or whole != label:
            raise SkipError(f"expected labels as whole numbers or class names; got {label!r}")
        numbers.append(whole)
    names = list(names or classnames or [str(i) for i in range(max(numbers, default=-1) + 1)])
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(names):
        raise SkipError(
            f"expected labels from 0 to {len(names) - 1} for {len(names)} class names; "
            f"got {min(numbers)} to {max(numbers)}"
        )
    return numbers, names


def _listed(values: Any) -> list[Any]:
    """Labels as Python's own."""
    found = native(values)
    return [native(value) for value in found]


def _of_dataset(source: Any) -> tuple[list[Any], list[str] | None]:
    """Labels and class names of a data set, looking through those that are parts of others."""
    if hasattr(source, "indices") and hasattr(source, "dataset"):  # torch.utils.data.Subset
        labels, names = _of_dataset(source.dataset)
        return [labels[int(i)] for i in native(source.indices)], names
    if hasattr(source, "cumulative_sizes") and hasattr(source, "datasets"):  # torch.utils.data.ConcatDataset
        parts = [_of_dataset(part) for part in source.datasets]
        known = [names for _, names in parts]
        if any(names != known[0] for names in known):
            raise SkipError(
                f"expected data sets with the same classes; {known[0]} and {next(n for n in known if n != known[0])} "
                "count differently: pass (images, names) with the classes' names as labels"
            )
        return [label for labels, _ in parts for label in labels], known[0]
    if hasattr(source, "features") and hasattr(source, "column_names"):  # Hugging Face datasets
        column = next((c for c in ("label", "labels", "fine_label") if c in source.column_names), None)
        if column is None:
            raise SkipError(f"expected the columns `image` and `label`; got {source.column_names}")
        return _listed(source[column]), getattr(source.features[column], "names", None)
    given = getattr(source, "targets", None)
    changed = getattr(source, "target_transform", None) is not None
    # `targets` are the labels before `target_transform`, so then the items are asked.
    labels = _listed(given) if given is not None and not changed else [native(source[i][1]) for i in range(len(source))]
    return labels, None if changed else _names(source)


def _names(source: Any) -> list[str] | None:
    """The class names of a data set; torchvision's ImageNet has tuples of synonyms, of which the first counts."""
    found = getattr(source, "classes", None)
    if found is None:
        return None
    first = [name[0] if isinstance(name, tuple) and name else name for name in found]
    if any(not isinstance(name, str) for name in first):
        raise SkipError(f"expected class names as texts in `classes`; got {first[0]!r}")
    if len(set(first)) == len(first):
        return first
    return [", ".join(name) if isinstance(name, tuple) else name for name in found]
