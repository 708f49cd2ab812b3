"""Write `pipelines/SUPPORTED.md`, the one place of its tables, from the data: `python -m demos.support_table`."""

from __future__ import annotations

from pathlib import Path

from skipguide.files import replacing
from skipguide.pipelines.registry.support import document

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the file in one rename."""
    path = ROOT / "pipelines" / "SUPPORTED.md"
    with replacing(path) as (partial,):
        partial.write_text(document(), encoding="utf-8")
    print(f"{path} is written")


if __name__ == "__main__":
    main()
