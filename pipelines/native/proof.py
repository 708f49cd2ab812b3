"""Proof: that a call of the denoiser does what an earlier one did, up to the block at which it differs.

Inputs are compared as tensors: the same memory in the same state is equal, anything else is compared by value, and all
comparisons of a call are answered with one wait for the device. Where something cannot be compared, the answer is no.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.arguments import Arguments
from skipguide.blocks import BlockMap
from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.native.variants import Place
from skipguide.pipelines.native.weights import WeightState, address, weight_state
from skipguide.pipelines.sampling.row_inputs import foreign_inputs
from skipguide.prefix import Prefix

# what says in which form the prediction is returned; no block sees it
_FORM = "return_dict"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Held:
    """A tensor that a call was given, and its state then.

    Attributes:
        tensor: itself; of one whose changes are not counted (inference mode) a copy.
        version: how often it had been written to; None of a copy.
    """

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> Held:
        """A tensor as it is now."""
        return cls(tensor.clone(), None) if tensor.is_inference() else cls(tensor, tensor._version)

    @property
    def unchanged(self) -> bool:
        """Whether it was not written to since."""
        return self.version is None or self.tensor._version == self.version


@dataclass
class PlainCall:
    """A plain call that later ones may be variants of.

    Attributes:
        inputs: arguments by name, with `Held` tensors.
        weights: what else it depended on, up to the last of its places.
        stop: up to which block that reaches.
        batch: its rows.
        prefixes: place -> the activations there.
    """

    inputs: dict[str, Any]
    weights: WeightState
    stop: int
    batch: int
    prefixes: dict[Place, Prefix] = field(default_factory=dict)


class Prover:
    """Compares calls of one denoiser.

    Args:
        blocks: of the denoiser.
        marks: arguments that make a call a variant: they are not compared.
    """

    def __init__(self, blocks: BlockMap, marks: Sequence[str]) -> None:
        self.blocks = blocks
        self.arguments = Arguments(blocks.model)
        self.ignored = {*marks, _FORM}
        self.defaults = _defaults(blocks.model)

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, with the defaults of those that are not given."""
        known = {**self.defaults, **dict(zip(self.arguments.names, args, strict=False)), **kwargs}
        return {name: known[name] for name in self.arguments.names if name in known} | known  # the first one first

    def begin(self, given: Mapping[str, Any], batch: int, places: Sequence[Place]) -> PlainCall:
        """Note a plain call before it runs."""
        inputs = {name: _held(value) for name, value in given.items() if name not in self.ignored}
        stop = max(place.layer + bool(place.common) for place in places)
        return PlainCall(inputs, weight_state(self.blocks, stop), stop, batch)

    # -- a call against an earlier one --------------------------------------------------------------------------

    def rows(self, calls: Sequence[PlainCall], given: Mapping[str, Any], batch: int) -> tuple[PlainCall, slice] | str:
        """The earlier call, and its rows, that a call has the inputs of; or why there is none.

        Args:
            calls: the earlier ones, the last first.
            given: arguments of the call.
            batch: its rows.
        """
        mine = {name: value for name, value in given.items() if name not in self.ignored}
        why = "no earlier pass was kept"
        found: list[tuple[PlainCall, slice, list[Tensor]]] = []
        states: dict[int, WeightState] = {}
        for call in calls:
            state = states.setdefault(call.stop, weight_state(self.blocks, call.stop))
            if not call.weights.same(state):
                known = call.weights.known and state.known
                why = "the weights changed in between" if known else "weights made in inference mode count no changes"
                continue
            if state.watched or call.weights.watched:
                why = "hooks on the blocks before it may do something else in every pass"
                continue
            theirs = _released(call.inputs)
            if theirs is None:
                why = "an input was written to in between"
                continue
            why = "its inputs are not those of an earlier pass"
            for rows in self._groups(call, theirs, batch):
                part = self._take(theirs, rows, call.batch) if batch != call.batch else theirs
                flags = list(_differences(part, mine))
                if False not in flags:
                    found.append((call, rows, [flag for flag in flags if isinstance(flag, Tensor)]))
        for (call, rows, _), equal in zip(found, _answers([flags for *_, flags in found]), strict=True):
            if equal:
                return call, rows
        return why

    def _groups(self, call: PlainCall, theirs: dict[str, Any], batch: int) -> Iterator[slice]:
        """The rows of an earlier call that may be those of this one."""
        if call.batch == batch:
            yield slice(0, batch)
        elif call.batch % batch == 0 and not self._foreign(theirs, call.batch):
            for first in reversed(range(0, call.batch, batch)):  # the conditional rows are mostly the last
                yield slice(first, first + batch)

    def _foreign(self, given: Mapping[str, Any], batch: int) -> list[str]:
        return foreign_inputs(self.arguments, self.blocks.spec, (), given, batch)

    def _take(self, given: dict[str, Any], rows: slice | Tensor, batch: int) -> dict[str, Any]:
        spec = self.blocks.spec
        return self.arguments.rows((), given, rows, batch, spec.shared, spec.listed, spec.folded, 0, spec.layered)[1]

    # -- rows of a call against others of it --------------------------------------------------------------------

    def sources(
        self, given: Mapping[str, Any], batch: int, candidates: Mapping[int, Sequence[int]]
    ) -> dict[int, int] | str:
        """Row -> another row of the same call that has the same inputs; or why that is not known.

        Args:
            given: arguments of the call.
            batch: its rows.
            candidates: row -> those that may be the same.
        """
        mine = {name: value for name, value in given.items() if name not in self.ignored}
        if foreign := self._foreign(mine, batch):
            return f"which rows of {', '.join(foreign)} belong to which is not known"
        pairs = [(row, other) for row, others in candidates.items() for other in others]
        sides = [torch.tensor([pair[side] for pair in pairs]) for side in (0, 1)]
        flags: list[Tensor] = []
        left, right = (self._take(mine, side, batch) for side in sides)
        for a, b in _tensors(left, right):
            if a is not b:  # those that are the same for all rows are not taken apart
                flags.append((a == b).reshape(len(pairs), -1).all(1))
        equal = torch.stack([flag.to(flags[0].device) for flag in flags]).all(0).tolist() if flags else []
        found: dict[int, int] = {}
        for (row, other), same in zip(pairs, equal, strict=False):
            if same:
                found.setdefault(row, other)
        return found or "its rows have inputs of their own"


def _defaults(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(unwrap(model)).forward).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def _held(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Held.of(value)
    if isinstance(value, dict):
        return {key: _held(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_held(item) for item in value]
    return value


def _released(value: Any) -> Any:
    """What was held, with its tensors; None if one of them was written to."""
    try:
        return _open(value)
    except _ChangedError:
        return None


class _ChangedError(Exception):
    """A tensor was written to."""


def _open(value: Any) -> Any:
    if isinstance(value, Held):
        if not value.unchanged:
            raise _ChangedError
        return value.tensor
    if isinstance(value, dict):
        return {key: _open(item) for key, item in value.items()}
    return [_open(item) for item in value] if isinstance(value, list) else value


def _differences(a: Any, b: Any) -> Iterator[bool | Tensor]:
    """For every value in two structures whether they are equal; a tensor where the device has to say."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield _equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        yield a.keys() == b.keys()
        for key in a.keys() & b.keys():
            yield from _differences(a[key], b[key])
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        yield len(a) == len(b)
        for one, other in zip(a, b, strict=False):
            yield from _differences(one, other)
    elif isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
        yield type(a) is type(b) and a == b
    else:
        yield a is b


def _equal(a: Tensor, b: Tensor) -> bool | Tensor:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if (place := address(a)) and place == address(b) and a.stride() == b.stride():
        return True
    if a.device.type == "cpu":
        return torch.equal(a, b)
    return (a == b).all()


def _answers(flags: list[list[Tensor]]) -> list[bool]:
    """For every list of flags whether all of them hold, with one wait for the device."""
    counts, flat = [len(each) for each in flags], [flag for each in flags for flag in each]
    told = torch.stack([flag.to(flat[0].device) for flag in flat]).tolist() if flat else []
    answers, first = [], 0
    for count in counts:
        answers.append(all(told[first : first + count]))
        first += count
    return answers


def _tensors(a: Any, b: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(a, Tensor):
        yield a, b
    elif isinstance(a, dict):
        for key, value in a.items():
            yield from _tensors(value, b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            yield from _tensors(one, other)
