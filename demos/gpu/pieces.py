"""The pieces, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from demos.gpu.setting import Setting


@dataclass(frozen=True)
class Piece:
    """One part of the whole.

    Attributes:
        name: how it is asked for.
        budget: seconds that it may take on an H200.
        needs: packages.
        module: of this folder, imported when the piece runs, so that what it needs is not missed earlier.
        function: of the module; takes the setting and `given`, returns figures.
        given: further arguments.
    """

    name: str
    budget: float
    needs: Sequence[str]
    module: str
    function: str = "measure"
    given: Sequence[Any] = ()

    def run(self, setting: Setting) -> dict[str, Any]:
        """The figures."""
        function: Callable[..., dict[str, Any]] = getattr(import_module(f"demos.gpu.{self.module}"), self.function)
        return function(setting, *self.given)


VIDEO = ("diffusers", "transformers", "accelerate")
LANGUAGE = ("transformers",)
PIECES = (
    Piece("ltx", 40, VIDEO, "video", given=("ltx",)),
    Piece("tail_ltx", 45, VIDEO, "tail", given=("ltx",)),
    Piece("wan", 50, VIDEO, "video", given=("wan",)),
    Piece("decode", 45, LANGUAGE, "language", "decode"),
    Piece("prefill", 35, LANGUAGE, "language", "short"),
    Piece("skipnet", 25, ("torchvision",), "gates"),
    Piece("masking", 25, ("torchvision",), "masking"),
    Piece("tuning", 40, ("transformers", "torchvision"), "tuning"),
    Piece("ltx2", 50, VIDEO, "video", given=("ltx2",)),
    Piece("hunyuan", 45, VIDEO, "video", given=("hunyuan",)),
    Piece("tests", 150, ("pytest", "diffusers", "transformers", "peft"), "device_tests"),
    Piece("tail_wan", 35, VIDEO, "tail", given=("wan",)),
    Piece("prefill_128k", 90, LANGUAGE, "language", "long"),
    Piece("compile_ltx", 60, VIDEO, "compiled", given=("ltx",)),
    Piece("compile_wan", 60, VIDEO, "compiled", given=("wan",)),
)
BY_NAME = {piece.name: piece for piece in PIECES}
