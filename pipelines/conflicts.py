"""Conflicts: what stands in the way of guidance on a pipeline, asked before it is applied."""

from __future__ import annotations

from typing import Any

from skipguide.active import everywhere_at
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.pipelines.nag.interceptor import NagInterceptor
from skipguide.pipelines.native.listener import refuse_native_reuse
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.interceptor import Interceptor


def denoisers_of(pipe: Any, spec: PipelineSpec) -> list[str]:
    """The names of the denoisers that a pipeline has.

    Raises:
        SkipError: if it has none.
    """
    names = [name for name in spec.denoisers if getattr(pipe, name, None) is not None]
    if not names:
        missing = " and ".join(f"pipe.{name} is None" for name in spec.denoisers)
        raise SkipError(f"this {type(pipe).__name__} has no denoiser: {missing}")
    return names


def refuse_conflicts(pipe: Any, spec: PipelineSpec, names: list[str], what: str) -> None:
    """Refuse guidance on top of guidance, or under a guider that a delivery through the branches does not survive.

    Raises:
        SkipError: saying what is there, and what to do.
    """
    for name in names:
        model = getattr(pipe, name)
        refuse_native_reuse(model, what)
        gate = gate_of(model)
        here: list[Any] = [*everywhere_at(gate, Interceptor), *everywhere_at(gate, NagInterceptor)]
        if any(other.pipe is pipe for other in here):  # another pipeline may share the model
            raise SkipError(
                f"guidance is already applied to pipe.{name}: call remove() on the earlier handle first, or "
                f"skipguide.remove_from(pipe) where that is gone"
            )
    if spec.cfg == "guider":
        guider = getattr(pipe, "guider", None)
        if type(guider).__name__ != "ClassifierFreeGuidance" or getattr(guider, "use_original_formulation", False):
            raise SkipError(
                f"expected pipe.guider to be ClassifierFreeGuidance with use_original_formulation=False; got "
                f"{type(guider).__name__}: others combine the branches in ways that a shift does not survive; "
                f"skipguide.pipelines.SkipGuider takes the guider's place, and guides by itself"
            )
