"""Saved vision models for the commands: a bundled one, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.assets import bundled
from skipguide.cli.models import choose_device
from skipguide.errors import SkipError
from skipguide.files import read_json

if TYPE_CHECKING:
    import argparse


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--model` and `--device`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=default,
        help="the bundled one, a folder with a saved model, or a hub id (default: %(default)s)",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")


def load(kind: Any, name: str, default: str, device: str) -> tuple[Any, str]:
    """The model in eval mode, and its device.

    Args:
        kind: the class with `from_pretrained`.
        name: `default`, a folder or a hub id.
        default: the bundled model's name.
        device: as given on the command line.

    Raises:
        SkipError: if there is no such model, or it is of another kind.
    """
    place = choose_device(device)
    folder = bundled(default) if name == default else Path(name)
    if name != default and not folder.exists():
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise SkipError(f"no model {name!r}: expected {default} (bundled), a folder, or a hub id")
        source: str | Path = name
    else:
        _check_folder(folder, kind.__name__)
        source = folder
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # huggingface_hub says where it reads
            model = kind.from_pretrained(source)
    except SkipError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SkipError(f"{name} is not a saved {kind.__name__}: {reason}") from error
    return model.eval().to(place), place


def _check_folder(folder: Path, kind: str) -> None:
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise SkipError(f"{folder} has no {file}: expected a folder that {kind}.save_pretrained wrote")
    config = read_json(folder / "config.json")
    mark = {"UNetPlusPlus": "deep_supervision", "FloorPlanNet": "map_size"}[kind]
    if not isinstance(config, dict) or mark not in config:
        raise SkipError(f"{folder} is not a saved {kind}: its config.json has no {mark!r}")
