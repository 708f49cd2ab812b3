"""Row inputs: which inputs of a call have the batch as their first dimension, before rows of the batch are taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from skipguide.arguments import Arguments
from skipguide.errors import SkipError
from skipguide.spec import ModelSpec


def foreign_inputs(
    arguments: Arguments, spec: ModelSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
) -> list[str]:
    """The inputs that fold something of their own into the first dimension, such as further texts for each row.

    Rows of the batch cannot be taken of them: nobody says which of theirs belong to which.

    Args:
        arguments: of the denoiser.
        spec: says which arguments have no batch, or fold it in a known way.
        args: of the call.
        kwargs: of the call.
        batch: how many rows the call has.
    """
    known = {*spec.shared, *spec.listed, *spec.folded, *spec.layered}
    given = [*zip(arguments.names, args, strict=False), *kwargs.items()]
    return [
        f"{name} ({tuple(tensor.shape)})"
        for name, value in given
        if name not in known
        for tensor in _tensors(value)
        if tensor.dim() and tensor.shape[0] not in (1, batch)
    ]


def refuse_foreign(found: list[str], batch: int, what: str) -> None:
    """Refuse to take rows of inputs that have others.

    Raises:
        SkipError: naming them.
    """
    if found:
        raise SkipError(
            f"{what} takes rows of a batch of {batch}, and the first dimension of {', '.join(found)} is not the batch: "
            f"which of its rows belong to which clip is not known. Use tail='separate' and CFG in two calls or none, "
            f"or name the argument in the model's spec (shared, folded, layered)"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def half_of(batch: int) -> int:
    """How many clips a batch with rows [uncond, cond] is for.

    Raises:
        SkipError: for an odd batch.
    """
    if batch % 2:
        raise SkipError(f"CFG is on, so rows [uncond, cond] were expected; got an odd batch of {batch}")
    return batch // 2
