"""Parts: what of a block a plan may name, and how; what happens there is said in `perturbations/at_parts.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from skipguide.config import as_number, as_whole, is_one_of, layer_tuple, native, plain_data
from skipguide.errors import SkipError

Part = Literal[
    "block",
    "attn",
    "cross_attn",
    "mlp",
    "attn_identity",
    "attn_blur",
    "window_time",
    "window_space",
    "token_shuffle",
    "self_swap",
]


@dataclass(frozen=True)
class Option:
    """An option of a part: its default, and what brings a given value to its normal form (or refuses it)."""

    default: Any
    check: Callable[[str, Any], Any]


def _sigma(name: str, value: Any) -> float | None:
    """A positive number; None is infinity, which JSON has no number for."""
    value = native(value)
    if value is None or value == float("inf"):
        return None
    if (found := as_number(name, value)) == 0:
        raise SkipError(f"expected {name} above 0 (None is infinity); got {value!r}")
    return found


def _ratio(name: str, value: Any) -> float:
    found = as_number(name, value)
    if not 0 < found <= 1:
        raise SkipError(f"expected {name} above 0, 1 at most; got {value!r}")
    return found


def _window(name: str, value: Any) -> int | None:
    return None if value is None else as_whole(name, value)


def _windows(name: str, value: Any) -> int | tuple[int, int] | None:
    value = native(value)
    if not isinstance(value, (list, tuple)):
        return _window(name, value)
    if len(value) != 2:
        raise SkipError(f"expected {name} as one size, or as a height and a width; got {value!r}")
    return as_whole(name, value[0]), as_whole(name, value[1])


def _seed(name: str, value: Any) -> int:
    return as_whole(name, value, 0)


def _over(name: str, value: Any) -> str:
    if not is_one_of(value, SWAPS):
        raise SkipError(f"unknown {name} {value!r}; expected one of {', '.join(SWAPS)}")
    return str(value)


SWAPS = ("both", "space", "channels")

# What a block may have to have for a part -> what is missing where it has not. `blocks.Block` says what it has.
NEEDS: Mapping[str, str] = {
    "map": "no attention map is known here in which the image's tokens are apart",
    "image": "the tokens of its stream are not the image's alone",
    "grid": "it is not described where its tokens lie in a picture",
    "time": "its tokens are of one frame",
    "space": "its tokens are of one place",
}


@dataclass(frozen=True)
class PartSpec:
    """One part of a block, as data.

    Args:
        sublayers: the kinds of sublayers that it consists of, as `BlockSpec` names them; none is the block as a whole.
        needs: what its blocks must have, of `NEEDS`.
        runs: whether its sublayers still run, changed: then what serves them alone runs too, and their keys are kept.
        heads: whether it can be limited to some heads of the attention.
        options: its options by name.
        ranked: whether rankings try it where nobody names the parts.
    """

    sublayers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    runs: bool = False
    heads: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    ranked: bool = True


_MAP = ("map", "image", "grid")

PART_SPECS: Mapping[str, PartSpec] = {
    "block": PartSpec(),
    "attn": PartSpec(("attn",)),
    "cross_attn": PartSpec(("cross_attn",)),
    "mlp": PartSpec(("mlp",)),
    "attn_identity": PartSpec(("attn",), needs=("map",), heads=True),
    "attn_blur": PartSpec(
        ("attn",), needs=_MAP, runs=True, heads=True, options={"sigma": Option(None, _sigma)}, ranked=False
    ),
    "window_time": PartSpec(
        ("attn",),
        needs=(*_MAP, "time"),
        runs=True,
        heads=True,
        options={"window": Option(None, _window)},
        ranked=False,
    ),
    "window_space": PartSpec(
        ("attn",),
        needs=(*_MAP, "space"),
        runs=True,
        heads=True,
        options={"window": Option(None, _windows)},
        ranked=False,
    ),
    "token_shuffle": PartSpec(needs=("image",), runs=True, options={"seed": Option(0, _seed)}, ranked=False),
    "self_swap": PartSpec(
        needs=("image",),
        runs=True,
        options={"ratio": Option(0.1, _ratio), "over": Option("both", _over)},
        ranked=False,
    ),
}
PARTS: tuple[Part, ...] = get_args(Part)
# what rankings try where nobody names the parts: those without options
RANKED = tuple(part for part in PARTS if PART_SPECS[part].ranked)

Heads = tuple[int, ...] | Mapping[int, tuple[int, ...]] | None


@dataclass(frozen=True)
class Perturbation:
    """How blocks are weakened: what a plan says beside the layers, rows and steps.

    Args:
        part: what of a block is concerned.
        strength: 1 is the part as it is named, 0 the plain block, and between them what the part changes is
            interpolated: a left-out branch is scaled by 1 - strength.
        heads: the heads of the attention that are concerned, for all layers or by layer; None is all.
        options: of the part, by name; what is not said is its default.

    Raises:
        SkipError: for an unknown part or option, or a value that it cannot have.
    """

    part: Part = "block"
    strength: float = 1.0
    heads: Heads = field(default=None, hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check every field, and bring it to its normal form."""
        if not is_one_of(self.part, PARTS):
            raise SkipError(f"unknown part {self.part!r}; expected one of {', '.join(PARTS)}")
        strength = as_number("strength", self.strength)
        if strength > 1:
            raise SkipError(f"strength must lie in 0 to 1; got {self.strength!r}")
        object.__setattr__(self, "strength", float(strength))
        object.__setattr__(self, "heads", check_heads(self.heads))
        spec = PART_SPECS[self.part]
        if self.heads is not None and not spec.heads:
            having = ", ".join(part for part, each in PART_SPECS.items() if each.heads)
            raise SkipError(f"part={self.part!r} is not about heads of the attention; heads= goes with {having}")
        options: Any = self.options
        given = {} if options is None else options
        if not isinstance(given, Mapping):
            raise SkipError(f"part_options is a mapping of names to values; got {given!r}")
        if unknown := set(given) - set(spec.options):
            raise SkipError(
                f"part={self.part!r} has no option {', '.join(sorted(map(str, unknown)))}; it has "
                f"{', '.join(spec.options) or 'none'}"
            )
        # defaults are not kept: what says nothing and what says the default are the same
        checked = {name: option.check(name, given[name]) for name, option in spec.options.items() if name in given}
        own = {name: value for name, value in checked.items() if value != spec.options[name].default}
        object.__setattr__(self, "options", own)

    def option(self, name: str) -> Any:
        """The value of an option."""
        return self.options.get(name, PART_SPECS[self.part].options[name].default)

    def at(self, layer: int) -> Perturbation:
        """This one, for a layer: with its own heads.

        Raises:
            SkipError: if heads are named by layer, and none for this one.
        """
        if not isinstance(self.heads, Mapping):
            return self
        if layer not in self.heads:
            raise SkipError(f"heads names those of the layers {', '.join(map(str, self.heads))}; got layer {layer} too")
        return Perturbation(self.part, self.strength, self.heads[layer], self.options)

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments of a `SkipPlan` that this is."""
        return {"part": self.part, "strength": self.strength, "heads": self.heads, "part_options": self.options}

    @property
    def told(self) -> dict[str, Any]:
        """As plain data what is said beside the part; empty where nothing is."""
        told: dict[str, Any] = {"strength": self.strength} if self.strength != 1 else {}
        if self.heads is not None:
            told["heads"] = plain_data(self.heads)
        return told | ({"part_options": plain_data(self.options)} if self.options else {})

    @property
    def removes(self) -> bool:
        """Whether whole blocks are left out, so that they do not run."""
        return self.part == "block" and self.strength == 1

    @property
    def runs(self) -> bool:
        """Whether what is concerned still runs."""
        return PART_SPECS[self.part].runs or self.strength < 1 or self.heads is not None


def check_heads(heads: Any) -> Heads:
    """Heads in their normal form: None, a tuple of numbers, or one per layer.

    Raises:
        SkipError: for anything else, and for none.
    """
    if heads is None:
        return None
    if isinstance(heads, Mapping):
        try:
            layers = {int(layer): layer for layer in heads}  # JSON has texts as keys
        except (TypeError, ValueError):
            raise SkipError(f"heads by layer has layer numbers as its keys; got {list(heads)!r}") from None
        if len(layers) != len(heads) or not heads:
            raise SkipError(f"heads by layer names each layer once, and one at least; got {dict(heads)!r}")
        return {number: _heads(heads[layers[number]]) for number in sorted(layers)}
    return _heads(heads)


def _heads(heads: Any) -> tuple[int, ...]:
    found = tuple(sorted(layer_tuple(heads)))
    if not found or found[0] < 0:
        raise SkipError(f"heads are numbers from 0 on, one at least (None is all); got {heads!r}")
    return found
