"""How a diffusers pipeline drives its denoiser, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, get_args

from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap
from skipguide.shown import brief

Cfg = Literal["batched", "two_calls", "named", "guider", "single"]
Layout = Literal["bcfhw", "bfchw", "bfhwc", "bchw", "tokens"]
Half = Literal["float32", "once", "rounded"]


@dataclass(frozen=True, repr=False)
class PipelineSpec:
    """How one pipeline calls its denoiser.

    Args:
        cfg: `"batched"`: one call with rows [uncond, cond]; `"two_calls"`: a conditional call, then an unconditional
            one; `"named"`: like two calls, told apart by the name of the `cache_context`, and whether there is
            a second call is not known beforehand; `"guider"`: named calls driven by a guider component; `"single"`:
            one call per step, without CFG.
        denoisers: pipeline attributes of the denoisers; one or all may be None on a given pipeline.
        scales: for each denoiser, the pipeline attributes to read w from, the first that is not None; `()` where the
            pipeline keeps it to itself, so that only deliveries that do not need w are possible. Here and below,
            `"call.NAME"` is a variable of the pipeline's running `__call__`.
        switch: attribute or variable that says whether this step has CFG, where the scale alone does not (no negative
            prompt, truncation); `"!NAME"` says that it has none.
        dynamic: w may change after the forward (CogVideoX's use_dynamic_cfg).
        rescale: attribute or variable of its own guidance rescale, or of bringing the result to the norm of c, if it
            has one; of several, separated by spaces; `"always"`.
        layout: how a prediction's dimensions lie: `"bcfhw"`, `"bfchw"`, `"bfhwc"`, `"bchw"`, or packed `"tokens"`.
        kept: what the call decides at its beginning and keeps in a local variable, so that a callback that changes the
            attribute changes nothing: `"w"`, the scale, and `"cfg"`, whether there is CFG.
        passive: keyword arguments that mark a denoiser call as the pipeline's own extra pass, which is left alone
            (but gets the same delta, where the others are shifted).
        offset: what w is above the pipeline's scale g: 1 where it computes c + g (c - u).
        joined: where a denoiser predicts several things (video and sound), the attribute with the scale of each.
            Guidance treats them as one prediction; CFG is on if one of the scales says so.
        cond_first: one call has the rows [cond, uncond].
        variances: the second half of a prediction's channels are variances, which guidance leaves as they are: the
            pipeline takes those of the conditional branch, or none.
        chunked: the pipeline goes through its steps once per chunk of the video, without a new table of timesteps.
        native: of the arguments in passive, the one that marks a pass of the pipeline's own skip guidance; another on
            top of it is refused unless the user asks for both.
        native_off: the arguments of the pipeline's call that turn it off, with their values.
        native_needs: the entry of the denoiser's config without which that pass is perturbed by nothing.
        modalities: of a denoiser that predicts several things, what each is called.
        noisy: where the pipeline computes its guidance on denoised samples x0 = sample - sigma v, the attribute or
            variable with the sample of each prediction; what looks at whole predictions looks at x0 there.
        weight: the variable with the weight, of each step, that the pipeline gives the prediction; another model's has
            the rest, and what guidance adds is divided by it.
        half: what it gets where its denoiser computes in bfloat16 or float16. `"float32"`: branches in float32, as its
            loop widens predictions, or keeps latents in float32 and casts them for the denoiser; exact. `"once"`: the
            result in place of every branch (or of the one there is), so that it is rounded once, to the denoiser's
            dtype. `"rounded"`: each branch rounded to that dtype, and the pipeline multiplies their difference by w.
        inside: attribute of the pipeline that goes through the steps for it, a described one with the same denoisers:
            guidance is applied to that one.
        timesteps: variable with the timesteps that the call goes through, where they can be a part of the scheduler's
            and their number is not in `_num_timesteps`, or they can end before the scheduler's do.

    Raises:
        SkipError: for a way of calling, a layout or a `half` that does not exist, denoisers without scales, or a CFG
            that nothing tells of.
    """

    __repr__ = brief

    cfg: Cfg
    denoisers: tuple[str, ...] = ("transformer",)
    scales: tuple[tuple[str, ...], ...] = (("_guidance_scale",),)
    switch: str = ""
    dynamic: bool = False
    rescale: str = ""
    kept: tuple[Literal["w", "cfg"], ...] = ()
    passive: tuple[str, ...] = ()
    layout: Layout = "bcfhw"
    offset: float = 0.0
    joined: tuple[str, ...] = ()
    cond_first: bool = False
    variances: bool = False
    chunked: bool = False
    native: str = ""
    native_off: tuple[tuple[str, Any], ...] = ()
    native_needs: str = ""
    modalities: tuple[str, ...] = ()
    noisy: tuple[str, ...] = ()
    half: Half = "rounded"
    timesteps: str = ""
    weight: str = ""
    inside: str = ""

    def __post_init__(self) -> None:
        """Refuse what would be taken for something else when the pipeline runs."""
        for name, kind in (("cfg", Cfg), ("layout", Layout), ("half", Half)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise SkipError(f"unknown {name} {value!r}; expected one of {', '.join(get_args(kind))}")
        denoisers: Any = self.denoisers
        if isinstance(denoisers, str) or len(self.scales) != len(denoisers):
            raise SkipError(
                f"denoisers are a tuple of attribute names, and scales has a tuple for each of them; got "
                f"{self.denoisers!r} and {self.scales!r}"
            )
        if self.cfg in ("batched", "two_calls") and not (self.scales[0] or self.joined or self.switch):
            raise SkipError(
                f"cfg={self.cfg!r} without a scale or a switch does not say when there is CFG, which would count as "
                f"never: name where the scale is in scales, or a switch"
            )

    def is_native(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a denoiser call with these arguments is a pass of the pipeline's own skip guidance."""
        return bool(self.native) and _is_given(kwargs.get(self.native))

    def native_idles(self, model: Any) -> bool:
        """Whether the pipeline's own skip guidance changes nothing on this denoiser."""
        config: Any = getattr(unwrap(model), "config", None) or {}
        return bool(self.native_needs) and not config.get(self.native_needs)

    def is_passive(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a denoiser call with these arguments is an extra pass of the pipeline's own."""
        return any(_is_given(kwargs.get(name)) for name in self.passive)


def _is_given(value: Any) -> bool:
    return len(value) > 0 if isinstance(value, Sized) else bool(value)
