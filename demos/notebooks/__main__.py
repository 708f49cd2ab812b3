"""Runs the notebooks again and writes their outputs.

python -m demos.notebooks                         # all of them, some minutes
python -m demos.notebooks removing_a_region       # one
"""

from __future__ import annotations

import argparse
import base64
import io
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
TIMEOUT = 600  # seconds a cell
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
LARGEST = 400_000  # bytes of a notebook with its pictures


def names() -> list[str]:
    """Every notebook, without its ending."""
    return sorted(path.stem for path in HERE.glob("*.ipynb"))


def run(name: str) -> Any:
    """The notebook as it is after a run in a kernel of its own; the file is left as it was.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails.
    """
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute(env=os.environ | QUIET)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _smaller(png: str) -> str:
    """A picture in base64 with 256 colours, which is a third of the bytes and looks the same."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    packed = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names())}; all by default")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names()):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    for name in tqdm(args.names or names()):
        text = nbformat.writes(run(name)) + "\n"
        if len(text) > LARGEST:
            parser.error(
                f"{name} has {len(text):,} bytes with its outputs, more than {LARGEST:,}: make its pictures smaller"
            )
        partial = HERE / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(HERE / f"{name}.ipynb")


if __name__ == "__main__":
    main()
