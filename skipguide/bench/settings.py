"""What is compared on a diffusion pipeline: plain CFG over a grid, skip guidance, and its controls. Data only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from skipguide.pipelines.presets import NAMED

FACTORS, QUICK_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0), (0.5, 0.75, 1.0, 1.5)  # of the model's own CFG scale
RANDOM = "random"
PLAIN = "plain"


@dataclass(frozen=True)
class Setting:
    """One way of sampling, and a row of the table.

    Attributes:
        name: of its clips' folder and its row.
        note: what it is there for, in words.
        kind: `"cfg"` (one of the grid), `"guided"`, `"control"` (of the guidance), or `"reference"` (to look at).
        w: the pipeline's guidance_scale; None leaves it as it is.
        steps: of the sampler; None leaves them as they are.
        guidance: arguments of `SpatiotemporalSkipGuidance`, or None.
        direction: `"random"` in place of the guidance's own direction, or empty.
        cost: blocks run relative to plain CFG.
    """

    name: str
    note: str
    kind: str
    w: float | None = None
    steps: int | None = None
    guidance: Mapping[str, Any] | None = None
    direction: str = ""
    cost: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Missing:
    """A row that cannot be had, and why."""

    name: str
    reason: str


def scale_name(w: float) -> str:
    """What plain CFG at a scale is called: `cfg-3`, `cfg-4.5`."""
    return f"cfg-{w:.4g}"


def scale_grid(own: float, factors: Sequence[float]) -> tuple[float, ...]:
    """CFG scales around a model's own one, each above 1 (below it there is no CFG).

    Example:
        >>> scale_grid(4.0, (0.5, 1.0, 1.5))
        (2.0, 4.0, 6.0)
    """
    return tuple(dict.fromkeys(float(f"{own * factor:.3g}") for factor in factors if own * factor > 1)) or (own,)


def plain_grid(scales: Sequence[float | None]) -> list[Setting]:
    """Plain CFG; `None` is the one way of a pipeline that has no CFG scale."""
    return [
        Setting(PLAIN, "the pipeline as it is: it takes no guidance_scale", "cfg")
        if w is None
        else Setting(scale_name(w), "plain CFG", "cfg", w=w)
        for w in scales
    ]


def next_scale(w: float, grid: Sequence[float]) -> float:
    """The next higher scale of a grid, or a third more at its upper end.

    Example:
        >>> next_scale(3.0, (2.0, 3.0, 4.0)), next_scale(6.0, (2.0, 6.0))
        (4.0, 8.0)
    """
    return min((other for other in grid if other > w), default=float(f"{4 * w / 3:.3g}"))


def equal_steps(steps: int, cost: float) -> int | None:
    """Steps of plain CFG that cost what guidance does; None where guidance costs no more.

    Example:
        >>> equal_steps(12, 1.08), equal_steps(20, 1.01), equal_steps(20, 0.92)
        (13, 21, None)
    """
    return max(steps + 1, round(steps * cost)) if cost > 1 + 1e-9 else None


def guided(name: str, note: str, w: float | None, arguments: Mapping[str, Any]) -> Setting:
    """Skip guidance beside the baseline's CFG."""
    return Setting(name, note, "guided", w=w, guidance=dict(arguments))


def frugal(w: float, grid: Sequence[float], candidate: Mapping[str, Any]) -> list[Setting]:
    """Guidance that costs less than plain CFG, and the same without the skipping."""
    kept = {name: candidate[name] for name in ("layers", "part", "scale") if name in candidate}
    arguments = kept | NAMED["frugal"]
    higher, interval = next_scale(w, grid), list(arguments["cfg_interval"])
    arguments["cfg_interval"] = interval
    words = f"CFG in the steps from {interval[0]:g} to {interval[1]:g} only"
    alone = Setting(
        "interval",
        f"{words}, at the next higher scale: what `frugal` is without skipping",
        "reference",
        w=higher,
        guidance={"scale": 0, "cfg_interval": interval},
    )
    return [guided("frugal", f"the cheapest: {words}, and skip guidance", higher, arguments), alone]


def random_control(candidate: Setting) -> Setting:
    """A random direction of the norm that the candidate's has."""
    note = f"`{candidate.name}` with a random direction of the same norm, clip by clip and step by step"
    return replace(candidate, name="random-direction", note=note, kind="control", direction=RANDOM)


def more_steps(baseline: Setting, candidate: Setting, steps: int) -> Setting | Missing:
    """The compute of the candidate, spent on steps of the baseline."""
    name, count = "equal-blocks", equal_steps(steps, candidate.cost)
    if count is None:
        return Missing(name, f"{candidate.name} costs no more blocks than the baseline ({candidate.cost:.2f})")
    note = f"the baseline with {count} steps instead of {steps}: the blocks of `{candidate.name}`"
    return replace(baseline, name=name, note=note, kind="control", steps=count, cost=count / steps)


def effective_cfg(candidate: Setting, w: float) -> Setting:
    """Plain CFG at the scale that the candidate amounts to."""
    scale = float(f"{w:.3g}")
    note = f"plain CFG at {scale:g}, which is what `{candidate.name}` amounts to along CFG's own direction"
    return Setting("effective-scale", note, "control", w=scale)


def at_edge(w: float, grid: Sequence[float]) -> bool:
    """Whether the best scale is the first or the last of a grid, so that a better one may lie outside."""
    return len(grid) > 1 and (math.isclose(w, min(grid)) or math.isclose(w, max(grid)))
