"""Files of the Modified Swiss Dwellings data set: read, prepare, write, submit.

A folder holds `struct_in/<id>.npy` (`[H, W, 3]`, channel 0 is 0 on walls and 255 elsewhere), `graph_in/<id>.pickle`
(networkx; nodes have `zoning_type`, edges `connectivity`) and, but for the test set, `full_out/<id>.npy` (channel 0 is
the class: 0 to 9 as in `CLASSES`, 10 to 12 openings in walls, 13 background).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.files import replacing
from skipguide.vision.floorplan.graph_files import read_graph
from skipguide.vision.floorplan.plan import BACKGROUND, CLASSES, IGNORE, Plan, as_classes
from skipguide.vision.floorplan.regions import outside

if TYPE_CHECKING:
    from PIL.Image import Image

MSD_BACKGROUND = 13
OPENINGS = (10, 11, 12)


def preprocess(structure: NDArray[Any], gap: int = 0) -> Tensor:
    """The three channels a net sees, from the walls alone (arXiv 2309.13881, section 3.1).

    A flood fill from the border finds the outside; the authors use a large segmentation model for it.

    Args:
        structure: `[H, W]` or `[H, W, C]`, 0 on walls and 255 elsewhere in channel 0.
        gap: close openings in the outer walls up to twice this many pixels wide before filling.

    Returns:
        Floats `[3, H, W]` in 0..1: outside with the walls at one half, outside, and the structure as it came.

    Raises:
        SkipError: for another shape, an empty array, values outside 0..255, a mask of 0 and 1, or inverted walls.

    Example:
        >>> walls = np.full((5, 5), 255); walls[1:4, 1:4] = 0; walls[2, 2] = 255
        >>> preprocess(walls)[1].long().tolist()[2]
        [1, 0, 0, 0, 1]
    """
    values = np.asarray(structure)
    if values.ndim not in (2, 3) or values.size == 0 or values.dtype.kind not in "iuf":
        raise SkipError(f"expected a structure of numbers [H, W] or [H, W, C]; got {values.dtype} {values.shape}")
    values = values[..., 0] if values.ndim == 3 else values
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
        raise SkipError(f"expected structure values 0 (wall) to 255; got {values.min()} to {values.max()}")
    if 0 < values.max() < 128:
        raise SkipError(
            f"expected 255 where there is no wall; got values up to {values.max()}, which are walls all over"
        )
    if gap < 0:
        raise SkipError(f"expected a gap of at least 0; got {gap}")
    walls = values < 128
    frame = np.concatenate([walls[0], walls[-1], walls[:, 0], walls[:, -1]])
    if frame.all() and walls.mean() > 0.5 and not walls.all():
        raise SkipError(
            f"expected 0 on walls and 255 elsewhere; here {100 * walls.mean():.0f} % is wall, all of the border too: "
            "if the picture is inverted (white walls), pass 255 - structure"
        )
    around = outside(walls, gap)
    channels = np.stack([np.where(walls, 128, np.where(around, 255, 0)), np.where(around, 255, 0), values])
    return torch.from_numpy(channels.astype(np.float32) / 255)


def to_classes(full_out: NDArray[Any]) -> Tensor:
    """`[H, W]` of our classes from the data set's; openings become `IGNORE`, left out of loss and measure."""
    values = np.asarray(full_out)
    if values.ndim not in (2, 3) or values.size == 0 or values.dtype.kind not in "iuf":
        raise SkipError(f"expected classes as numbers [H, W] or [H, W, C]; got {values.dtype} {values.shape}")
    values = values[..., 0] if values.ndim == 3 else values
    table = np.full(MSD_BACKGROUND + 1, IGNORE, dtype=np.int64)
    table[:BACKGROUND] = np.arange(BACKGROUND)
    table[MSD_BACKGROUND] = BACKGROUND
    if not np.isin(values, np.arange(len(table))).all():
        raise SkipError(f"expected classes 0..{MSD_BACKGROUND} of shape [H, W]; got {np.shape(full_out)}")
    return torch.from_numpy(table[values.astype(np.int64)])


class MSDFolder(torch.utils.data.Dataset[Plan]):
    """The plans of a folder, in the order of their ids.

    Args:
        root: holds `struct_in`, `graph_in` and, for training, `full_out`.
        size: side in pixels to reduce the 512 of the data set to, by taking evenly spaced rows and columns.
        gap: see `preprocess`.

    Raises:
        SkipError: if files are missing, or for a size below 1.
    """

    def __init__(self, root: str | Path, size: int | None = None, gap: int = 0) -> None:
        if size is not None and size < 1:
            raise SkipError(f"expected a size of at least 1 pixel; got {size}")
        self.root, self.size, self.gap = Path(root), size, gap
        ids = {kind: _ids(self.root / kind, suffix) for kind, suffix in (("struct_in", "npy"), ("graph_in", "pickle"))}
        if not ids["struct_in"]:
            raise SkipError(f"expected {self.root}/struct_in/<id>.npy and {self.root}/graph_in/<id>.pickle; found none")
        if missing := sorted(ids["struct_in"] ^ ids["graph_in"]):
            raise SkipError(f"{len(missing)} plans lack their struct_in or graph_in, such as {missing[:3]}")
        self.ids = sorted(ids["struct_in"], key=lambda name: (len(name), name))
        targets = _ids(self.root / "full_out", "npy")
        if targets and (missing := sorted(ids["struct_in"] - targets)):
            raise SkipError(f"{len(missing)} plans lack their full_out, such as {missing[:3]}")
        self.has_targets = bool(targets)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Plan:
        name = self.ids[index]
        structure = self._load("struct_in", name)
        target = to_classes(self._load("full_out", name)) if self.has_targets else None
        if target is not None and target.shape != structure.shape[:2]:
            raise SkipError(f"plan {name}: structure {structure.shape[:2]} and classes {tuple(target.shape)} differ")
        image = preprocess(structure, self.gap)
        if self.size is not None:
            rows, columns = (torch.arange(self.size) * side // self.size for side in image.shape[1:])
            image = image[:, rows][:, :, columns]
            target = None if target is None else target[rows][:, columns]
        return Plan(image, read_graph(self.root / "graph_in" / f"{name}.pickle"), target, name)

    def _load(self, kind: str, name: str) -> NDArray[Any]:
        path = self.root / kind / f"{name}.npy"
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise SkipError(f"{path} is not a readable array: {error}") from error


def _ids(folder: Path, suffix: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*.{suffix}")}


def submission_image(classes: Tensor) -> Image:
    """A plan as the challenge wants it: one byte per pixel, background as 13.

    Args:
        classes: `[H, W]`, or logits `[11, H, W]`.

    Raises:
        SkipError: for another shape or classes out of range.
    """
    from PIL import Image

    found = as_classes(classes)
    if found.ndim != 2 or found.is_floating_point() or not 0 <= int(found.min()) <= int(found.max()) < len(CLASSES):
        raise SkipError(f"expected classes 0..{len(CLASSES) - 1} [H, W] or logits; got {tuple(classes.shape)}")
    return Image.fromarray(torch.where(found == BACKGROUND, MSD_BACKGROUND, found).numpy().astype(np.uint8))


def save_submission(classes: Tensor, folder: str | Path, name: str, overwrite: bool = False) -> Path:
    """Write `submission_image` as `<id>.png`, whole or not at all.

    Args:
        classes: `[H, W]`, or logits `[11, H, W]`.
        folder: is made if it is missing.
        name: the plan's id.
        overwrite: replace a file that is there.

    Raises:
        SkipError: for another shape, classes out of range, or a file that is there.
    """
    image = submission_image(classes)
    path = Path(folder) / f"{name}.png"
    if path.exists() and not overwrite:
        raise SkipError(f"{path} exists already: choose another folder, or pass overwrite=True")
    with replacing(path) as (partial,):
        image.save(partial)
    return path


def write_plan(plan: Plan, root: str | Path, overwrite: bool = False) -> None:
    """Write a plan as three files that `MSDFolder` reads, all of them or none.

    Args:
        plan: with a name and a target.
        root: is made if it is missing.
        overwrite: replace files that are there.

    Raises:
        SkipError: for a plan without name or target, or a file that is there.
    """
    if not plan.name or plan.target is None:
        raise SkipError("expected a plan with a name and a target")
    structure = (plan.image[2] * 255).round().to(torch.uint8).numpy()
    target = plan.target.numpy()
    target = np.where(target == BACKGROUND, MSD_BACKGROUND, np.where(target == IGNORE, OPENINGS[0], target))
    graph = plan.graph.to_networkx()
    files = [Path(root) / kind / f"{plan.name}.npy" for kind in ("struct_in", "full_out")]
    files.append(Path(root) / "graph_in" / f"{plan.name}.pickle")
    if (found := [str(path) for path in files if path.exists()]) and not overwrite:
        raise SkipError(f"{found[0]} exists already: choose another folder or name, or pass overwrite=True")
    with replacing(*files) as partial:
        for path, values in zip(partial[:2], (structure, target.astype(np.uint8)), strict=True):
            np.save(path, np.repeat(values[..., None], 3, axis=-1))
        partial[2].write_bytes(pickle.dumps(graph))
