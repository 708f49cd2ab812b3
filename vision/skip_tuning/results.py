"""Results of a run: its cost, its accuracy, and the base/new table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from skipguide.config import JsonConfig, as_numbers, is_one_of, normalize_fields
from skipguide.errors import SkipError
from skipguide.files import replacing

PEAKS = ("max_memory_allocated", "peak resident set")


@dataclass(frozen=True)
class TuneReport(JsonConfig):
    """What a fit cost. Every number is measured.

    Attributes:
        seconds: wall clock of the whole call, feature extraction included.
        extraction_seconds: part of it that went into prefix features.
        peak_bytes: `max_memory_allocated` on a GPU, the highest resident set of the process so far on the CPU.
        peak_kind: which of the two.
        cache_bytes: prefix features of images and texts.
        trained: parameters that were trained.
        total: parameters of the model.
        steps: optimizer steps of this call (a resumed run counts only its own).
        classes: number of classes.
        kept: classes that a step compared with, on average.
        losses: mean loss of every epoch, also of those before a resume.
        exactness: largest difference between the resumed and the full pass, relative to the features.
        resumed_from: the epoch this call started at.
    """

    seconds: float
    extraction_seconds: float
    peak_bytes: int
    peak_kind: Literal["max_memory_allocated", "peak resident set"]
    cache_bytes: int
    trained: int
    total: int
    steps: int
    classes: int
    kept: float
    losses: Sequence[float] = field(default_factory=list)
    exactness: float = 0.0
    resumed_from: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run costs."""
        counts = ("peak_bytes", "cache_bytes", "trained", "total", "steps", "classes", "resumed_from")
        normalize_fields(
            self, dict.fromkeys(counts, 0), dict.fromkeys(("seconds", "extraction_seconds", "kept", "exactness"), 0)
        )
        object.__setattr__(self, "losses", as_numbers("losses", self.losses))
        if not is_one_of(self.peak_kind, PEAKS):
            raise SkipError(f"expected peak_kind as one of {', '.join(PEAKS)}; got {self.peak_kind!r}")

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s ({self.extraction_seconds:.1f} s of it extracting features), "
            f"{self.peak_bytes / 2**20:.0f} MiB {self.peak_kind}, {self.cache_bytes / 2**20:.1f} MiB of cached "
            f"features, {self.trained:,} of {self.total:,} parameters trained, {self.steps} steps, "
            f"{self.kept:.1f} of {self.classes} classes per step"
        )


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on some images.

    Attributes:
        accuracy: share of images whose best class is right.
        count: how many images.
        per_class: class name -> accuracy; classes without images are left out.
    """

    accuracy: float
    count: int
    per_class: dict[str, float]

    def __float__(self) -> float:
        return self.accuracy


def harmonic(base: float, new: float) -> float:
    """H of the base/new protocol: the harmonic mean, 0 if both are.

    Example:
        >>> round(harmonic(0.8504, 0.7753), 4)
        0.8111
    """
    return 2 * base * new / (base + new) if base + new else 0.0


@dataclass(frozen=True)
class BaseNew:
    """Accuracy on the classes that were trained and on others, each among its own class names.

    Attributes:
        base: accuracy on the base classes.
        new: accuracy on the new classes.
        label: what the row is called.
    """

    base: float
    new: float
    label: str = "SkipTuner"

    @property
    def h(self) -> float:
        """Their harmonic mean."""
        return harmonic(self.base, self.new)

    def to_markdown(self) -> str:
        """A table with one row, in percent."""
        return markdown_table([self])

    def to_csv(self) -> str:
        """A table with one row, as fractions."""
        return csv_table([self])

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the table; the ending chooses: `.csv` or `.md`.

        Raises:
            SkipError: for another ending, or if the file exists and `overwrite` is False.
        """
        path = Path(path)
        if path.suffix not in (".csv", ".md"):
            raise SkipError(f"expected a file name that ends in .csv or .md; got {path}")
        if path.exists() and not overwrite:
            raise SkipError(f"{path} exists; pass overwrite=True to replace it")
        with replacing(path) as (temporary,):
            temporary.write_text(self.to_csv() if path.suffix == ".csv" else self.to_markdown(), encoding="utf-8")

    def __str__(self) -> str:
        return f"Base {100 * self.base:.2f}  New {100 * self.new:.2f}  H {100 * self.h:.2f}"


def markdown_table(rows: Sequence[BaseNew]) -> str:
    """Base, New and H in percent."""
    lines = ["| | Base | New | H |", "|---|---|---|---|"]
    lines += [f"| {r.label} | {100 * r.base:.2f} | {100 * r.new:.2f} | {100 * r.h:.2f} |" for r in rows]
    return "\n".join(lines) + "\n"


def csv_table(rows: Sequence[BaseNew]) -> str:
    """Base, New and H as fractions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["label", "base", "new", "h"])
    writer.writerows([[r.label, r.base, r.new, r.h] for r in rows])
    return out.getvalue()


def split_base_new(classnames: Sequence[str]) -> tuple[list[str], list[str]]:
    """The usual split: the first half of the sorted names (rounded up) is base, the rest is new.

    Example:
        >>> split_base_new(["cat", "ant", "bee"])
        (['ant', 'bee'], ['cat'])
    """
    names = sorted(classnames)
    half = (len(names) + 1) // 2
    return names[:half], names[half:]
