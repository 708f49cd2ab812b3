"""Arguments: a module's arguments by name, however they are passed, and their batch rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's forward arguments, of its class and so whatever wraps the instance."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def takes_any_name(module: nn.Module) -> bool:
    """Whether a module's forward takes keyword arguments of any name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


class Arguments:
    """Reads and replaces a module's arguments by name, however they are passed."""

    __slots__ = ("names", "places")

    def __init__(self, module: nn.Module) -> None:
        self.names = argument_names(unwrap(module))
        self.places = {name: place for place, name in enumerate(self.names)}

    def expect(self, module: nn.Module, name: str, wanted: Sequence[str]) -> None:
        """Refuse a description that reads arguments which `module` has not: in a pass they would be None.

        Raises:
            SkipError: naming them, and what there is.
        """
        unknown = [each for each in wanted if each and each not in self.places]
        if unknown and not takes_any_name(unwrap(module)):
            raise SkipError(
                f"{name} ({type(module).__name__}) is described with the arguments {', '.join(unknown)}, but its "
                f"forward takes {', '.join(self.names)}: name them in its BlockSpec (streams) or Sublayer (outputs)"
            )

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of argument `name` (of the first one, if `name` is empty), or None."""
        if not name:
            return first_tensor(args, kwargs)
        if name in kwargs:
            return kwargs[name]
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else None

    def put(
        self, values: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with some arguments replaced."""
        new_args = tuple(values.get(name, value) for name, value in zip(self.names, args, strict=False))
        return new_args + args[len(new_args) :], kwargs | {k: v for k, v in values.items() if k in kwargs}

    def own(
        self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with copies of the lists that some arguments are, for a module that empties them."""
        found = {name: self.get(name, args, kwargs) for name in names}
        return self.put({name: list(value) for name, value in found.items() if value is not None}, args, kwargs)

    def rows(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: Tensor | slice,
        size: int,
        shared: tuple[str, ...],
        listed: tuple[str, ...] = (),
        folded: tuple[str, ...] = (),
        batch: int = 0,
        layered: tuple[str, ...] = (),
        followed: tuple[str, ...] = (),
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call for some batch rows.

        Arguments named in `shared` have no batch dimension; those in `listed` are lists with an entry per row; those
        in `folded` fold something else into the model's `batch` (0 is `size`) than the first argument does; those in
        `layered` have the batch as their second dimension; those in `followed` have a row more, the last, that goes
        with any rows.
        """

        def some(name: str, value: Any) -> Any:
            if name in shared:
                return value
            if name in listed and isinstance(value, (list, tuple)):
                return value[index] if isinstance(index, slice) else type(value)(value[i] for i in index.tolist())
            if name in folded:
                return _refold(value, index, size, batch or size)
            if name in layered and isinstance(value, Tensor):
                return value[:, index]
            if name in followed and isinstance(value, Tensor):
                return torch.cat([value[:size][index], value[size:]])
            return take_rows(value, index, size)

        names = (*self.names, *[""] * len(args))
        new_args = tuple(some(name, value) for name, value in zip(names, args, strict=False))
        return new_args, {name: some(name, value) for name, value in kwargs.items()}


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call that is a tensor with a batch dimension."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value
    raise SkipError("a module was called without a tensor: its batch size is unknown")


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch size of a model call: rows of `hidden_states`, or of the first tensor there is."""
    hidden = kwargs.get("hidden_states")
    return (hidden if isinstance(hidden, Tensor) else first_tensor(args, kwargs)).shape[0]


def row_index(rows: Sequence[int] | Tensor, batch: int, like: Tensor) -> Tensor:
    """Index of model batch rows in a tensor whose first dimension folds more into the batch (frames, positions)."""
    fold, rest = divmod(like.shape[0], batch)
    if rest:
        raise SkipError(f"a block's batch of {like.shape[0]} is not a multiple of the model's batch of {batch}")
    index = rows if isinstance(rows, Tensor) else torch.tensor(rows)
    index = index.to(like.device, non_blocking=True)  # every block of every step asks: do not wait for the device
    if fold > 1:
        index = (index[:, None] * fold + torch.arange(fold, device=like.device)).flatten()
    return index


def _refold(value: Any, index: Tensor | slice, size: int, batch: int) -> Any:
    """The rows of tensors for an index into `size` rows, both of which fold something into the same `batch`."""
    if isinstance(value, (tuple, list)):
        return sequence_like(value, (_refold(item, index, size, batch) for item in value))
    if not isinstance(value, Tensor):
        return value
    own, fold = size // batch, value.shape[0] // batch
    if isinstance(index, slice):
        start, stop, _ = index.indices(size)
        return value[start // own * fold : stop // own * fold]
    return value[row_index(index[::own] // own, batch, value)]


def cloned(value: Any, made: dict[int, Tensor] | None = None) -> Any:
    """Copies of all tensors in a value; one that is in it twice is one tensor again."""
    made = {} if made is None else made
    if isinstance(value, Tensor):
        if id(value) not in made:
            made[id(value)] = value.clone()
        return made[id(value)]
    if isinstance(value, (tuple, list)):
        return sequence_like(value, [cloned(item, made) for item in value])
    return value


def sequence_like(old: tuple[Any, ...] | list[Any], items: Iterable[Any]) -> Any:
    """A tuple, named tuple or list of the same type."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def take_rows(value: Any, index: Tensor | slice, size: int) -> Any:
    """The rows of every tensor in `value` whose first dimension is the batch; everything else unchanged."""
    if isinstance(value, Tensor):
        return value[index] if value.dim() and value.shape[0] == size else value
    if isinstance(value, (tuple, list)):
        return sequence_like(value, (take_rows(item, index, size) for item in value))
    if isinstance(value, dict):
        return {key: take_rows(item, index, size) for key, item in value.items()}
    return value
