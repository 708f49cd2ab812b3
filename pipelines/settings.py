"""Settings of skip guidance: plain, checked data. `stg.py` adds `apply`; what is applied is typed against these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, get_args

from skipguide.config import JsonConfig, as_whole, normalize_fields
from skipguide.errors import SkipError
from skipguide.guidance import Over
from skipguide.parts import Perturbation
from skipguide.pipelines.formulas import Formula, find_formula
from skipguide.pipelines.groups import Scale, SkipGroup, check_amount, check_layers, check_scale
from skipguide.pipelines.pass_schedule import PassSchedule
from skipguide.pipelines.presets import Preset
from skipguide.pipelines.sampling.tail import TAILS, Tail
from skipguide.plan import Part, check_stack
from skipguide.schedule import Schedule, Timetable
from skipguide.select import DEFAULT_SCORE, check_score

# What holds where neither the user nor a preset says anything else.
DEFAULTS: dict[str, Any] = {
    "scale": 1.0,
    "part": "block",
    "formula": "stg",
    "start": 0.0,
    "stop": 1.0,
    "rescale": 0.0,
}

# What says which passes run at which step, and what it is where a `schedule` says that.
WINDOWS: dict[str, Any] = {"start": None, "stop": None, "every": 1, "cfg_interval": None, "cfg_every": 1}


@dataclass(frozen=True, repr=False)
class GuidanceSettings(JsonConfig):
    """The fields of `SpatiotemporalSkipGuidance`, which is these settings with `apply`; their meaning is said there.

    Raises:
        SkipError: on settings that cannot mean anything, whatever the model is.
    """

    layers: Sequence[int] | Mapping[str, Sequence[int] | Timetable | str | None] | Timetable | str | None = None
    scale: Scale | None = None
    part: Part | None = None
    formula: str | None = None
    rescale: float | Timetable | None = None
    rescale_over: Over = "sample"
    start: float | None = None
    stop: float | None = None
    every: int = 1
    prefix_reuse: bool = True
    tail: Tail = "separate"
    stack: str | None = None
    groups: Sequence[SkipGroup] | None = None
    cfg_interval: tuple[float, float] | None = None
    apg: float | None = None
    apg_norm: float | None = None
    zero_star: bool = False
    drop: float = 0.1
    prefer_cheap: bool = False
    seed: int = 0
    score: str = DEFAULT_SCORE
    strength: float = 1.0
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    part_options: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | Timetable | None = None
    cfg_every: int = 1
    schedule: PassSchedule | None = None

    def __post_init__(self) -> None:
        """Check everything that does not need a model, and bring it into normal form."""
        if not self.whole_preset:
            for name, value in DEFAULTS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        part = self.part or DEFAULTS["part"]
        if isinstance(self.layers, Mapping) and "points" not in self.layers:
            if not self.layers or not all(isinstance(name, str) for name in self.layers):
                raise SkipError(
                    f"a mapping of layers names denoisers of the pipeline, such as 'transformer'; got {self.layers!r}"
                )
            layers: Any = {name: check_layers(own, part) for name, own in self.layers.items()}
        else:
            layers = check_layers(self.layers, part)
        object.__setattr__(self, "layers", layers)
        self._check_perturbation()
        if self.scale is not None:
            object.__setattr__(self, "scale", check_scale(self.scale))
        for name, most in (("rescale", 1.0), ("guidance_scale", None)):
            if (amount := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_amount(amount, name, most))
        check_stack(self.stack)
        if self.groups is not None:
            given: Any = self.groups  # from JSON: plain data
            if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
                raise SkipError(f"groups is a list of SkipGroup; got {type(given).__name__}")
            made = tuple(g if isinstance(g, SkipGroup) else SkipGroup.from_dict(g) for g in given)
            object.__setattr__(self, "groups", made)
            if self.layers is not None or self.stack is not None or not made:
                raise SkipError("groups has at least one group, and layers and stack are given in the groups then")
        find_formula(self.formula or DEFAULTS["formula"])
        self._check_interval()
        self._check_numbers()
        if self.rescale_over not in get_args(Over):
            raise SkipError(f"unknown rescale_over {self.rescale_over!r}; expected one of {', '.join(get_args(Over))}")
        if self.tail not in TAILS:
            raise SkipError(f"unknown tail {self.tail!r}; expected one of {', '.join(TAILS)}")
        window = self.window
        for name in ("start", "stop", "every"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, getattr(window, name))
        object.__setattr__(self, "cfg_every", as_whole("cfg_every", self.cfg_every))
        self._check_schedule()
        check_score(self.score)
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        self.rule.check(given | {name: value for name, value in DEFAULTS.items() if given[name] is None})

    def _check_perturbation(self) -> None:
        """Bring strength, heads and options of the part to their normal form."""
        if self.part is None:  # the preset's, which is not known yet
            Perturbation(strength=self.strength)
            return
        heads: Any = self.heads
        for name, value in Perturbation(self.part, self.strength, heads, self.part_options).fields.items():
            object.__setattr__(self, name, value)
        if self.groups is not None and (self.strength, self.heads, dict(self.part_options)) != (1, None, {}):
            raise SkipError("with groups, strength, heads and part_options are given in the groups")

    def _check_numbers(self) -> None:
        """Bring numbers and flags to Python's own types and check their ranges."""
        normalize_fields(
            self,
            wholes={"seed": None},
            numbers={"drop": 0, "apg": None, "apg_norm": 0},
            flags=("prefix_reuse", "zero_star", "prefer_cheap"),
            optional=("apg", "apg_norm"),
        )
        if not 0 < self.drop < 1:
            raise SkipError(f"drop is a share of the blocks, above 0 and below 1; got {self.drop!r}")
        if self.apg_norm == 0:
            raise SkipError(f"apg_norm is a positive number, or None; got {self.apg_norm!r}")

    def _check_schedule(self) -> None:
        given: Any = self.schedule  # from JSON: plain data
        if given is None:
            return
        schedule = given if isinstance(given, PassSchedule) else PassSchedule.from_dict(given)
        object.__setattr__(self, "schedule", schedule)
        if self.window != Schedule() or self.cfg_steps is not None:
            raise SkipError(
                f"schedule says what runs at each step: leave out start, stop, every, cfg_interval and cfg_every; got "
                f"start={self.window.start:g}, stop={self.window.stop:g}, every={self.every}, "
                f"cfg_interval={self.cfg_interval}, cfg_every={self.cfg_every}"
            )
        if schedule.blocks and self.tail != "separate":
            raise SkipError(f"a schedule of blocks needs tail='separate'; got tail={self.tail!r}")

    def _check_interval(self) -> None:
        segmented = self.rule.window is not None
        interval: Any = self.rule.window if self.cfg_interval is None else self.cfg_interval
        if interval is None:
            return
        try:
            start, stop = interval
        except (TypeError, ValueError):
            raise SkipError(
                f"cfg_interval is a pair (start, stop) of fractions of the steps; got {interval!r}"
            ) from None
        window = Schedule(start, stop)
        if segmented and (window.start, window.stop) == (0.0, 1.0):
            raise SkipError(
                f"formula={self.formula!r} has skip guidance outside cfg_interval, which leaves no step for it"
            )
        object.__setattr__(self, "cfg_interval", (window.start, window.stop))

    @property
    def rule(self) -> Formula:
        """The entry of the table of formulas that `formula` names."""
        return find_formula(self.formula or DEFAULTS["formula"])

    @property
    def window(self) -> Schedule:
        """The steps with skip guidance."""
        start, stop = (DEFAULTS[n] if getattr(self, n) is None else getattr(self, n) for n in ("start", "stop"))
        return Schedule(start, stop, self.every)

    @property
    def reuses_skip(self) -> bool:
        """Whether some steps may use the last skip directions again."""
        return self.every > 1 or (self.schedule is not None and self.schedule.reuses("skip"))

    @property
    def reuses_cfg(self) -> bool:
        """Whether some steps may use the last difference c - u again."""
        return self.cfg_every > 1 or (self.schedule is not None and self.schedule.reuses("cfg"))

    @property
    def cfg_steps(self) -> Schedule | None:
        """The steps with CFG, of which every k-th computes u; None where the settings leave both to the pipeline."""
        if self.cfg_interval is None and self.cfg_every == 1:
            return None
        return Schedule(*(self.cfg_interval or (0.0, 1.0)), self.cfg_every)

    @property
    def group(self) -> SkipGroup:
        """The one group that these settings are, where `groups` says none. Its layers are not a mapping."""
        layers: Any = self.layers
        scale = DEFAULTS["scale"] if self.scale is None else self.scale
        told: dict[str, Any] = {"strength": self.strength, "heads": self.heads, "part_options": self.part_options}
        return SkipGroup(layers, scale, self.part or DEFAULTS["part"], self.stack, **told)

    @property
    def scaled_groups(self) -> tuple[SkipGroup, ...]:
        """The groups, or the one that these settings are, for what is asked of their scales alone."""
        if self.groups is not None:
            return tuple(self.groups)
        return (SkipGroup(scale=DEFAULTS["scale"] if self.scale is None else self.scale),)

    # -- the model's preset -------------------------------------------------------------------------------------

    @property
    def whole_preset(self) -> bool:
        """Whether the model's preset stands for what is not said: where the user names no layers."""
        return self.layers is None and self.groups is None

    def scheduled(self, schedule: PassSchedule) -> Self:
        """These settings with a schedule in place of their windows and strides."""
        return replace(self, schedule=schedule, **WINDOWS)

    @property
    def idle(self) -> bool:
        """Whether nothing is ever skipped, so that a model without a preset is no obstacle."""
        return self.whole_preset and all(group.idle for group in self.scaled_groups)

    def filled(self, preset: Preset) -> Self:
        """These settings, with what a model's preset says where they say nothing; the window goes as a whole.

        Raises:
            SkipError: for layers within a stack: presets count them over all stacks.
        """
        if not self.whole_preset:
            return self
        if self.stack is not None:
            raise SkipError("presets count layers over all stacks: with stack, name the layers too")
        limits = find_formula(self.formula or preset.formula).limits
        names = ["scale", "part", "formula", "rescale", "guidance_scale"]
        if self.start is None and self.stop is None and self.schedule is None:
            names += ["start", "stop"]
        says = {name: getattr(preset, name) for name in names if getattr(self, name) is None}
        for name, value in says.items():
            if value not in limits.get(name, (value,)):
                says[name] = DEFAULTS.get(name)  # it has nothing to act on with this formula
        return replace(self, layers=preset.layers, **says)
