"""State dicts of other people's files: read without running code, by the names of the bare network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError

HOLDERS = ("state_dict", "model_state_dict", "model", "net", "module")
WRAPPERS = ("module.", "_orig_mod.")


def read_state_dict(source: Any) -> dict[str, Tensor]:
    """The tensors of a state dict by the names of the bare network.

    Args:
        source: a state dict; a checkpoint that holds one under "state_dict", "model" or the like; or the path of a file
            with either, of torch or safetensors. Prefixes of `nn.DataParallel` (`module.`) and `torch.compile`
            (`_orig_mod.`) are taken off, however often they are there.

    Raises:
        SkipError: for a file that cannot be read or holds more than tensors, or for NaN.
    """
    if isinstance(source, str | Path):
        source = _from_file(Path(source))
    while isinstance(source, Mapping) and (
        held := next((source[key] for key in HOLDERS if isinstance(source.get(key), Mapping)), None)
    ):
        source = held
    if not isinstance(source, Mapping) or not source:
        raise SkipError(f"expected a state dict, a checkpoint with one, or a path; got {type(source).__name__}")
    if wrong := [str(key) for key, value in source.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise SkipError(f"expected tensors under every key of the state dict; not one is under {wrong[:5]}")
    if broken := [key for key, t in source.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
        raise SkipError(f"the checkpoint has NaN or infinity in {broken[:5]}")
    found = _StateDict()
    for key, value in source.items():
        name = _bare(str(key))
        if name in found:
            raise SkipError(f"the checkpoint has {name!r} twice, once with a prefix: keep one of the two")
        found[name] = value
    # The versions of the modules' own layouts, by which some read older files.
    found._metadata = {
        _bare(f"{key}.")[:-1]: about for key, about in (getattr(source, "_metadata", None) or {}).items()
    }
    return found


class _StateDict(dict[str, Tensor]):
    """A state dict with the place where torch keeps versions."""

    _metadata: dict[str, Any]


def _bare(name: str) -> str:
    """A name without what wrappers put before it."""
    while prefix := next((each for each in WRAPPERS if name.startswith(each)), None):
        name = name.removeprefix(prefix)
    return name


def _from_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SkipError(
            f"cannot read a checkpoint from {path}: it is damaged, or holds more than tensors and plain data (a whole "
            "pickled model, NumPy scalars, settings of a class), which could run code. Where it was made, write "
            "torch.save(model.state_dict(), path)"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise SkipError(f"cannot read a checkpoint from {path}: {error}") from error
    except Exception as error:  # safetensors has an exception of its own
        if type(error).__name__ != "SafetensorError":
            raise
        raise SkipError(f"cannot read a checkpoint from {path}: {error}") from error
