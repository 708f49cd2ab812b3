"""Spatiotemporal Skip Guidance on stock diffusers pipelines (arXiv 2411.18664): no fork, no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.pipelines.applied import AppliedGuidance
from skipguide.pipelines.calibration import auto_layers
from skipguide.pipelines.conflicts import denoisers_of, refuse_conflicts
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.pass_schedule import PassSchedule
from skipguide.pipelines.presets import find_preset, named_settings
from skipguide.pipelines.registry.described import PipelineSpec, pipeline_spec, stepping
from skipguide.pipelines.sampling.branch_parallel import group_of, refuse_cache
from skipguide.pipelines.sampling.caches import admit_cache
from skipguide.pipelines.sampling.call_stack import is_running
from skipguide.pipelines.sampling.cost import foretell
from skipguide.pipelines.sampling.ledger import GuidanceCost
from skipguide.pipelines.sampling.modalities import check_modalities
from skipguide.pipelines.sampling.schedule import GuidanceSchedule
from skipguide.pipelines.settings import DEFAULTS, GuidanceSettings

__all__ = ["AppliedGuidance", "SpatiotemporalSkipGuidance"]


@dataclass(frozen=True, repr=False)
class SpatiotemporalSkipGuidance(GuidanceSettings):
    """Guide a diffusion pipeline away from its own prediction with some layers skipped.

    Six arguments are what a person needs: `layers`, `scale`, `part`, `start`, `stop` and `rescale`. The other 21
    leave things as they are by default, and stand in groups under the six.

    With c, u, k the conditional, unconditional and skipped predictions, w the pipeline's CFG scale and s `scale`, every
    step yields u + w (c - u) + s (c - k), or c + s (c - k) without CFG (section 3.2 of the paper). The skipped pass is
    run from the first skipped layer on only.

    Args:
        layers: blocks to skip, in execution order over all stacks (or within `stack`); a mapping gives each denoiser
            its own; a `Timetable` of them changes with the step, and where its list is empty nothing is skipped. None
            takes the model's preset: its layers, and its scale, part, formula, window, rescale and CFG scale where
            these are None too; `for_pipeline(pipe)` says what that is. `"auto"` takes the layer that a calibration run
            scores best (`score`; cached per model). `"stochastic"` draws a new set at every step (`drop`, `seed`; first
            and last block stay), after S2-Guidance, arXiv 2508.12880.
        scale: s, a number or a `Timetable`. 0 leaves the pipeline as it is, to the bit. Where a model predicts video
            and sound, a mapping gives each its own: `{"video": 1.0, "audio": 0.5}`. None is the preset's with
            `layers=None`, else 1.
        part: what of the layers is weakened: `"block"` (the paper's STG-R), `"attn_identity"` (STG-A), `"attn"`,
            `"cross_attn"`, `"mlp"`, `"attn_blur"` (SEG), `"window_time"`, `"window_space"`, `"token_shuffle"` (TPG) or
            `"self_swap"` (SSG). None is the preset's with `layers=None`, else `"block"`.
        start: first step with skip guidance, as a fraction of the steps (inclusive). Where `start` and `stop` are both
            None, they are the preset's with `layers=None`, else 0 and 1.
        stop: end of the skip guidance, as a fraction of the steps (exclusive; 1.0 is the end). A run with so few steps
            that none of them lies in the window is refused.
        rescale: 0 to 1, or a `Timetable`: brings the standard deviation of the result towards that of c (0.7 in the
            authors' code), at the steps with skip guidance. Like `apg` and `zero_star` it acts on video and sound
            apart, and where a pipeline computes its guidance on denoised samples (LTX-2), on these. None is the
            preset's with `layers=None`, else 0.

    Formula and CFG:
        formula: `"stg"` as above; `"uncond"` skips the layers in the unconditional pass itself, so there is no third
            pass (`scale` is 1 or 0); `"wan"` is what the authors' Wan code does: y0 + s (y0 - k) with y0 the CFG
            result and k skipped with the negative prompt; `"segmented"` has CFG inside `cfg_interval` (the first half
            if that is None) and skip guidance outside it, never both, so that no step costs more than CFG (after
            arXiv 2603.20584). None is the preset's with `layers=None`, else `"stg"`.
        cfg_interval: steps from start (inclusive) to stop (exclusive) with CFG, as fractions; outside it the
            unconditional branch is not computed and the conditional prediction is returned for every branch, so that
            any CFG yields it (limited-interval guidance, arXiv 2404.07724).
        guidance_scale: w at each step, a number or a `Timetable`, in place of the scale that the pipeline is called
            with, which has to turn CFG on; at 1 the unconditional branch is not computed. None leaves the pipeline's,
            except with `layers=None` where the preset has one.
        zero_star: scale the unconditional prediction as CFG-Zero* does (arXiv 2503.18886; without its zero-init).
        apg: project the skip direction as adaptive projected guidance does (arXiv 2410.02416): the weight of its part
            along c; 0 drops that part, None leaves the direction as it is.
        apg_norm: largest norm of the direction per clip.
        rescale_over: `"sample"` or, as the authors' code does, the whole `"batch"`.

    What it costs:
        every: compute the skipped pass on every k-th step only and reuse the last difference in between: cheaper and
            approximate; `stats.reuse_error` says how far the reused differences were off when renewed.
        cfg_every: run the unconditional pass on every k-th step of `cfg_interval` only; in between u is c less the last
            difference c - u, at half of CFG's cost (approximate; `stats.cfg_reuse_error` says how far it was off).
        schedule: a `PassSchedule`: for each of a fixed number of steps whether the unconditional and the skipped pass
            run, are made of the last ones or are left out, and which blocks run. `skipguide.pipelines.tune` searches
            one. It takes the place of `start`, `stop`, `every`, `cfg_interval` and `cfg_every`.
        prefix_reuse: run the skipped pass from the first skipped layer on only (exact at equal batch; equal to
            rounding where CFG is one batch).
        tail: from the first skipped block on, run the skipped rows in a pass of their own (`"separate"`), in one batch
            with the others (`"batched"`: the same work and equal to rounding, faster on a GPU that one pass does not
            fill, needs memory for the further rows), or in one batch where the sequence is short (`"auto"`, by
            `skipguide.pipelines.sampling.tail.AUTO`).

    Which layers beyond a list:
        stack: count `layers` within this stack, such as Latte's `"temporal_transformer_blocks"`.
        groups: several `SkipGroup`s with layers, scale, part and stack of their own, in place of `layers`: one pass
            each, and passes that begin alike share that beginning.
        drop: share of the blocks that `"stochastic"` leaves out (at least one block).
        prefer_cheap: `"stochastic"` draws from the deeper half of the blocks only, so that short passes follow.
        seed: of `"stochastic"` and of `"token_shuffle"`, which are drawn anew at every step.
        score: what `"auto"` ranks by; one of `skipguide.select.SCORES`.

    How the part acts:
        strength: 1 is the part as it is named, 0 is like scale 0, and between them what the part changes is
            interpolated: a left-out branch is scaled by 1 - strength, an attention map is mixed with the other one
            (SoftPAG, arXiv 2506.10978).
        heads: the heads of the attention that the part is about, from 0 on, for all layers or as a mapping by layer
            (HeadHunter, arXiv 2506.10978); None is all.
        part_options: what else a part can be told, such as `{"sigma": 2.0}` of `"attn_blur"`; the table of parts in
            `pipelines/README.md` has them.

    Raises:
        SkipError: on settings that cannot mean anything; `apply` checks those that depend on the model.

    Example:
        >>> stg = SpatiotemporalSkipGuidance(layers=[19], scale=1.0, cfg_interval=(0.1, 0.8))
        >>> SpatiotemporalSkipGuidance.from_dict(stg.to_dict()) == stg
        True
    """

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Settings by name; what they do not say is the model's preset.

        Args:
            name: `"frugal"`: CFG in the steps from 0.2 to 0.8 only, at a CFG scale a third higher than usual. On the
                bundled model clips as good as those of the best plain CFG for less compute; the interval alone
                (`scale=0`) costs least and is the better one there (`demos/quality/results.md`).
            **changes: arguments that replace those of the preset.

        Raises:
            SkipError: for an unknown name.

        Example:
            >>> SpatiotemporalSkipGuidance.preset("frugal").cfg_interval
            (0.2, 0.8)
        """
        return cls(**named_settings(name) | changes)

    # -- on a pipeline ------------------------------------------------------------------------------------------

    def apply(
        self,
        pipe: Any,
        *,
        branch_parallel: Any = None,
        over_native: bool = False,
        schedule: PassSchedule | None = None,
    ) -> AppliedGuidance:
        """Apply to a pipeline: from now on, and until `remove()` or the end of the `with` block, its calls are guided.

        Args:
            pipe: a stock diffusers pipeline that is described in `skipguide.pipelines.registry.described`.
            branch_parallel: share the branches of every step between processes that all make the same call (same
                seeds, same model, a device each): True for all ranks of `torch.distributed`, or a process group. See
                `skipguide.pipelines.sampling.branch_parallel`.
            over_native: guide on top of the pipeline's own skip guidance (LTX-2's STG, the skip layers of Stable
                Diffusion 3). Without it, a call that makes such a pass is refused at the first one.
            schedule: what runs at each step, in place of the windows and strides of the settings.

        Returns:
            A handle: context manager, `.remove()`, `.stats`, `.delivery`.

        Raises:
            SkipError: for an unknown pipeline, a layer or part that its model does not have, a model without
                a preset, scales for modalities that it does not predict, guidance that is already applied, or a cache
                that would mix up the passes; with `branch_parallel`, for settings whose work cannot be shared.
        """
        if schedule is not None:
            same = self.scheduled(schedule)
            return same.apply(pipe, branch_parallel=branch_parallel, over_native=over_native)
        pipe = stepping(pipe)
        spec = pipeline_spec(pipe)
        group = group_of(branch_parallel)
        names = self._denoisers(pipe, spec)
        refuse_conflicts(pipe, spec, names, "SpatiotemporalSkipGuidance")
        settings = self._on(pipe, names)
        check_modalities(settings.scaled_groups, spec.modalities, type(pipe).__name__)
        if group is not None and (settings.rule.in_place_of_uncond or settings.tail != "separate"):
            raise SkipError(
                "branch_parallel runs the skipped passes elsewhere: a formula inside the unconditional pass has none, "
                f"and a batched tail has them in another; got formula={settings.formula!r}, tail={settings.tail!r}"
            )
        if group is not None and settings.schedule is not None and settings.schedule.blocks:
            raise SkipError("branch_parallel cannot share passes in which a schedule chooses the blocks")
        schedules = {name: settings._schedule(pipe, name) for name in names}
        if is_running(pipe) and not all(own.constant and not own.times.own_cfg for own in schedules.values()):
            raise SkipError(
                "this guidance goes by the step, and steps are counted from the beginning of a call, which has passed: "
                "apply it before calling the pipeline, with start=... for the step to begin at"
            )
        for name, own in schedules.items():
            cache = admit_cache(pipe, name, getattr(pipe, name), settings, own)
            if group is not None:
                refuse_cache(cache)
        applied = AppliedGuidance(settings, pipe, spec, schedules, group, over_native)
        applied._install()
        return applied

    def cost(self, pipe: Any, *, guidance: bool = True, steps: int | None = None) -> GuidanceCost:
        """What this will cost on a pipeline, before running it.

        Args:
            pipe: the pipeline.
            guidance: whether CFG is on (two branches per step) or off (one).
            steps: number of steps, for the exact count; None counts windows and `every` as their share.
        """
        spec = pipeline_spec(pipe)
        names = self._denoisers(pipe, spec)
        schedule = self._on(pipe, names)._schedule(pipe, names[0])
        return foretell(schedule, guidance=guidance, steps=steps)

    def for_pipeline(self, pipe: Any) -> Self:
        """The settings that will hold on a pipeline: with the layers, scale, part, formula and window of its preset.

        `layers="auto"` becomes the layers that calibration chooses, so this may run the pipeline.

        Args:
            pipe: the pipeline.

        Raises:
            SkipError: as `apply` does, for an unknown pipeline or a model without a preset.
        """
        return self._on(pipe, self._denoisers(pipe, pipeline_spec(pipe)))

    def _on(self, pipe: Any, names: list[str]) -> Self:
        """The settings that will hold, with the denoisers of a pipeline known."""
        if self.idle:
            return self
        if self.groups is not None:  # a group has the same layers for all denoisers, so theirs are chosen later
            alone = [self._chosen(each, pipe, names[0]) for each in self.groups] if len(names) == 1 else self.groups
            return replace(self, groups=alone)
        if self.layers is None:
            found = {name: self.filled(find_preset(getattr(pipe, name), pipe)) for name in names}
            same = [replace(each, layers=None) for each in found.values()]
            if any(each != same[0] for each in same):
                raise SkipError(
                    f"the presets of {' and '.join(names)} differ in more than layers: pass layers, scale and part"
                )
            return replace(found[names[0]], layers=_joined({name: each.layers for name, each in found.items()}))
        mapped = isinstance(self.layers, Mapping)
        own: dict[str, Any] = (
            dict(self.layers) if isinstance(self.layers, Mapping) else dict.fromkeys(names, self.layers)
        )
        for name in own.keys() & set(names):
            group = SkipGroup(own[name], part=self.part or DEFAULTS["part"], stack=self.stack)
            own[name] = self._chosen(group, pipe, name).layers
        return replace(self, layers=own if mapped else _joined(own))

    def _denoisers(self, pipe: Any, spec: PipelineSpec) -> list[str]:
        names = denoisers_of(pipe, spec)
        if isinstance(self.layers, Mapping) and (unknown := sorted(set(self.layers) - set(spec.denoisers))):
            raise SkipError(
                f"layers names {', '.join(unknown)}, but the denoisers of {type(pipe).__name__} are "
                f"{' and '.join(spec.denoisers)}"
            )
        return names

    def _schedule(self, pipe: Any, denoiser: str) -> GuidanceSchedule:
        """The settings with layers that are known, on one denoiser."""
        model = getattr(pipe, denoiser)
        layers: Any = self.layers
        if isinstance(layers, Mapping):
            if denoiser not in layers:
                raise SkipError(f"layers names {sorted(layers)}, but this pipeline also has a denoiser {denoiser!r}")
            layers = layers[denoiser]
        groups = self.groups
        if groups is None:
            groups = () if self.idle else (replace(self, layers=layers).group,)
        return GuidanceSchedule(self, [self._chosen(group, pipe, denoiser) for group in groups], find_blocks(model))

    def _chosen(self, group: SkipGroup, pipe: Any, denoiser: str) -> SkipGroup:
        """A group with layers that were to be the preset's, or chosen by calibration."""
        if group.layers is None and group.stack is not None:
            raise SkipError("presets count layers over all stacks: with stack, name the layers too")
        if group.layers is None:
            return replace(group, layers=find_preset(getattr(pipe, denoiser), pipe).layers)
        if group.layers == "auto":
            return replace(group, layers=auto_layers(pipe, denoiser, group.part, group.stack, self.score))
        return group


def _joined(layers: dict[str, Any]) -> Any:
    """Layers of several denoisers: as they are where all agree."""
    first = next(iter(layers.values()))
    return first if all(each == first for each in layers.values()) else layers
