"""Clips: a pipeline for the page, and the clip of a setting, plain or guided, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipguide.cli import models, pipeline_calls
from skipguide.cli.studio.setting import Setting, as_python
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class StudioPipeline:
    """A loaded pipeline.

    Args:
        source: where it is from.
        pipe: the pipeline.
        defaults: what its own folder says a call should use.
        dtype: its precision.
    """

    source: models.Source
    pipe: Any
    defaults: dict[str, Any]
    dtype: str

    def call(self, setting: Setting) -> dict[str, Any]:
        """With what the pipeline is called, beside prompt and generator."""
        return pipeline_calls.call_arguments(type(self.pipe), setting.flags(), self.defaults)

    def python(self, setting: Setting) -> str:
        """The program of a setting."""
        return as_python(setting, self.call(setting), bundled=self.source.bundled, dtype=self.dtype)


@dataclass(frozen=True)
class Controls:
    """What the controls of the page may be set to for a model.

    Args:
        layers: the blocks, each with its name.
        parts: that they have.
        preset: layers, scale and part; empty where there is none.
        steps: that the model is made for.
        guidance_scale: of CFG.
        words: what is said of it.
    """

    layers: list[tuple[str, int]]
    parts: list[str]
    preset: dict[str, Any]
    steps: int
    guidance_scale: float
    words: str


def load(name: str, device: str = "auto") -> StudioPipeline:
    """A pipeline by what a visitor calls it.

    Raises:
        SkipError: if there is no such pipeline, or guidance does not know it.
    """
    source = models.resolve(name)
    models.pipeline_class(source)
    place = models.choose_device(device)
    dtype = models.choose_dtype("auto", place, bundled=source.bundled)
    pipe = models.load_pipeline(source, place, dtype)
    pipe.set_progress_bar_config(disable=True)
    return StudioPipeline(source, pipe, source.defaults(), dtype)


def controls(loaded: StudioPipeline) -> Controls:
    """What can be set for a model.

    Raises:
        SkipError: if guidance does not know its blocks.
    """
    from skipguide import find_blocks
    from skipguide.parts import PARTS
    from skipguide.pipelines.presets import find_preset

    denoisers = models.denoisers(loaded.pipe)
    if not denoisers:
        raise SkipError(f"{type(loaded.pipe).__name__} has no denoiser that skip guidance knows")
    denoiser = next(iter(denoisers.values()))
    blocks = find_blocks(denoiser)
    parts: list[str] = [part for part in PARTS if part == "block" or any(part in block.parts for block in blocks)]
    try:
        found = find_preset(denoiser, loaded.pipe)
        preset = {"layers": list(found.numbers), "scale": float(_first(found.scale)), "part": found.part}
        said = f"preset: layers {preset['layers']}, scale {preset['scale']:g}, part {found.part} ({found.origin})"
    except SkipError:
        preset, said = {}, "no preset is known: choose layers"
    taken = pipeline_calls.parameters(type(loaded.pipe))

    def default(name: str, other: float) -> Any:
        value = loaded.defaults.get(name, taken[name].default if name in taken else None)
        return value if isinstance(value, (int, float)) else other

    return Controls(
        layers=[(f"{number}: {block.name}", number) for number, block in enumerate(blocks)],
        parts=parts,
        preset=preset,
        steps=int(default("num_inference_steps", 20)),
        guidance_scale=float(default("guidance_scale", 4.0)),
        words=f"{type(loaded.pipe).__name__}, {len(blocks)} blocks; {said}",
    )


def _first(scale: Any) -> Any:
    """A number; of a timetable its first value."""
    return scale.values[0] if hasattr(scale, "values") and not callable(scale.values) else scale


def make(loaded: StudioPipeline, setting: Setting, tell: Tell, *, guided: bool) -> pipeline_calls.Sample:
    """One clip.

    Args:
        loaded: the pipeline, for this visitor alone.
        setting: what was chosen.
        tell: is told every step; may raise.
        guided: with skip guidance.

    Raises:
        SkipError: if the guidance or the pipeline refuses.
    """
    call = loaded.call(setting) | _following(loaded.pipe, setting.steps, tell)
    guidance = pipeline_calls.make_guidance(setting.guidance) if guided else None
    with models.few_threads(loaded.source, loaded.pipe.device.type):
        return pipeline_calls.sample(loaded.pipe, setting.prompt, call, setting.seed, guidance, bar={"disable": True})


def _following(pipe: Any, steps: int, tell: Tell) -> dict[str, Any]:
    """The callback that a pipeline takes after each of its steps; of one that takes none nothing is heard."""

    def after(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tell(step + 1, steps)
        return tensors

    return {"callback_on_step_end": after} if "callback_on_step_end" in pipeline_calls.parameters(type(pipe)) else {}


def cost(sample: pipeline_calls.Sample, blocks: int) -> str:
    """What is written under a clip.

    Args:
        sample: the clip.
        blocks: that a plain run of it takes.
    """
    ran = sample.stats.get("blocks_run", blocks)
    return f"{ran} blocks run ({ran / max(blocks, 1):.2f} x plain), {sample.seconds:.1f} s"


def shown(images: list[Image], height: int = 256) -> list[Image]:
    """Frames large enough to look at; small ones keep their pixels."""
    from PIL.Image import Resampling

    from skipguide.media.frames import comfortable_zoom

    zoom = comfortable_zoom(images[0].height, height)
    return [image.resize((image.width * zoom, image.height * zoom), Resampling.NEAREST) for image in images]
