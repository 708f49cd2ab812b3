"""Support: the tables of what is supported and what is not, from the data that says so."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

from skipguide.families.described import FAMILIES
from skipguide.families.refused import UNSUPPORTED_MODELS
from skipguide.families.vision import VISION_FAMILIES
from skipguide.parts import PARTS
from skipguide.pipelines.presets import PRESETS, KnownModel
from skipguide.pipelines.registry.described import PIPELINES
from skipguide.pipelines.registry.refused import UNSUPPORTED_PIPELINES
from skipguide.pipelines.registry.spec import PipelineSpec
from skipguide.schedule import Timetable
from skipguide.spec import ModelSpec

_PARTS = PARTS[1:]  # every block can be left out
# needs OpenCV, without which diffusers has a stand-in whose constructor tells nothing
_HIDDEN = {"ConsisIDPipeline": "ConsisIDTransformer3DModel"}
_CFG = {
    "batched": "one batch",
    "two_calls": "two calls",
    "named": "one or two calls",
    "single": "one call",
    "guider": "guider",
}


_HALF = {
    "float32": "float32 branches: nothing of guidance is rounded",
    "once": "the result in place of every branch: rounded once, to the model's dtype (where the pipeline rescales by "
    "itself, through the unconditional branch, as below)",
    "rounded": "branches rounded apart, whose difference the pipeline multiplies by its CFG scale w: the skip term is "
    "moved by about r √(w² + (w − 1)²) \\|c\\| / \\|s (c − k)\\|, with r = 0.15 % in bfloat16 and 0.02 % in float16; "
    "`stats.rounding` measures it. Without CFG rounded once",
}


def support_table() -> str:
    """Every described denoiser of diffusers, its parts and the pipelines that drive it, in Markdown.

    Example:
        >>> support_table().splitlines()[0]
        '| denoiser | parts besides `block` | pipelines | preset |'
    """
    driven = _pipelines_by_denoiser()
    lines = ["| denoiser | parts besides `block` | pipelines | preset |", "|---|---|---|---|"]
    for name, spec in FAMILIES.items():
        if name not in VISION_FAMILIES:
            lines.append(f"| `{name}` | {_parts(spec)} | {_driving(driven.get(name, []))} | {_presets(name)} |")
    return "\n".join(lines)


def refusal_tables() -> str:
    """The denoisers and pipelines of diffusers that are refused, with the reason that the user sees, in Markdown.

    Example:
        >>> "| `UNet2DModel` | a UNet of convolutions" in refusal_tables()
        True
    """
    models = [f"| `{name}` | {reason} |" for name, reason in UNSUPPORTED_MODELS.items()]
    by_reason: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED_PIPELINES.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    pipelines = [f"| {reason} | {', '.join(names)} |" for reason, names in by_reason.items()]
    return "\n".join(
        ["| denoiser | why not |", "|---|---|", *models, "", "| why not | pipelines |", "|---|---|", *pipelines]
    )


def half_table() -> str:
    """What each pipeline gets where its denoiser computes in half precision, in Markdown.

    Example:
        >>> half_table().splitlines()[0]
        '| in half precision | pipelines |'
    """
    by_half: dict[str, list[str]] = {half: [] for half in _HALF}
    for name, spec in PIPELINES.items():
        by_half[spec.half].append(f"`{name}`")
    lines = [f"| {words} | {', '.join(by_half[half])} |" for half, words in _HALF.items()]
    return "\n".join(["| in half precision | pipelines |", "|---|---|", *lines])


def document() -> str:
    """What `pipelines/SUPPORTED.md` holds."""
    described = [name for name in FAMILIES if name not in VISION_FAMILIES]
    return (
        "# What is supported\n\n"
        "Written by `python -m demos.support_table` from the data (`skipguide/families/`, `pipelines/registry/`, "
        "`pipelines/presets.py`); a test holds both equal.\n\n"
        f"## Described and proven: {len(described)} denoisers, {len(PIPELINES)} pipelines\n\n"
        "Before the pipelines: how they call their denoiser with CFG. A part with a star is not one of every stack's "
        "blocks.\n\n"
        f"{support_table()}\n\n"
        "## In half precision\n\n"
        "A prediction in bfloat16 or float16 is rounded. What guidance makes of it in float32 reaches the pipeline in "
        "the way that its loop can take, found by giving it float32 (`tests/pipelines/test_half_precision.py`).\n\n"
        f"{half_table()}\n\n"
        f"## Refused: {len(UNSUPPORTED_MODELS)} denoisers, {len(UNSUPPORTED_PIPELINES)} pipelines\n\n"
        f"{refusal_tables()}\n"
    )


def _driving(pipelines: list[str]) -> str:
    """Pipelines, by how they call their denoiser."""
    ways: dict[str, list[str]] = {}
    for name in pipelines:
        ways.setdefault(_cfg(PIPELINES[name]), []).append(f"`{name}`")
    return "; ".join(f"{way}: {', '.join(names)}" for way, names in ways.items()) or "none yet"


def _pipelines_by_denoiser() -> dict[str, list[str]]:
    """Denoiser class -> the pipelines whose constructor asks for it."""
    import diffusers

    found: dict[str, list[str]] = {}
    with warnings.catch_warnings():  # what diffusers imports warns of itself
        warnings.simplefilter("ignore")
        for name, spec in PIPELINES.items():
            pipeline = getattr(diffusers, name, None)  # an older diffusers lacks some
            for model in _asked_for(pipeline, spec) if pipeline is not None else ():
                found.setdefault(model, []).append(name)
    return found


def _asked_for(pipeline: Any, spec: PipelineSpec) -> list[str]:
    """The described denoisers in the annotation of a pipeline's first one."""
    if (name := _HIDDEN.get(pipeline.__name__)) is not None:
        return [name]
    parameter = inspect.signature(pipeline.__init__).parameters.get(spec.denoisers[0])
    words = re.findall(r"\w+", str(parameter.annotation)) if parameter is not None else []
    return [name for name in dict.fromkeys(words) if name in FAMILIES]


def _parts(spec: ModelSpec) -> str:
    stacks = [{part for part in _PARTS if not spec.lacks(stack, part)} for stack in spec.stacks]
    words = [
        part + ("" if all(part in stack for stack in stacks) else "*")
        for part in _PARTS
        if any(part in stack for stack in stacks)
    ]
    return ", ".join(words) or "none"


def _cfg(spec: PipelineSpec) -> str:
    if "true_cfg" in spec.switch:
        return "one call, two with a negative prompt"
    return _CFG[spec.cfg]


def _presets(denoiser: str) -> str:
    return "; ".join(_preset(each) for each in PRESETS if each.model == denoiser)


def _preset(known: KnownModel) -> str:
    if (preset := known.preset) is None:
        return f"{known.name}: none known"
    window = "" if (preset.start, preset.stop) == (0.0, 1.0) else f", {preset.start:g} to {preset.stop:g} of the steps"
    layers = "by noise level" if isinstance(preset.layers, Timetable) else f"`{list(preset.layers)}`"
    scale = "" if isinstance(preset.scale, Timetable) else f", scale {preset.scale:g}"
    others = [each for each, usual in ((preset.part, "block"), (preset.formula, "stg")) if each != usual]
    others += [what for what, own in (("rescale", preset.rescale), ("CFG scale", preset.guidance_scale)) if own]
    return f"{known.name}: {layers}{scale}{''.join(f', {each}' for each in others)}{window} ({preset.origin})"
