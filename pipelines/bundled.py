"""The bundled text-to-video model, ready to call."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from skipguide.assets import bundled
from skipguide.errors import SkipError
from skipguide.files import parse_json


def bundled_pipeline(name: str = "tiny-t2v") -> tuple[Any, dict[str, Any]]:
    """The bundled text-to-video model and what a call of it should say.

    A stock pipeline takes size, length and steps from its signature, and these suit the large model it was written for:
    at 832x480 pixels, 81 frames and 50 steps this small one draws nothing sensible, for hours. `call` has the
    values it was trained with.

    Args:
        name: of a bundled model that is a pipeline.

    Returns:
        The pipeline, a stock class of diffusers in float32 on the CPU, and `call`, keyword arguments for it beside the
        prompt: a fresh dict, to be changed at will.

    Raises:
        SkipError: if no bundled model of that name is a pipeline.

    Example:
        >>> from skipguide.pipelines import bundled_pipeline
        >>> pipe, call = bundled_pipeline()
        >>> clip = pipe("a red circle moving right", **call | {"num_inference_steps": 2}).frames[0]
        >>> len(clip)
        17
    """
    folder = bundled(name)
    if not (folder / "model_index.json").is_file():
        found = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/model_index.json")))
        raise SkipError(f"the bundled model {name!r} is not a pipeline of diffusers; {found} is")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    return pipe, call_of(folder, type(pipe))


def call_of(folder: Path, pipeline_class: type) -> dict[str, Any]:
    """What a folder's `generation.json` says that this class takes in a call."""
    path = folder / "generation.json"
    said = parse_json(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}
    taken = inspect.signature(pipeline_class.__call__).parameters
    return {argument: value for argument, value in said.items() if argument in taken}
