"""NormalizedAttentionGuidance: a negative prompt for pipelines without CFG, in attention space (arXiv 2505.21179)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipguide.arguments import Arguments
from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.conflicts import denoisers_of, refuse_conflicts
from skipguide.pipelines.handle import PipelineHandle
from skipguide.pipelines.nag.interceptor import NagInterceptor
from skipguide.pipelines.nag.settings import NagSettings, NagStats
from skipguide.pipelines.registry.described import PipelineSpec, pipeline_spec, stepping
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.shown import Row, Shown

_TEXT = "encoder_hidden_states"
_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


@dataclass(frozen=True, repr=False)
class NormalizedAttentionGuidance(NagSettings):
    """Guide away from a negative prompt inside the attention to the text: works without CFG and on distilled models.

    At each such attention, with Z+ and Z- its output for the prompt and for the negative prompt before the output
    projection, the guided output is Z = Z+ + (scale - 1) (Z+ - Z-), its L1 norm per token limited to `tau` times that
    of Z+, and of that `alpha` Z + (1 - alpha) Z+ goes on (section 3.2 of arXiv 2505.21179). Only these attentions run
    twice. With CFG on, it acts in the conditional branch. Models with joint attention are refused: their text changes
    from block to block.

    Args:
        scale: how far from the negative prompt; 1 leaves the pipeline as it is, to rounding.
        tau: largest ratio of the norms.
        alpha: weight of the guided output.
        layers: the blocks whose attention is guided; None is all.
        start: first step, as a fraction of the steps (inclusive).
        stop: end of the window, as a fraction of the steps (exclusive; 1.0 is the end).

    Raises:
        SkipError: on settings that cannot mean anything.

    Example:
        >>> nag = NormalizedAttentionGuidance(scale=5.0, tau=2.5, alpha=0.25)
        >>> NormalizedAttentionGuidance.from_dict(nag.to_dict()) == nag
        True
    """

    def apply(
        self, pipe: Any, negative_prompt: str | None = None, *, negative: Mapping[str, Tensor] | None = None
    ) -> AppliedNag:
        """Apply to a pipeline, until `remove()` or the end of the `with` block.

        Args:
            pipe: a stock diffusers pipeline that is described, whose denoiser attends to the text apart.
            negative_prompt: the negative prompt, for `pipe.encode_prompt`.
            negative: in its place, arguments of the denoiser's call with their values for the negative prompt, such as
                `{"encoder_hidden_states": embeds}` (`[1 or clips, tokens, features]`) and its mask.

        Returns:
            A handle: context manager, `.remove()`, `.stats`.

        Raises:
            SkipError: for an unknown pipeline, one with joint attention, guidance that is already applied, or both or
                none of the two ways to say the negative prompt.
        """
        pipe = stepping(pipe)
        spec = pipeline_spec(pipe)
        names = denoisers_of(pipe, spec)
        refuse_conflicts(pipe, spec, names, "NormalizedAttentionGuidance")
        if spec.joined:
            raise SkipError(
                f"{type(pipe).__name__} predicts {len(spec.joined)} things, and each of its attentions to something "
                f"else would have to be told from those to the text: not supported"
            )
        if (negative_prompt is None) == (negative is None):
            both = "none" if negative is None else "both"
            raise SkipError(
                f"expected the negative prompt in one way, and got {both}: "
                "apply(pipe, negative_prompt='...'), or apply(pipe, negative={...})"
            )
        if negative is None:
            negative = _encoded(pipe, str(negative_prompt), names[0])
        if not negative or not all(isinstance(value, Tensor) for value in negative.values()):
            raise SkipError(f"expected negative as tensors by the denoiser's argument names; got {negative!r}")
        applied = AppliedNag(self, pipe, spec, names, negative)
        applied._install()
        return applied


def _encoded(pipe: Any, prompt: str, denoiser: str) -> dict[str, Tensor]:
    """A prompt as the pipeline's denoiser gets it: its embeddings, and its mask if there is one."""
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        raise SkipError(f"{type(pipe).__name__} has no encode_prompt: pass negative={{'{_TEXT}': embeddings}}")
    given = {"prompt": prompt, "do_classifier_free_guidance": False, "device": pipe._execution_device}
    known = inspect.signature(encode).parameters
    with torch.no_grad():
        found = encode(**{name: value for name, value in given.items() if name in known})
    tensors = [each for each in (found if isinstance(found, tuple) else (found,)) if isinstance(each, Tensor)]
    if not tensors:
        raise SkipError(f"{type(pipe).__name__}.encode_prompt gave no tensor: pass negative={{'{_TEXT}': embeddings}}")
    out = {_TEXT: tensors[0]}
    mask = next((name for name in _MASKS if name in Arguments(unwrap(getattr(pipe, denoiser))).names), None)
    if mask is not None and len(tensors) > 1 and tensors[1].shape == tensors[0].shape[:2]:
        out[mask] = tensors[1]
    return out


class AppliedNag(Shown, PipelineHandle):
    """Normalized attention guidance in force on a pipeline. Leave the `with` block or call `remove()` to end it.

    Attributes:
        settings: what was applied.
        stats: what it did so far.
    """

    _name = "this guidance"

    def __init__(
        self, settings: NagSettings, pipe: Any, spec: PipelineSpec, names: list[str], negative: Mapping[str, Tensor]
    ) -> None:
        self.settings = settings
        self.stats = NagStats()
        state = PipelineCall()
        self._hold(pipe, [NagInterceptor(settings, pipe, spec, name, negative, state, self.stats) for name in names])

    def _heading(self) -> str:
        return f"Normalized attention guidance ({self._where}): {self.stats}"

    def _rows(self) -> list[Row]:
        same = self.settings
        layers = "all" if same.layers is None else tuple(same.layers)
        return [
            ("layers", "scale", "tau", "alpha", "start", "stop"),
            (layers, same.scale, same.tau, same.alpha, same.start, same.stop),
        ]

    def __exit__(self, *exc: object) -> None:
        """End it."""
        self.remove()
