"""Write `pipelines/SUPPORTED.md` and the table in README.md from the data: `python -m demos.support_table`."""

from __future__ import annotations

import re
from pathlib import Path

from skipguide.files import replacing
from skipguide.pipelines.registry.support import document, support_table

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write both; the README's table is found by its head."""
    table = support_table()
    head = re.escape(table.splitlines()[0])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path, text in (
        (ROOT / "pipelines" / "SUPPORTED.md", document()),
        (ROOT / "README.md", re.sub(rf"{head}\n(\|.*\n)*", lambda _: table + "\n", readme)),
    ):
        with replacing(path) as (partial,):
            partial.write_text(text, encoding="utf-8")
        print(f"{path} is written")


if __name__ == "__main__":
    main()
