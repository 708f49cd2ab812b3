"""Setting: what a person chose on the page, as data, and as the Python that makes the same clip."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipguide.config import JsonConfig, as_number, as_whole, layer_tuple
from skipguide.errors import SkipError

LONGEST = 2000  # letters of a prompt
MOST_STEPS = 200


@dataclass(frozen=True)
class Setting(JsonConfig):
    """One clip, with and without skip guidance.

    Args:
        model: a bundled name, a folder, or a hub id.
        prompt: the text.
        layers: blocks to leave out; none takes the model's preset, with its scale and part.
        scale: of the skip guidance.
        part: of the blocks.
        start: of the window, as a fraction of the steps.
        stop: of the window.
        guidance_scale: of CFG.
        steps: of sampling.
        seed: of the noise.

    Raises:
        SkipError: for what cannot be one.
    """

    model: str
    prompt: str
    layers: Sequence[int] = ()
    scale: float = 1.0
    part: str = "block"
    start: float = 0.0
    stop: float = 1.0
    guidance_scale: float = 4.0
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no pipeline takes; what depends on the model is refused by its own check."""
        model: Any = self.model
        prompt: Any = self.prompt
        if not isinstance(model, str) or not model.strip():
            raise SkipError("expected a model: a bundled name, a folder, or a hub id; got nothing")
        if not isinstance(prompt, str) or not prompt.strip():
            raise SkipError("expected a prompt in words; got an empty one")
        if len(self.prompt) > LONGEST:
            raise SkipError(f"expected a prompt of at most {LONGEST} letters; got {len(self.prompt)}")
        object.__setattr__(self, "layers", layer_tuple(self.layers) if self.layers else ())
        for name in ("scale", "start", "stop", "guidance_scale"):
            object.__setattr__(self, name, float(as_number(name, getattr(self, name))))
        for name in ("steps", "seed"):
            object.__setattr__(self, name, as_whole(name, getattr(self, name), None))
        if not 1 <= self.steps <= MOST_STEPS:
            raise SkipError(f"expected 1 to {MOST_STEPS} steps; got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise SkipError(f"expected a seed from 0 on; got {self.seed}")

    @property
    def guidance(self) -> dict[str, Any]:
        """The arguments of `SpatiotemporalSkipGuidance`."""
        if not self.layers:
            return {}
        found: dict[str, Any] = {"layers": list(self.layers), "scale": self.scale, "part": self.part}
        return found | {"start": self.start, "stop": self.stop}

    def flags(self) -> argparse.Namespace:
        """What the commands would have been told."""
        given = {"steps": self.steps, "guidance_scale": self.guidance_scale, "fps": None}
        return argparse.Namespace(**given)

    def to_json(self) -> str:
        """As the page gives it away."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def as_python(setting: Setting, call: Mapping[str, Any], *, bundled: bool, dtype: str) -> str:
    """A program that makes the guided clip of a setting, to the bit on the same machine.

    Args:
        setting: what was chosen.
        call: with what the pipeline was called, beside prompt and generator.
        bundled: whether the model came with skipguide.
        dtype: the precision it was loaded in.
    """
    where = f"bundled({setting.model!r})" if bundled else repr(setting.model)
    arguments = ", ".join(f"{name}={value!r}" for name, value in setting.guidance.items())
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        *(["from skipguide.assets import bundled"] if bundled else []),
        "from skipguide.pipelines import SpatiotemporalSkipGuidance",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({where}, torch_dtype=torch.{dtype})",
        f"call = {dict(call)!r}",
        f"generator = torch.Generator().manual_seed({setting.seed})",
        f"with SpatiotemporalSkipGuidance({arguments}).apply(pipe) as applied:",
        f"    output = pipe(prompt={setting.prompt!r}, generator=generator, **call)",
        "print(applied.stats)",
    ]
    return "\n".join(lines)
