"""What was measured of every photo in one file, small enough to be committed: hours go on on another machine.

A cell has some hundred rows with the same keys. By columns and compressed it takes a kilobyte, a fiftieth of its own.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from demos.study import Cells
from skipguide.files import replacing

Cell = dict[str, Any]


def pack(folder: Path, path: Path) -> None:
    """Write the cells of a folder into one file, which is replaced if there is one."""
    cells = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-*.json"))}
    text = json.dumps({name: _by_columns(cell) for name, cell in cells.items()}, separators=(",", ":"))
    with replacing(path) as (partial,):
        partial.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def unpack(path: Path, cells: Cells) -> None:
    """Put what `pack` wrote among the cells; those that are there stay."""
    for name, cell in json.loads(lzma.decompress(path.read_bytes())).items():
        cells(name, lambda cell=cell: _by_rows(cell))


def _by_columns(cell: Cell) -> Cell:
    rows = cell["rows"]
    return cell | {"rows": {key: [row[key] for row in rows] for key in rows[0]}}


def _by_rows(cell: Cell) -> Cell:
    columns = cell["rows"]
    return cell | {"rows": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}
