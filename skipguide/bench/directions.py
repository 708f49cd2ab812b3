"""Two controls as formulas of skip guidance: a random direction of equal norm, and what a direction is worth as CFG.

A formula is data, and settings say which one holds (`GuidanceSettings.rule`): a control is settings with another rule,
applied as any guidance is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.pipelines.formulas import Direction, Formula
from skipguide.pipelines.registry.described import pipeline_spec
from skipguide.schedule import Timetable

APART = 977  # added to a clip's seed: the direction is not the noise that the clip starts from


def random_like(d: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction with the norm of `d`, row by row, and nothing else of it.

    Example:
        >>> d = torch.tensor([[3.0, 4.0]])
        >>> round(float(random_like(d, torch.Generator().manual_seed(0)).norm()), 3)
        5.0
    """
    dims = tuple(range(1, d.dim()))
    noise = torch.randn(d.shape, generator=generator).to(d)  # of the CPU: the same on every device
    own, other = (x.norm(p=2, dim=dims, keepdim=True) for x in (d, noise))
    return noise * (own / other.clamp_min(torch.finfo(d.dtype).tiny))


def projected_share(d: Tensor, u: Tensor, c: Tensor) -> float | None:
    """The part of `d` along c - u, in units of c - u: guidance by s d raises the CFG scale by s times that.

    Returns:
        None where c and u are equal, and CFG has no direction.

    Example:
        >>> u, c = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> projected_share(torch.tensor([[1.0, 7.0]]), u, c)
        0.5
    """
    along = c.float() - u.float()
    size = float((along * along).sum())
    return float((d.float() * along).sum()) / size if size > 0 else None


class _Ruled(SpatiotemporalSkipGuidance):
    """Skip guidance whose formula has another direction; its own is known by `formula`."""

    @property
    def rule(self) -> Formula:
        """The formula's entry, with the other direction."""
        rule = super().rule
        return rule if rule.direction is None else self._changed(rule, rule.direction)

    def _changed(self, rule: Formula, own: Direction) -> Formula:
        raise NotImplementedError


def random_direction(arguments: Mapping[str, Any], pipe: Any, seed: int) -> SpatiotemporalSkipGuidance:
    """The control of a skip guidance: its pass is run, and only the norm of what it says is used.

    Args:
        arguments: of `SpatiotemporalSkipGuidance`.
        pipe: the pipeline: where half of a prediction are variances, which it does not use, the halves stay apart.
        seed: of the directions, a new one at every step. Each use of the settings starts anew.
    """
    halves = _halves(pipe)

    class RandomDirection(_Ruled):
        """The guidance with a random direction of equal norm."""

        def _changed(self, rule: Formula, own: Direction) -> Formula:
            generator = torch.Generator().manual_seed(seed + APART)

            def direction(u: Tensor | None, c: Tensor, k: Tensor, w: float | Tensor) -> Tensor:
                parts = own(u, c, k, w).chunk(halves, dim=1)
                return torch.cat([random_like(part, generator) for part in parts], dim=1)

            return replace(rule, direction=direction)

    return RandomDirection(**arguments)


def _halves(pipe: Any) -> int:
    """2 where the second half of a prediction are variances, which the pipeline leaves aside; else 1.

    Some pipelines tell by the channels (Latte: twice as many come out as go in).
    """
    spec = pipeline_spec(pipe)
    denoisers = (getattr(pipe, name, None) for name in spec.denoisers)
    configs = [denoiser.config for denoiser in denoisers if denoiser is not None]
    channels = [(config.get("in_channels"), config.get("out_channels")) for config in configs]
    twice = any(came is not None and went == 2 * came for came, went in channels)
    return 2 if spec.variances or (twice and spec.layout != "tokens") else 1


def effective_scale(arguments: Mapping[str, Any], pipe: Any, run: Callable[[Any], Any]) -> float:
    """The CFG scale that a guidance amounts to: w + s <d, c - u> / |c - u|^2, averaged over its steps.

    After the effective guidance scale of GA-Eval (arXiv 2602.22570): what of a guidance lies along CFG's own direction
    could be had by a larger CFG scale.

    Args:
        arguments: of `SpatiotemporalSkipGuidance`.
        pipe: the pipeline, for the arguments that a preset gives.
        run: makes one clip with a guidance.

    Raises:
        SkipError: for a scale that changes with the step, a formula without a direction, or a run without CFG.
    """
    seen: list[tuple[float, float]] = []
    halves = _halves(pipe)  # the second one is not used

    class Watched(_Ruled):
        """The guidance itself, which notes w and the share of its directions along CFG's."""

        def _changed(self, rule: Formula, own: Direction) -> Formula:
            def direction(u: Tensor | None, c: Tensor, k: Tensor, w: float | Tensor) -> Tensor:
                d = own(u, c, k, w)
                used = [x.chunk(halves, dim=1)[0] for x in (d, u, c)] if u is not None else None
                if used is not None and (share := projected_share(*used)) is not None:
                    seen.append((float(torch.as_tensor(w).float().mean()), share))
                return d

            # a direction is told w, and in two calls u too, only if the formula needs them
            return replace(rule, direction=direction, needs_w=True)

    watched = Watched(**arguments).for_pipeline(pipe)
    scale = watched.scale
    if isinstance(scale, Mapping):
        raise SkipError("it has a scale for each modality, so that no one CFG scale stands for it")
    if isinstance(scale, Timetable) or isinstance(watched.guidance_scale, Timetable):
        raise SkipError("its scale changes with the step, so that no one CFG scale stands for it")
    if watched.rule.direction is None:
        raise SkipError(f"formula={watched.formula!r} has no direction of its own: k takes the place of u")
    if watched.rule.window is not None or watched.cfg_interval is not None:
        raise SkipError("it has steps without CFG, so that no one CFG scale stands for it")
    run(watched)
    if not seen:
        raise SkipError("no step had CFG and skip guidance together: there is no CFG direction to project on")
    own_scale = 1.0 if scale is None else float(scale)
    return statistics.fmean(w + own_scale * share for w, share in seen)
