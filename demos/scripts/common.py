"""What the scripts share: their command line, and saving sound."""

from __future__ import annotations

import argparse
import tempfile
import wave
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def options(
    about: str | None, name: str, argv: list[str] | None = None, beside: str | None = None
) -> argparse.Namespace:
    """Reads `[prompt] [-o FILE] [--seed N] [--tiny] [--force]`; stops before anything is loaded if `FILE` cannot be.

    Args:
        about: the docstring of the script, which `--help` prints.
        name: where the result goes if nothing is said: here, or with `--tiny` in a new temporary folder.
        argv: the arguments; None reads those of the process.
        beside: the suffix of a second file that is written beside the first.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a tram in the rain")
    parser.add_argument("-o", "--out", type=Path, help=f"default: {name}, with --tiny in a new temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a tiny random pipeline on the CPU: nothing is downloaded")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    args = parser.parse_args(argv)
    if args.tiny:
        torch.set_num_threads(
            1
        )  # threads that wait for each other make tiny models a hundred times slower on busy cores
    if not args.tiny and not torch.accelerator.is_available():
        parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")
    if args.out is None:
        args.out = (Path(tempfile.mkdtemp(prefix="skipguide-script-")) if args.tiny else Path()) / name
    known = [".mp4"] if name.endswith(".mp4") else sorted(Image.registered_extensions())
    if args.out.suffix.lower() not in known:
        parser.error(f"expected a name that ends with {name[-4:]}, got {args.out}")
    if not args.out.parent.is_dir():
        parser.error(f"there is no folder {args.out.parent}: make it first, or name another file with -o")
    for path in [args.out, *([args.out.with_suffix(beside)] if beside else [])]:
        if path.is_dir() or (path.exists() and not args.force):
            parser.error(f"{path} is there already: name another file with -o, or say --force to replace a file")
    return args


def save_sound(sound: Tensor, path: Path, rate: int) -> None:
    """Writes a sound `[channels, samples]` between -1 and 1 as a WAV file of 16 bits."""
    samples = (sound.detach().float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.contiguous().numpy().tobytes())
