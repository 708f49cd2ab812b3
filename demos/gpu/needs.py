"""Which packages the pieces need, and which of them a machine lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions

# name on the package index -> lowest version that works ("" for any). torch is the machine's own and never listed, and
# torchvision goes with it: a machine without it leaves out the pieces that need it.
PACKAGES = {
    "accelerate": "1.1",
    "diffusers": "0.41",
    "filelock": "3.10",
    "huggingface_hub": "1.32",
    "hypothesis": "6.100",
    "importlib_metadata": "",
    "lazy-importer": "",  # of importlib_metadata
    "numpy": "1.24",
    "peft": "0.17",
    "pillow": "",
    "pytest": "8.4",
    "regex": "2025.10.22",
    "requests": "",
    "safetensors": "0.8",
    "timm": "1.0",
    "tokenizers": "0.23.1",
    "tqdm": "4.60",
    "transformers": "5.23",
}


def plain(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parts(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what follows them."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def installed() -> dict[str, str]:
    """What this interpreter has: package -> version."""
    return {plain(each.metadata["Name"]): each.version for each in distributions() if each.metadata["Name"]}


def listed(lines: Iterable[str]) -> dict[str, str]:
    """What another machine has, from the lines of its `pip list` or `pip freeze`, or from names separated by commas."""
    found = {}
    for line in lines:
        for words in (re.split(r"==|\s+", entry.strip()) for entry in line.split(",")):
            if re.match(r"[A-Za-z0-9]", words[0]):
                found[plain(words[0])] = words[1] if len(words) > 1 and words[1][:1].isdigit() else ""
    return found


def missing(have: Mapping[str, str]) -> list[str]:
    """The packages to bring, as pip takes them.

    A package whose version is not known counts as new enough; bring transformers and diffusers where in doubt.
    """
    out = []
    for name, least in PACKAGES.items():
        version = have.get(plain(name))
        if version is None or (version and parts(version) < parts(least)):
            out.append(f"{name}>={least}" if least else name)
    return out


def lacking(names: Iterable[str], have: Mapping[str, str]) -> list[str]:
    """Those of `names` that are missing or too old, in words."""
    out = []
    for name in names:
        version, least = have.get(plain(name)), PACKAGES.get(name, "")
        if version is None:
            out.append(name)
        elif parts(version) < parts(least):
            out.append(f"{name} {least} or newer (here {version})")
    return out
