"""Formulas: how the skipped prediction k steers a step, one entry of a table each.

With c and u the conditional and unconditional predictions and w the CFG scale, a step with skip guidance yields
u + w (c - u) + s d, where d is the direction of the formula. What holds for every formula alike is not said here: the
scale s, adaptive projected guidance, `every`, `rescale` and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from skipguide import guidance
from skipguide.errors import SkipError

Direction = Callable[[Tensor | None, Tensor, Tensor, float | Tensor], Tensor]
Place = Literal["cond", "uncond", "inside_uncond"]


@dataclass(frozen=True)
class Formula:
    """One way to use a skipped prediction. A new one is one entry in `FORMULAS`; everything else reads the table.

    Args:
        name: what `SpatiotemporalSkipGuidance(formula=...)` says.
        direction: d from (u, c, k, w). On a step without CFG u is None and w is 1. None for a formula whose k takes
            the place of u, so that CFG is all there is to compute.
        place: where k is computed: in a pass of its own on c's inputs (`"cond"`) or on u's (`"uncond"`; on c's where a
            step has no u), or in the pipeline's own unconditional pass (`"inside_uncond"`).
        needs_cfg: a run without CFG is refused.
        needs_w: the direction uses u and w, so that it is known only when both are.
        window: the steps with CFG, as fractions, unless `cfg_interval` says others. With a window, the other steps are
            those with skip guidance. None: both go together.
        limits: options that cannot act with this formula, each with the values that it may have.
        reason: why they cannot, for the error.

    Raises:
        SkipError: for a place that does not exist, or a direction where k takes the place of u.
    """

    name: str
    direction: Direction | None
    place: Place = "cond"
    needs_cfg: bool = False
    needs_w: bool = False
    window: tuple[float, float] | None = None
    limits: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse an entry that cannot be followed."""
        if self.place not in get_args(Place):
            raise SkipError(f"unknown place {self.place!r}; expected one of {', '.join(get_args(Place))}")
        if (self.direction is None) != self.in_place_of_uncond:
            raise SkipError(
                f"formula {self.name!r}: a direction is computed unless place is 'inside_uncond'; got "
                f"direction={self.direction!r} and place={self.place!r}"
            )

    @property
    def in_place_of_uncond(self) -> bool:
        """Whether k is what the pipeline gets for u, so that no further pass is run."""
        return self.place == "inside_uncond"

    @property
    def waits_for_uncond(self) -> bool:
        """Whether the direction is known only after the unconditional pass.

        A pipeline with two calls has used c by then, so what the formula adds can only be delivered through u.
        """
        return self.needs_w or self.place == "uncond"

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that this formula limits.

        Raises:
            SkipError: naming those that have another value than they may.
        """
        wrong = {name: options[name] for name, values in self.limits.items() if options[name] not in values}
        if wrong:
            limits = ", ".join(f"{name} ({' or '.join(map(str, values))})" for name, values in self.limits.items())
            raise SkipError(
                f"formula={self.name!r} {self.reason}. Leave these at what they may be with it: {limits}; got "
                f"{', '.join(f'{name}={value!r}' for name, value in wrong.items())}"
            )


_STG = Formula("stg", guidance.stg_direction)  # the paper's
_SEGMENTED = Formula(
    "segmented",
    guidance.stg_direction,
    needs_cfg=True,
    window=(0.0, 0.5),
    limits={"schedule": (None,)},
    reason="is a schedule by itself",
)
_UNCOND = Formula(
    "uncond",
    None,
    place="inside_uncond",
    needs_cfg=True,
    limits={
        "scale": (0, 1),
        "groups": (None,),
        "rescale": (0,),
        "every": (1,),
        "cfg_every": (1,),
        "schedule": (None,),
        "apg": (None,),
        "apg_norm": (None,),
        "tail": ("separate", "auto"),
    },
    reason="has no third pass, as it skips in the unconditional one",
)
_WAN = Formula(
    "wan",
    guidance.wan_direction,
    place="uncond",
    needs_w=True,
    limits={"apg": (None,), "apg_norm": (None,), "cfg_every": (1,), "schedule": (None,)},
    reason="skips in the unconditional pass, which has to run, and has no c of its own, and apg projects on c: use "
    "formula='stg'",
)

FORMULAS: dict[str, Formula] = {formula.name: formula for formula in (_STG, _UNCOND, _WAN, _SEGMENTED)}


def find_formula(name: Any) -> Formula:
    """The entry of a formula.

    Raises:
        SkipError: if there is none of that name.

    Example:
        >>> find_formula("wan").place
        'uncond'
    """
    if not isinstance(name, str) or name not in FORMULAS:
        raise SkipError(f"unknown formula {name!r}; expected one of {', '.join(FORMULAS)}")
    return FORMULAS[name]
