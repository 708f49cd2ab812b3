"""Plan: which layers, which part, which batch rows, which steps. Plain data with a JSON round trip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skipguide.config import VERSION, check_keys, layer_tuple, write_json
from skipguide.errors import SkipError
from skipguide.files import read_json
from skipguide.parts import PARTS as PARTS
from skipguide.parts import Part as Part
from skipguide.parts import Perturbation
from skipguide.schedule import Schedule
from skipguide.shown import brief


def check_stack(stack: Any) -> str | None:
    """The name of a stack, or None."""
    if stack is not None and not isinstance(stack, str):
        raise SkipError(f"stack is the name of one stack of blocks, or None; got {stack!r}")
    return stack


@dataclass(frozen=True, repr=False)
class SkipPlan:
    """What to leave out: layers, the part of them, the batch rows and the steps it holds for.

    Args:
        layers: block numbers in execution order over all stacks, or within `stack` when that is given.
        part: what of the layers: `"block"` (every stream passes through), `"attn"`, `"cross_attn"`, `"mlp"` (that
            sublayer's residual contribution is zero), `"attn_identity"` (the attention map is the identity: the output
            projection of the values), or a perturbation of what still runs: `"attn_blur"`, `"window_time"`,
            `"window_space"`, `"token_shuffle"`, `"self_swap"` (`pipelines/README.md` has the table).
        stack: name of one stack of blocks, such as `"single_transformer_blocks"`.
        rows: batch rows that skip (negative numbers count from the end); None is every row.
        start: first step, as a fraction of the steps (inclusive).
        stop: end of the window, as a fraction of the steps (exclusive; 1.0 is the end).
        strength: 1 is the part as it is named, 0 the plain model, to the bit; between them what the part changes is
            interpolated: a left-out branch is scaled by 1 - strength.
        heads: the heads of the attention that the part is about, from 0 on; a mapping has them by layer. None is all.
        part_options: what else the part can be told, such as `{"sigma": 2.0}` of `"attn_blur"`.

    Raises:
        SkipError: on an unknown part or option, repeated or non-integer layers, or an empty window.

    Example:
        >>> plan = SkipPlan([3, 5]) | SkipPlan([7], part="mlp")
        >>> SkipPlan.from_dict(plan.to_dict()) == plan
        True
    """

    layers: Sequence[int] = ()
    part: Part = "block"
    stack: str | None = None
    rows: Sequence[int] | None = None
    start: float = 0.0
    stop: float = 1.0
    others: tuple[SkipPlan, ...] = ()
    strength: float = field(default=1.0, kw_only=True)
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = field(default=None, kw_only=True, hash=False)
    part_options: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        """Normalise sequences to tuples and check every field."""
        object.__setattr__(self, "layers", layer_tuple(self.layers))
        for name, value in self.perturbation.fields.items():
            object.__setattr__(self, name, value)
        if isinstance(self.heads, Mapping) and set(self.heads) != set(self.layers):
            raise SkipError(f"heads by layer has an entry for each of the layers {self.layers}; got {self.heads}")
        check_stack(self.stack)
        if self.rows is not None:
            object.__setattr__(self, "rows", layer_tuple(self.rows))
        window = Schedule(self.start, self.stop)
        object.__setattr__(self, "start", window.start)
        object.__setattr__(self, "stop", window.stop)

    @property
    def schedule(self) -> Schedule:
        """The window of steps as a `Schedule`."""
        return Schedule(self.start, self.stop)

    @property
    def perturbation(self) -> Perturbation:
        """How the layers of this term are weakened."""
        heads: Any = self.heads
        return Perturbation(self.part, self.strength, heads, self.part_options)

    @property
    def terms(self) -> tuple[SkipPlan, ...]:
        """The plan as single terms; a union has several."""
        return (replace(self, others=()), *self.others)

    @property
    def empty(self) -> bool:
        """True if no term names a layer."""
        return not any(term.layers for term in self.terms)

    def __repr__(self) -> str:
        """What differs from the defaults, the plans of a union beside each other."""
        return " | ".join(brief(term) for term in self.terms)

    def __or__(self, other: SkipPlan) -> SkipPlan:
        """Union: what either plan leaves out is left out."""
        if not isinstance(other, SkipPlan):
            return NotImplemented
        return SkipPlan._of(dict.fromkeys((*self.terms, *other.terms)))

    @classmethod
    def _of(cls, terms: Iterable[SkipPlan]) -> SkipPlan:
        first, *rest = terms
        return replace(first, others=tuple(rest))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `{"version": 1, "terms": [...]}`. What a part can be told is there where something is told."""
        return {"version": VERSION, "terms": [term._term_dict() for term in self.terms]}

    def _term_dict(self) -> dict[str, Any]:
        plain = {
            "layers": list(self.layers),
            "part": self.part,
            "stack": self.stack,
            "rows": None if self.rows is None else list(self.rows),
            "start": self.start,
            "stop": self.stop,
        }
        return plain | self.perturbation.told

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SkipPlan:
        """Read what `to_dict` wrote; an unknown key or version is an error."""
        check_keys(data, {"terms"}, "a plan")
        known = {"layers", "part", "stack", "rows", "start", "stop", "strength", "heads", "part_options"}
        if not data.get("terms"):
            raise SkipError("expected a plan with at least one term (an empty plan has one without layers); got none")
        if not (isinstance(data["terms"], (list, tuple)) and all(isinstance(term, Mapping) for term in data["terms"])):
            raise SkipError(f"expected a plan's terms as a list of mappings; got {data['terms']!r}")
        for term in data["terms"]:
            if unknown := set(term) - known:
                raise SkipError(f"unknown keys in a plan's term: {sorted(unknown)}; expected {sorted(known)}")
            if "layers" not in term:
                raise SkipError(f"expected the layers of every term of a plan (an empty list for none); got {term!r}")
        return cls._of(cls(**term) for term in data["terms"])

    def save_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the plan as JSON; an existing file is kept unless `overwrite`."""
        write_json(path, self.to_dict(), overwrite=overwrite)

    @classmethod
    def load_json(cls, path: str | Path) -> SkipPlan:
        """Read a plan that `save_json` wrote."""
        return cls.from_dict(read_json(path))
