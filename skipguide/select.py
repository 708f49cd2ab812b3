"""Choose: score every layer and part by what skipping it does to a prediction, and rank them. Pure maths and data.

c, u, k are the conditional, unconditional and skipped predictions. The calibration run that collects them from a
pipeline is in `skipguide.pipelines.calibration`. The default score predicted best what skipping each single layer of
the bundled model does for the Fréchet distance (`demos/quality/results.md`): twelve layers of one model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from skipguide.config import VERSION, JsonConfig, check_keys, is_one_of, normalize_fields
from skipguide.errors import SkipError
from skipguide.shown import Row, Shown

# A skip that changes a prediction by more than this share leaves no weaker model but a broken one. Of the bundled
# model's twelve layers 6 and 11 are above it (0.36): 6 is the worst of all to skip, 11 the worst of the last six but 6.
LIMIT = 0.3
COSINE = 1.001  # a mean of cosines in single precision may be above 1 by its rounding
TOLERANCE = 0.1  # scores this close count as equal; the deeper layer is cheaper then


@dataclass(frozen=True)
class LayerScore:
    """What skipping one part of one layer does, averaged over prompts and noise levels.

    Attributes:
        layer: the block, in execution order.
        name: its name in the model.
        stack: the stack it belongs to.
        part: what of it is skipped.
        effect: |c - k| / |c|.
        alignment: cosine of c - k with c - u; None without CFG.
        space_low: change of the low spatial frequencies (up to half of the Nyquist frequency), as `effect`.
        space_high: the same above; None where the prediction's grid is not known.
        time_low: change of the low temporal frequencies; None for pictures.
        time_high: the same above.
        cost: blocks of the skipped pass, as a share of a whole pass, with prefix reuse.
        samples: how many predictions were averaged.
    """

    layer: int
    name: str
    stack: str
    part: str
    effect: float
    alignment: float | None
    space_low: float | None
    space_high: float | None
    time_low: float | None
    time_high: float | None
    cost: float
    samples: int

    def __post_init__(self) -> None:
        """Refuse what no calibration measures."""
        measured = ("effect", "space_low", "space_high", "time_low", "time_high", "cost")
        known = ("alignment", *measured[1:5])
        normalize_fields(
            self,
            wholes={"layer": 0, "samples": 1},
            numbers={**dict.fromkeys(measured, 0), "alignment": -COSINE},
            optional=known,
            texts=("name", "stack", "part"),
        )
        if self.alignment is not None and self.alignment > COSINE:
            raise SkipError(f"expected alignment as a cosine; got {self.alignment!r}")


def _effect(row: LayerScore) -> float:
    return row.effect


def _apart(row: LayerScore) -> float:
    return 1 - abs(row.alignment or 0.0)


def _novelty(row: LayerScore) -> float:
    return row.effect * math.sqrt(max(0.0, 1 - (row.alignment or 0.0) ** 2))


def _detail(row: LayerScore) -> float:
    if row.space_high is None or row.space_low is None:
        raise SkipError("the score 'detail' needs the prediction's grid, which is not known for this model")
    return row.space_high / max(row.space_low, 1e-12)


def _motion(row: LayerScore) -> float:
    if row.time_high is None or row.time_low is None:
        raise SkipError("the score 'motion' needs frames, and this model's prediction has none that are known")
    return row.time_high / max(row.time_low, 1e-12)


def _aligned(row: LayerScore) -> float:
    if row.alignment is None:
        raise SkipError("the score 'aligned' compares with CFG, which was off in the calibration run")
    return row.alignment


def _thrift(row: LayerScore) -> float:
    return row.effect / max(row.cost, 1e-3)


# name -> score; higher is taken first
SCORES: dict[str, Callable[[LayerScore], float]] = {
    "apart": _apart,  # 1 - |cosine of c - k with c - u|: a direction that CFG does not already give
    "novelty": _novelty,  # size of the part of c - k that CFG does not already give: effect * sin(c - k, c - u)
    "effect": _effect,  # size of the effect
    "aligned": _aligned,  # cosine with CFG's own direction
    "detail": _detail,  # high against low spatial frequencies
    "motion": _motion,  # high against low temporal frequencies
    "thrift": _thrift,  # effect per cost
}
DEFAULT_SCORE = "apart"


def check_score(name: str) -> None:
    """Refuse a score that does not exist."""
    if not is_one_of(name, SCORES):
        raise SkipError(f"unknown score {name!r}; expected one of {', '.join(SCORES)}")


def band_norms(video: Tensor) -> dict[str, Tensor]:
    """Norms of the low and high spatial and temporal frequencies, per batch row.

    Args:
        video: [B, C, F, H, W] (F = 1 for pictures).

    Returns:
        `space_low`, `space_high`, and with more than one frame `time_low`, `time_high`: [B] each. Low is at most half
        of the Nyquist frequency (radially in space) and includes the mean.

    Example:
        >>> flat = torch.ones(1, 1, 4, 8, 8)
        >>> {name: round(norm.item(), 3) for name, norm in band_norms(flat).items()}
        {'space_low': 16.0, 'space_high': 0.0, 'time_low': 16.0, 'time_high': 0.0}
    """
    video = video.double() if video.dtype == torch.float64 else video.float()
    frames, height, width = video.shape[-3:]
    fy = torch.fft.fftfreq(height, device=video.device)[:, None]
    fx = torch.fft.fftfreq(width, device=video.device)[None]
    low = (fy.square() + fx.square()).sqrt() <= 0.25 + 1e-6
    plane = torch.fft.fft2(video, norm="ortho")
    norms = {
        "space_low": (plane * low).abs().flatten(1).norm(dim=1),
        "space_high": (plane * ~low).abs().flatten(1).norm(dim=1),
    }
    if frames > 1:
        line = torch.fft.fft(video, dim=-3, norm="ortho")
        slow = (torch.fft.fftfreq(frames, device=video.device).abs() <= 0.25 + 1e-6)[:, None, None]
        norms["time_low"] = (line * slow).abs().flatten(1).norm(dim=1)
        norms["time_high"] = (line * ~slow).abs().flatten(1).norm(dim=1)
    return norms


def measure_skip(
    c: Tensor, k: Tensor, u: Tensor | None = None, grid: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """What a skip changed in one prediction, per batch row.

    Args:
        c: conditional prediction, [B, ...].
        k: the same without the layer.
        u: unconditional prediction, or None.
        grid: brings a prediction into [B, C, F, H, W]; None leaves the frequencies out.

    Returns:
        `effect`, `alignment` (with `u`), and the four bands that are known: [B] each.

    Example:
        >>> c, k = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
        >>> measure_skip(c, k, u=torch.zeros(1, 2))
        {'effect': tensor([0.2000]), 'alignment': tensor([0.8000])}
    """
    c, k = c.float(), k.float()
    d = c - k
    flat = d.flatten(1)
    tiny = 1e-20
    out = {"effect": flat.norm(dim=1) / c.flatten(1).norm(dim=1).clamp_min(tiny)}
    if u is not None:
        out["alignment"] = torch.cosine_similarity(flat, (c - u.float()).flatten(1), dim=1)
    if grid is not None:
        whole = band_norms(grid(c))
        out |= {name: norm / whole[name].clamp_min(tiny) for name, norm in band_norms(grid(d)).items()}
    return out


@dataclass(frozen=True, repr=False)
class LayerScores(Shown, JsonConfig):
    """The scores of a model's layers and parts.

    Attributes:
        rows: one entry per layer and part.
        model: class of the model.
        blocks: how many it has.
        fingerprint: of its weights.
        about: how the calibration was run.
    """

    rows: tuple[LayerScore, ...]
    model: str = ""
    blocks: int = 0
    fingerprint: str = ""
    about: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is no list of scores."""
        rows: Any = self.rows
        if not isinstance(rows, list | tuple) or not all(isinstance(row, LayerScore) for row in rows):
            raise SkipError(f"expected rows as a list of LayerScores; got {rows!r}")
        object.__setattr__(self, "rows", tuple(rows))
        normalize_fields(self, {"blocks": 0}, texts=("model", "fingerprint"))
        if self.about is not None and not isinstance(self.about, Mapping):
            raise SkipError(f"expected about as a mapping or None; got {self.about!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with a version."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"version": VERSION} | own | {"rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown key or version is an error."""
        check_keys(data, {f.name for f in fields(cls)}, "layer scores")
        rest = {name: value for name, value in data.items() if name not in ("rows", "version")}
        rows, known = data.get("rows"), [f.name for f in fields(LayerScore)]
        fit = isinstance(rows, list | tuple) and all(isinstance(row, Mapping) and {*row} == {*known} for row in rows)
        if rows is None or not fit:
            raise SkipError(f"expected the rows of layer scores as mappings with {', '.join(known)}; got {rows!r}")
        return cls(rows=tuple(LayerScore(**row) for row in rows), **rest)

    def _heading(self) -> str:
        of = f" of {self.model}" if self.model else ""
        return f"LayerScores{of}: {len(self.rows)} entries, best by {DEFAULT_SCORE} first; table() has them all"

    def _rows(self) -> list[Row]:
        best = [(row.layer, row.part, row.name, row.effect, row.cost) for row in self.rank()]
        return [("layer", "part", "block", "effect", "cost"), *best]

    def select(self, part: str | None = None, stack: str | None = None) -> list[LayerScore]:
        """The entries of one part and one stack."""
        return [row for row in self.rows if part in (None, row.part) and stack in (None, row.stack)]

    def rank(
        self, score: str = DEFAULT_SCORE, part: str | None = None, stack: str | None = None, limit: float = LIMIT
    ) -> list[LayerScore]:
        """The entries, best first. Of two equal ones the deeper, cheaper one comes first.

        Args:
            score: one of `SCORES`.
            part: only this part of the layers.
            stack: only this stack.
            limit: skips with a larger `effect` come last, smallest first: what they leave is not a weaker model.
        """
        check_score(score)
        value = SCORES[score]
        rows = self.select(part, stack)
        usable = [row for row in rows if row.effect <= limit]
        broken = sorted((row for row in rows if row.effect > limit), key=lambda row: row.effect)
        ranked: list[LayerScore] = []
        left = sorted(usable, key=value, reverse=True)
        while left:
            best = value(left[0])
            equal = [row for row in left if value(row) >= best - TOLERANCE * abs(best)]
            taken = min(equal, key=lambda row: (row.cost, -row.layer))
            ranked.append(taken)
            left.remove(taken)
        return ranked + broken

    def choose(
        self, score: str = DEFAULT_SCORE, part: str = "block", stack: str | None = None, count: int = 1
    ) -> tuple[int, ...]:
        """The best layers (over all stacks, in execution order).

        Raises:
            SkipError: if fewer were scored.
        """
        ranked = self.rank(score, part, stack)
        if len(ranked) < count:
            raise SkipError(f"{count} layers are asked for, but {len(ranked)} were scored for part {part!r}")
        return tuple(sorted(row.layer for row in ranked[:count]))

    def table(self, score: str = DEFAULT_SCORE) -> str:
        """All entries as text, best first."""
        head = ("rank", "layer", "part", "block", score, "effect", "cos", "space", "time", "cost")
        lines: list[tuple[str, ...]] = [head]
        for number, row in enumerate(self.rank(score), 1):
            bands = [
                "-" if low is None or high is None else f"{low:.3f}/{high:.3f}"
                for low, high in ((row.space_low, row.space_high), (row.time_low, row.time_high))
            ]
            cosine = "-" if row.alignment is None else f"{row.alignment:+.2f}"
            value = f"{SCORES[score](row):.4f}" if row.effect <= LIMIT else "too strong"
            own = (str(number), str(row.layer), row.part, row.name, value, f"{row.effect:.4f}", cosine)
            lines.append((*own, *bands, f"{row.cost:.2f}"))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        left = (2, 3)
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def average(samples: Iterable[Mapping[str, Tensor]]) -> dict[str, float | None]:
    """Means over batch rows and calls of what `measure_skip` returned; what was never measured is None."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, values in sample.items():
            found.setdefault(name, []).extend(values.tolist())
    names = ("effect", "alignment", "space_low", "space_high", "time_low", "time_high")
    means = {name: sum(own) / len(own) if (own := found.get(name)) else None for name in names}
    if means["effect"] is None or not all(math.isfinite(value) for value in means.values() if value is not None):
        raise SkipError(f"the calibration run gave predictions that are not finite numbers: {means}")
    return means


def fingerprint(names_and_tensors: Sequence[tuple[str, Tensor]], samples: int = 64) -> str:
    """A hash of a model: names, shapes, dtypes and `samples` evenly spaced values of every tensor."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in names_and_tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and tensor.device.type != "meta":
            stride = max(1, tensor.numel() // samples)
            values = tensor.detach().flatten()[::stride][:samples]
            digest.update(values.to("cpu", torch.float32 if values.is_floating_point() else None).numpy().tobytes())
    return digest.hexdigest()[:32]
