"""Write `pipelines/SUPPORTED.md` from the data (`python -m demos.support_table`), or print the README's table."""

from __future__ import annotations

import argparse
from pathlib import Path

from skipguide.files import replacing
from skipguide.pipelines.support import document, support_table

TARGET = Path(__file__).resolve().parents[1] / "pipelines" / "SUPPORTED.md"


def main() -> None:
    """Write or print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the table of what is supported instead")
    if parser.parse_args().table:
        print(support_table())
        return
    with replacing(TARGET) as (partial,):
        partial.write_text(document(), encoding="utf-8")
    print(f"{TARGET} is written")


if __name__ == "__main__":
    main()
